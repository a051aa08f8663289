"""Other libraries' models on this package's attention: what `saccade.accelerate` does beyond torch's modules.

Nothing here is imported before a model of that library is met.
"""
