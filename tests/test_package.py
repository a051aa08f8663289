"""What `import saccade` gives and costs: the version, the names, nothing loaded that is not needed."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import saccade


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
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
