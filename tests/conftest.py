"""Shared fixtures."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

# The tests are about CPU tensors, on a machine with a GPU too; test_gpu.py runs by itself, uninterpreted.
if os.environ.get("TRITON_INTERPRET") != "0" and importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are declared, so before they are imported
    import triton_interpreter

    triton_interpreter.install()

import saccade  # noqa: E402

pytest_plugins = ["example"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[name for name in saccade.backends() if name != "cuda"])  # no CPU tensors, no fp64
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


SETS = torch.ops.saccade.cpu_isa("").split()[1:] if saccade.ops.LOADED else []


def _chosen(name: str) -> Iterator[str]:
    torch.ops.saccade.cpu_isa(name)
    yield name
    torch.ops.saccade.cpu_isa("best")


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor has."""
    yield from _chosen(request.param)


@pytest.fixture(params=[name for name in SETS if "bf16" not in name and name != "amx"])
def vector_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Those that have code of their own for graphs."""
    yield from _chosen(request.param)


FULL_SECONDS = 1200  # for a test of `make test-full`; the others have what pyproject.toml says

# Minutes a test: at the end, one process would wait for the other.
LONG = {"test_triton_compiles.py", "test_cuda_machine_code.py"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first. Triton's interpreter takes a second for what a kernel does in
    microseconds: tests of many or large calls leave it to `make test-full`.
    """
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        is_triton = getattr(item, "callspec", None) and item.callspec.params.get("backend") == "triton"
        if is_triton and item.get_closest_marker("many_calls"):
            item.add_marker(pytest.mark.full)
        if item.get_closest_marker("full") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(FULL_SECONDS))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
