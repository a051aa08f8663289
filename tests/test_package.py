"""What `import saccade` gives and costs: the version, the names, nothing loaded that is not needed."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import metadata

import pytest
import saccade
from saccade import ops


def run(code: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_version_is_that_of_the_installed_package() -> None:
    assert saccade.__version__ == metadata.version("saccade")


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(saccade, "nonsense")


def test_dir_shows_public_names_only() -> None:
    shown = {name for name in dir(saccade) if not name.startswith("_")}
    assert shown == {*saccade.__all__, "integrations", "testing"}
    assert all(hasattr(saccade, name) for name in dir(saccade))
    assert "__version__" in dir(saccade)


def test_every_public_name_is_documented() -> None:
    for module in (saccade, saccade.nn, saccade.patterns):
        for name in module.__all__:
            assert (getattr(module, name).__doc__ or "").strip(), name


def test_every_module_says_what_its_methods_take() -> None:
    """Also in help(): torch's own text of forward says nothing."""
    for name in saccade.nn.__all__:
        for method, function in vars(getattr(saccade.nn, name)).items():
            if inspect.isfunction(function) and not method.startswith("_") and method != "extra_repr":
                told = method != "forward" and inspect.getdoc(getattr(getattr(saccade.nn, name), method))
                assert function.__doc__ or told, f"{name}.{method}"


def test_import_does_not_load_the_compiler() -> None:
    """torch's takes over a second; a decorator of torch.compiler imports it."""
    code = "import sys, saccade; print('torch._dynamo' in sys.modules, 'triton' in sys.modules)"
    assert run(code) == "False False"


def test_import_warns_of_nothing_and_leaves_torch_alone() -> None:
    code = (
        "import warnings, torch; warnings.simplefilter('error'); before = torch.get_num_threads(), "
        "torch.initial_seed(), torch.get_float32_matmul_precision(); import saccade; print(before == "
        "(torch.get_num_threads(), torch.initial_seed(), torch.get_float32_matmul_precision()))"
    )
    assert run(code) == "True"


# Operators that this Python code uses, with other arguments: a library built before a pull. One is right.
STALE = """
import torch, warnings
stale = torch.library.Library("saccade", "DEF")
for schema in ("forward(Tensor q) -> Tensor", "backward(Tensor q) -> Tensor", "cpu_isa(str name) -> str"):
    stale.define(schema)
torch.ops.load_library = lambda path: None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import saccade
(warning,) = caught
print(warning.category.__name__, warning.message)
q = torch.ones(1, 1, 2, 8)
print(saccade.backends(), float(saccade.attention(q, q, q).sum()), saccade.explain(q, q, q).reasons["cpu"])
"""


@pytest.mark.skipif(not ops.LOADED, reason="the operator library is not built")
def test_a_library_of_other_sources_is_not_used() -> None:
    warned, used = run(STALE).splitlines()
    assert warned.startswith("UserWarning saccade: the operator library does not match this Python code")
    assert "forward, forward_weights, backward" in warned and "cpu_isa" not in warned
    assert "'cpu'" not in used and "'reference'] 16.0" in used.replace(", 'triton'", "")
    assert "does not match" in used


@pytest.mark.skipif(not ops.LOADED, reason="the operator library is not built")
def test_an_instruction_set_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACCADE_CPU_ISA", "mmx")
    code = (
        "import torch, saccade; q = torch.ones(1, 1, 2, 8)\n"
        "for _ in range(2):\n"
        "    try: saccade.attention(q, q, q)\n"
        "    except RuntimeError as error: print(error)"
    )
    for line in run(code).splitlines():
        assert line.startswith("saccade: SACCADE_CPU_ISA=mmx cannot run here; this processor can run ")
        assert "portable" in line


TRITON = """
import sys, types, torch
from saccade import ops_triton
from saccade.backends import triton
torch.cuda.is_available, ops_triton.FOUND = lambda: True, True
sys.modules["triton"] = types.SimpleNamespace(__version__="3.2.0") if sys.argv[1:] else None
print(*triton.missing())
"""


def test_a_triton_that_does_not_serve_is_a_reason() -> None:
    assert run(TRITON).startswith("triton cannot be imported (ModuleNotFoundError: ")
    assert run(TRITON, "old") == "triton 3.2.0 is older than 3.6"
