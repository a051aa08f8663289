"""The benchmark suite behind `python -m saccade bench`: cases, peers side by side, results checked first.

cases      what is measured: sizes of real models and sweeps, in groups that are summarised together
peers      how each provider computes a case, or why it cannot
check      every provider's results against fp64, before any of its numbers is printed
measure    interleaved timing; the machine's own matrix product in the same run
apart      a case in a process of its own
memory     peak memory of one call, in a process of its own
machine    what the numbers were measured on
suites     the registry: a name -> the groups it measures
report     table, CSV, JSON;  plots: pictures
cli        the command line
"""
