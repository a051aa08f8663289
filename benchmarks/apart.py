"""A function's call in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")
# Imported once, by the process that the others are forks of.
_PRELOADED = ["saccade.benchmarks.cli", "torch_geometric.nn"]


def apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments), both picklable, by a process that has done nothing else.

    What earlier cases left in the heap decides whether a tensor of 50 MB costs page faults: a call of PyTorch
    Geometric takes 30 ms or 100, and a case by itself another time than in its suite.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(_PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
