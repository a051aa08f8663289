"""What was built: nothing leaks in between instruction sets, or from Python, CUDA or the building machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import saccade

ROOT = Path(__file__).parents[1]
LIBRARY = Path(saccade.__file__).with_name("libsaccade_ops.so")
OBJECTS = ROOT / f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

needs_elf = pytest.mark.skipif(
    not (sys.platform == "linux" and LIBRARY.exists() and shutil.which("nm")),
    reason="reads the built ELF library with nm and readelf",
)

# Uses the reference backend and nothing that is compiled or optional.
WITHOUT_LIBRARIES = """
import sys, warnings
for name in ("triton", "matplotlib", "rich", "pybind11", "numpy"):
    sys.modules[name] = None
warnings.simplefilter("ignore")  # torch's own, about numpy
import torch, saccade
assert not any(name.startswith("saccade._C") for name in sys.modules), "_C was found"
q = torch.randn(1, 2, 5, 8)
out = saccade.attention(q, q, q, causal=True)
expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
torch.testing.assert_close(out, expected)
print(*saccade.backends())
"""


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )


def check(*command: str | Path, cwd: Path = ROOT, **env: str) -> str:
    result = run(*command, cwd=cwd, **env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def instruction_set(obj: Path) -> str:
    """`cpu_dot_body.avx2.o` -> avx2; the portable set has the flags of the baseline."""
    label = obj.stem.partition(".")[2]
    return "" if label in ("", "portable") else label


def symbols(obj: Path) -> tuple[set[str], set[str]]:
    """(weak functions that an object defines, every symbol that it names)."""
    rows = [line.split() for line in check("nm", "-f", "posix", obj).splitlines()]
    return {row[0] for row in rows if row[1] == "W"}, {row[0] for row in rows}


@needs_elf
def test_instruction_sets_share_no_function() -> None:
    """The linker keeps one copy of a weak function: the AVX-512 one would kill older processors."""
    objects = [obj for obj in sorted(OBJECTS.glob("*.o")) if obj.stem != "module"]
    if not objects:
        pytest.skip("the build folder is gone")
    table = {obj: symbols(obj) for obj in objects}
    shared = set()
    for obj in objects:
        others = [table[other][1] for other in objects if instruction_set(other) != instruction_set(obj)]
        if instruction_set(obj):
            shared |= {(obj.name, name) for name in table[obj][0].intersection(set().union(*others))}
    assert not shared


@needs_elf
def test_library_needs_neither_python_nor_cuda() -> None:
    needed = re.findall(r"NEEDED.*\[(.*)\]", check("readelf", "-d", LIBRARY))
    assert "libtorch.so" in needed
    assert not [
        name for name in needed if re.match(r"libtorch_cuda|libtorch_python|libc10|libcuda|libpython", name)
    ]
    undefined = re.findall(r" U (\S+)", check("nm", "-D", LIBRARY))
    assert undefined
    assert not [name for name in undefined if re.match(r"_?Py[A-Z_]", name)]


@needs_elf
def test_library_takes_only_the_stable_abi_from_torch() -> None:
    """A C++ symbol of torch binds the library to one version of it."""
    undefined = re.findall(r" U (\S+)", check("nm", "-D", LIBRARY))
    assert not [name for name in undefined if re.match(r"_Z.*(c10|torch|2at)", name)]


@pytest.mark.parametrize("asked", [["90a", "120", "86", "80"], ["100", "90"]], ids=str)
def test_ptx_is_the_oldests(asked: list[str]) -> None:
    """However they are listed: every later processor can compile it when it loads it."""
    program = "import setuptools, sys; setuptools.setup = lambda **_: None; import setup; "
    program += "print(*setup.Cuda('none', []).flags(sys.argv[1:]))"
    flags = check(sys.executable, "-c", program, *asked)
    oldest = min(int(arch) for arch in asked if arch.isdigit())
    assert re.findall(r"code=compute_(\w+)", flags) == [str(oldest)]
    assert re.findall(r"code=sm_(\w+)", flags) == asked


@needs_elf
@pytest.mark.parametrize("library", sorted(LIBRARY.parent.glob("*.so")), ids=lambda path: path.name)
def test_no_path_of_the_building_machine(library: Path) -> None:
    content = library.read_bytes()
    for path in (str(ROOT), sys.prefix, "site-packages", sysconfig.get_path("include")):
        assert path.encode() not in content
    assert not re.search("RPATH|RUNPATH", check("readelf", "-d", library))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    check(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture
def unpacked(sdist: Path, tmp_path: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    return next(tmp_path.glob("saccade-*"))


def test_sdist_is_complete(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile"}
    patterns = {
        "csrc": "*.*",
        "kernels": "*.py",
        "python/saccade": "*.py*",
        "tests": "*.py",
        "benchmarks": "*.py",
    }
    for folder, pattern in patterns.items():
        found = [path for path in (ROOT / folder).rglob(pattern) if path.suffix != ".pyc"]
        wanted |= {str(path.relative_to(ROOT)) for path in found}
    assert not wanted - inside
    assert not [name for name in inside if name.endswith((".so", ".o", ".pyc"))]


def test_imports_without_libraries(tmp_path: Path) -> None:
    package = Path(saccade.__file__).parent
    shutil.copytree(package, tmp_path / "saccade", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    names = check(sys.executable, "-c", WITHOUT_LIBRARIES, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert names.split() == ["reference"]


def test_missing_compiler_is_named() -> None:
    command = (sys.executable, "setup.py", "--version")
    result = run(*command, CXX="no-such-compiler", SACCADE_REQUIRE_EXT="1")
    assert result.returncode != 0
    assert "'no-such-compiler' does not compile" in result.stderr
    assert "apt-get install g++" in result.stderr
    result = run(*command, CXX="no-such-compiler", SACCADE_REQUIRE_EXT="0")
    assert result.returncode == 0
    assert "only the reference backend" in result.stderr


def wheel(source: Path, **env: str) -> Path:
    """Build a wheel of an unpacked sdist in its own folder."""
    command = (sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps")
    check(*command, "--wheel-dir", source / "dist", source, **env)
    return next((source / "dist").glob("*.whl"))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_wheel_of_the_sdist(unpacked: Path, tmp_path: Path) -> None:
    made = wheel(unpacked, SACCADE_REQUIRE_EXT="1")
    assert f"-cp{sys.version_info.major}{sys.version_info.minor}-" in made.name
    with zipfile.ZipFile(made) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert {
        "saccade/libsaccade_ops.so",
        "saccade/_C.pyi",
        "saccade/py.typed",
        "saccade/kernels/__init__.py",
    } <= names
    assert not [name for name in names if name.startswith(("tests/", "csrc/")) or name.endswith(".cpp")]
    code = "import saccade; print(saccade.__file__, *saccade.backends())"
    printed = check(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed")).split()
    assert printed[0].startswith(str(tmp_path / "installed"))
    assert "cpu" in printed[1:]


@pytest.mark.full
def test_wheel_without_compiler(unpacked: Path, tmp_path: Path) -> None:
    made = wheel(unpacked, CXX="no-such-compiler", SACCADE_REQUIRE_EXT="0")
    assert made.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(made) as archive:
        archive.extractall(tmp_path / "installed")
    target = str(tmp_path / "installed")
    assert check(sys.executable, "-c", WITHOUT_LIBRARIES, cwd=tmp_path, PYTHONPATH=target).split() == [
        "reference"
    ]


@pytest.mark.full
def test_broken_source_fails(unpacked: Path) -> None:
    """A compiler that is there and refuses the source is never taken for one that is missing."""
    (unpacked / "csrc/ops.cpp").write_text("#error broken on purpose\n")
    command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", unpacked)
    result = run(*command, cwd=unpacked, MAX_JOBS="1", SACCADE_REQUIRE_EXT="0")
    assert result.returncode != 0
    assert "broken on purpose" in result.stdout + result.stderr
