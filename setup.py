"""The compiled part of saccade, and which folder is which package.

One ninja build makes two files:

    saccade/libsaccade_ops.so    kernels and operator registrations on torch's stable ABI; no Python symbols
    saccade/_C.cpython-*.so      pybind11: what was compiled, what the processor can do; no torch symbols

A file's name says how it is compiled: ``csrc/cpu/*_body.cpp`` and ``*_bf16.cpp`` once per instruction set,
``csrc/cuda/*_sm90.cu`` for Hopper alone, other ``.cu`` files for every architecture, the rest once.

Environment:
    CXX                    the C++ compiler (g++)
    MAX_JOBS               compile jobs at a time
    SACCADE_REQUIRE_EXT    1: a missing compiler is an error; else only the reference backend is installed
    SACCADE_CUDA           auto (when nvcc runs), 0 or 1
    SACCADE_CUDA_ARCHS     "80;90a"
    NVCC, CUDA_HOME        where to look for nvcc first
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX = os.environ.get("CXX", "g++")
X86 = platform.machine().lower() in ("x86_64", "amd64")
MACOS = sys.platform == "darwin"

# The oldest torch whose stable ABI is enough. A library built for it loads in every later one.
TORCH_TARGET = (2, 11)

OPS, MODULE = "saccade.libsaccade_ops", "saccade._C"

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *"-mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512".split()]
AVX512BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512BF16, "-mamx-tile", "-mamx-bf16"]

# By the end of a file's stem: the sets it is compiled for. Each set is a namespace (SACCADE_ISA) of its own.
Bodies = dict[str, dict[str, list[str]]]
BODY_SETS: Bodies = {
    "_body": {"portable": [], "avx2": AVX2, "avx512": AVX512},
    "_bf16": {"portable": [], "avx512bf16": AVX512BF16, "amx": AMX},
}

# Reassociation stays forbidden (no -ffast-math): infinities and NaN mean something, sums have an order.
CXXFLAGS = (
    "-std=c++17 -O3 -g0 -DNDEBUG -fPIC -fvisibility=hidden -fvisibility-inlines-hidden "
    "-ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra -Icsrc"
).split()


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run quietly; a program that is not there counts as one that failed."""
    try:
        return subprocess.run([*map(str, command)], capture_output=True, text=True)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def compiles(flags: list[str]) -> bool:
    """Whether the compiler makes a shared library of a C++17 program with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        program = "#include <string_view>\nint size(std::string_view s) { return int(s.size()); }\n"
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text(program)
        command = [*CXX.split(), "-std=c++17", "-fPIC", "-shared", *flags, source, "-o", library]
        return run(*command).returncode == 0


def extensions() -> list[Extension]:
    """What this machine can compile. What it cannot is said here; pip shows it with -v or on failure."""
    missing = {}
    if not compiles([]):
        missing["a C++17 compiler"] = f"'{CXX}' does not compile; Debian: apt-get install g++, or set CXX"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing["Python.h"] = f"for Python {platform.python_version()}; Debian: apt-get install python3-dev"
    if not missing:
        return [Extension(OPS, []), Extension(MODULE, [])]
    kept = [] if "a C++17 compiler" in missing else [Extension(OPS, [])]
    effect = "without saccade._C" if kept else "without kernels: only the reference backend will work"
    lines = [f"saccade: missing {what} ({why})" for what, why in missing.items()]
    if os.environ.get("SACCADE_REQUIRE_EXT") == "1":
        raise SystemExit("\n".join([*lines, "saccade: SACCADE_REQUIRE_EXT=1, giving up"]))
    print("\n".join([*lines, f"saccade: installing {effect}"]), file=sys.stderr)
    return kept


def packages() -> tuple[list[str], dict[str, str]]:
    """Packages and their folders: python/saccade, and the top-level folders that are installed under it."""
    names, folders = find_packages("python"), {"saccade": "python/saccade"}
    for folder in ("kernels", "benchmarks"):
        if (ROOT / folder / "__init__.py").exists():
            folders[f"saccade.{folder}"] = folder
            names += [f"saccade.{folder}", *(f"saccade.{folder}.{name}" for name in find_packages(folder))]
    return names, folders


class Cuda:
    """nvcc and its libraries."""

    def __init__(self, nvcc: str, archs: list[str]) -> None:
        self.nvcc, self.archs = nvcc, archs
        # nvcc may be a script or a link: only itself knows its root.
        plan = run(nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull).stderr
        top = re.search(r"^#\$ TOP=(.*)$", plan, re.M)
        self.root = Path(top[1].strip() if top else Path(nvcc).parent.parent).resolve()

    @classmethod
    def find(cls) -> Cuda | None:
        """The CUDA compiler, when it is wanted and there is something to compile."""
        wanted = os.environ.get("SACCADE_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"saccade: SACCADE_CUDA is auto, 0 or 1, got '{wanted}'")
        if wanted == "0" or not any((ROOT / "csrc/cuda").glob("*.cu")):
            return None
        archs = re.split(r"[;, ]+", os.environ.get("SACCADE_CUDA_ARCHS", "80;90a").strip("; "))
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        for nvcc in filter(None, [os.environ.get("NVCC"), f"{home}/bin/nvcc", shutil.which("nvcc")]):
            if run(nvcc, "--version").returncode == 0:
                return cls(nvcc, archs)
        if wanted == "1":
            raise SystemExit("saccade: SACCADE_CUDA=1, but no nvcc runs (set NVCC or CUDA_HOME)")
        return None

    def archs_of(self, source: Path) -> list[str]:
        """Architectures a file is compiled for; none when its own is not among those asked for."""
        return [arch for arch in self.archs if arch == "90a"] if source.stem.endswith("_sm90") else self.archs

    def flags(self, archs: list[str]) -> list[str]:
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        if portable := [arch for arch in archs if arch.isdigit()]:
            # PTX of the oldest: later processors compile it when they load it.
            oldest = min(portable, key=int)
            codes.append(f"-gencode=arch=compute_{oldest},code=compute_{oldest}")
        host = [f"-ccbin={CXX.split()[-1]}", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
        return [*"-std=c++17 -O3 -DNDEBUG -Icsrc -cudart=static".split(), *host, *codes]

    def link_flags(self) -> list[str]:
        roots = [self.root, Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
        folders = ("lib*", f"targets/{platform.machine()}*/lib")
        found = [path for r in roots for f in folders for path in r.glob(f"{f}/libcudart_static.a")]
        if not found:
            raise SystemExit(
                f"saccade: no libcudart_static.a in {' or '.join(map(str, roots))} (set CUDA_HOME)"
            )
        return [str(found[0]), "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it in the project's folder, with relative paths only."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Editable installs hand out a temporary folder; a constant one makes an unchanged rebuild free.
        self.build_temp = f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

    def get_ext_filename(self, fullname: str) -> str:
        # Called with the whole name and with its last part.
        if fullname.endswith("libsaccade_ops"):
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        os.chdir(ROOT)
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two installs from one checkout share this folder
            built = write_ninja(folder, {extension.name for extension in self.extensions})
            ninja = [find_ninja(), "-f", str(folder / "build.ninja")]
            jobs = os.environ.get("MAX_JOBS")
            if subprocess.run([*ninja, *(["-j", jobs] if jobs else [])], stdout=sys.stderr).returncode:
                raise SystemExit("saccade: the build failed; the compiler's message stands above")
            subprocess.run([*ninja, "-t", "cleandead"], check=True, stdout=subprocess.DEVNULL)
            for extension in self.extensions:
                target = self.get_ext_fullpath(extension.name)
                self.mkpath(os.path.dirname(target))
                self.copy_file(str(built[extension.name]), target)


def find_ninja() -> str:
    import ninja

    return os.path.join(ninja.BIN_DIR, "ninja")


def torch_paths() -> tuple[list[str], str]:
    """Include folders and library folder of the torch that is installed."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(f"saccade: torch must be installed before saccade is built ({error})") from None
    return cpp_extension.include_paths(), cpp_extension.library_paths()[0]


def include_flags(folders: list[str], label: str) -> list[str]:
    """Headers of others: no warnings from them, and no path of this machine in __FILE__."""
    return [flag for f in folders for flag in ("-isystem", f, f"-ffile-prefix-map={f}={label}")]


class Plan:
    """The ninja file being written, and the objects of each of the two files it makes."""

    def __init__(self, writer, folder: Path) -> None:
        self.writer, self.folder = writer, folder
        self.objects: dict[str, list[str]] = {OPS: [], MODULE: []}

    def compile(self, source: Path, flags: list[str], owner: str = OPS, label: str = "") -> None:
        name = "_".join(source.relative_to("csrc").with_suffix("").parts) + label
        output = f"{self.folder}/{name}.o"
        rule = "nvcc" if source.suffix == ".cu" else "cxx"
        self.writer.build(output, rule, str(source), variables={"flags": shlex.join(flags)})
        self.objects[owner].append(output)

    def link(self, owner: str, flags: list[str]) -> Path:
        library = self.folder / f"{owner.split('.')[-1]}.so"
        self.writer.build(str(library), "link", self.objects[owner], variables={"flags": shlex.join(flags)})
        return library


def write_ninja(folder: Path, wanted: set[str]) -> dict[str, Path]:
    """Write folder/build.ninja for the wanted extensions; returns the file each becomes."""
    from ninja import ninja_syntax

    cuda = Cuda.find()
    bodies: Bodies = {
        end: {isa: flags for isa, flags in sets.items() if not flags or (X86 and compiles(flags))}
        for end, sets in BODY_SETS.items()
        if any(Path("csrc/cpu").glob(f"*{end}.cpp"))
    }
    compiled = sorted({isa for sets in bodies.values() for isa in sets} - {"portable"})
    compiled += [end.removeprefix("_") for end in bodies]
    version = f"0x{TORCH_TARGET[0] << 8 | TORCH_TARGET[1]:04x}000000000000ULL"
    defines = [f"-DTORCH_TARGET_VERSION={version}", f"-DSACCADE_WITH_CUDA={int(cuda is not None)}"]
    defines += [f"-DSACCADE_HAS_{isa.upper()}=1" for isa in compiled]
    if cuda and "90a" in cuda.archs:
        defines.append("-DSACCADE_HAS_SM90=1")
    flags = [*CXXFLAGS, *defines]
    facts = [f'-DSACCADE_CUDA_ARCHS="{" ".join(cuda.archs) if cuda else ""}"']

    with open(folder / "build.ninja", "w") as file:
        writer = ninja_syntax.Writer(file, width=110)
        writer.variable("builddir", str(folder))
        for rule, compiler in [("cxx", CXX), *([("nvcc", cuda.nvcc)] if cuda else [])]:
            command = f"{compiler} -MMD -MF $out.d $flags -c $in -o $out"
            writer.rule(rule, command, depfile="$out.d", deps="gcc", description=f"{rule} $out")
        writer.rule("link", f"{CXX} -shared $in $flags -o $out", description="link $out")
        plan, built = Plan(writer, folder), {}
        if OPS in wanted:
            plan_operators(plan, (flags, facts), bodies, cuda)
            built[OPS] = plan.link(OPS, operator_link_flags(cuda))
        if MODULE in wanted:
            import pybind11

            python = [pybind11.get_include(), sysconfig.get_path("include")]
            plan.compile(Path("csrc/module.cpp"), flags + facts + include_flags(python, "python"), MODULE)
            built[MODULE] = plan.link(MODULE, ["-undefined", "dynamic_lookup"] if MACOS else [])
    return built


def plan_operators(
    plan: Plan, flags_and_facts: tuple[list[str], list[str]], bodies: Bodies, cuda: Cuda | None
) -> None:
    """Every object of the operator library."""
    flags, facts = flags_and_facts
    defines = [flag for flag in flags if flag.startswith("-D")]
    torch = ["-DTORCH_STABLE_ONLY", *include_flags(torch_paths()[0], "torch")]
    plan.compile(Path("csrc/ops.cpp"), [*flags, *facts, *torch])
    if cuda:
        plan.compile(Path("csrc/cuda_ops.cpp"), [*flags, *torch])
    sources = sorted([*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")])
    per_set = {
        source: sets for source in sources for end, sets in bodies.items() if source.stem.endswith(end)
    }
    # Baseline objects come first on the link line: of a symbol defined twice the linker keeps the first.
    for source in sources:
        if source not in per_set and source.name not in ("ops.cpp", "cuda_ops.cpp", "module.cpp"):
            plan.compile(source, flags)
    for source, sets in per_set.items():
        for isa, isa_flags in sets.items():
            names = [f"-DSACCADE_ISA={isa}", f"-DSACCADE_ISA_{isa.upper()}=1"]
            plan.compile(source, [*flags, *isa_flags, *names], label=f".{isa}")
    for source in sorted(Path("csrc/cuda").glob("*.cu")) if cuda else []:
        if archs := cuda.archs_of(source):
            plan.compile(source, [*cuda.flags(archs), *defines])


def operator_link_flags(cuda: Cuda | None) -> list[str]:
    if MACOS:
        return ["-undefined", "dynamic_lookup"]  # torch is in the process before the library is loaded
    # libtorch.so stands for libtorch_cpu and, in a CUDA build of torch, for libtorch_cuda, where a weak
    # reference of ours finds the current stream: keep it, although nothing is taken from it here.
    torch = [f"-L{torch_paths()[1]}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
    return ["-Wl,-soname,libsaccade_ops.so", "-Wl,-z,defs", *torch, *(cuda.link_flags() if cuda else [])]


os.chdir(ROOT)
package_names, package_folders = packages()
setup(
    packages=package_names,
    package_dir=package_folders,
    package_data={"saccade": ["py.typed", "*.pyi"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
