"""The machine code of the CUDA kernels: the instructions meant are there, nothing spills, everything fits."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT = ROOT / f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
SOURCES = sorted(path for path in ROOT.glob("csrc/cuda/*.cu") if path.stem not in ("refuse", "choose"))
NEWEST = max(path.stat().st_mtime for path in [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.h"), *SOURCES])

# By kernel: the instructions it is written for.
MATRIX_80 = ("HMMA.16816.F32", "LDGSTS", "LDSM.16.M88.4", "LDSM.16.MT88.4")
MATRIX_90 = ("HGMMA", "UTMALDG.4D", "USETMAXREG", "WARPGROUP.DEPBAR", "SYNCS.PHASECHK")
WANTED = {
    "forward_sm80": MATRIX_80,
    "forward_sm90": (*MATRIX_90, "UTMASTG.4D"),
    "6decodeI(6__half|13__nv_bfloat16)": (*MATRIX_80, "LDGSTS.E.BYPASS.128"),
    "6decodeIf": ("FFMA", "LDGSTS.E.BYPASS.128"),
    "decode_merge|gather_(forward|merge|rows|sum|backward_queries|backward_keys)": ("LDG.E.128",),
    "backward_keys_sm80": MATRIX_80,
    "backward_queries_sm80": MATRIX_80,
    "backward_bias_sm80": MATRIX_80[:3],
    "backward_sm90": (*MATRIX_90, "UBLKCP"),
    "13backward_sm90.*Lb1": ("UBLKRED",),  # the mode that adds dQ up
    # Sums of all columns in a warpgroup, and weights handed over.
    "13backward_sm90.*ILi256": ("HGMMA.64x256x16", "HGMMA.64x64x16", "BAR.ARV"),
    "13backward_sm90.*ILi256ELb1": ("HGMMA.64x128x16",),
}


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidates = [os.environ.get("NVCC"), f"{home}/bin/nvcc", shutil.which("nvcc")]
    return next((path for path in candidates if path and shutil.which(path)), None)


def tool(name: str) -> str | None:
    """cuobjdump and nvdisasm come with the CUDA toolkit, or else with Triton."""
    try:
        import triton.backends.nvidia as nvidia

        folders = [str(Path(nvidia.__file__).parent / "bin")]
    except ImportError:
        folders = []
    compiler = nvcc()
    folders += [str(Path(compiler).parent)] if compiler else []
    return next(
        (found for folder in folders if (found := shutil.which(name, path=folder))), shutil.which(name)
    )


pytestmark = [
    pytest.mark.skipif(nvcc() is None, reason="no nvcc"),
    pytest.mark.skipif(
        tool("cuobjdump") is None or tool("nvdisasm") is None, reason="no cuobjdump and nvdisasm"
    ),
]


@dataclass
class Kernel:
    arch: str
    name: str
    registers: int
    stack: int
    local: int
    instructions: dict[str, int] = field(default_factory=dict)
    listing: list[tuple[int, str]] = field(default_factory=list)  # address, text

    def count(self, start: str) -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(start))


def run(*command: str) -> str:
    path = os.pathsep.join([str(Path(tool("nvdisasm") or "").parent), os.environ["PATH"]])
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    # What ptxas says of wgmma: that it serialises products, or puts in waits of its own.
    assert not re.search(r"\(C75\d\d\)", result.stderr), result.stderr
    return result.stdout


def compiled(source: Path, folder: Path) -> Path:
    """What the build made, or the file compiled for the architecture it is written for."""
    made = BUILT / f"cuda_{source.stem}.o"
    if made.exists() and made.stat().st_mtime > NEWEST:
        return made
    arch = "90a" if source.stem.endswith("_sm90") else "80"
    target = folder / f"{source.stem}.o"
    flags = ["-std=c++17", "-O3", "-DNDEBUG", "-Icsrc", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    run(nvcc() or "", *flags, "-c", str(source.relative_to(ROOT)), "-o", str(target))
    return target


def kernels_of(library: Path) -> list[Kernel]:
    dump, found, arch = tool("cuobjdump") or "", {}, ""
    for line in run(dump, "-res-usage", str(library)).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            registers, stack, local = map(int, match.groups())
            found[arch, name] = Kernel(arch, name, registers, stack, local)
    for line in run(dump, "-sass", str(library)).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            kernel = found[arch, match[1]]
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?([A-Z][\w.]*).*?);", line):
            kernel.instructions[match[3]] = kernel.instructions.get(match[3], 0) + 1
            kernel.listing.append((int(match[1], 16), match[2].strip()))
    return list(found.values())


@pytest.fixture(scope="module", params=SOURCES, ids=lambda path: path.stem)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    found = kernels_of(compiled(request.param, tmp_path_factory.mktemp("cuda")))
    assert found, f"no kernel in {request.param.name}"
    return found


def test_nothing_spills(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert (kernel.stack, kernel.local) == (0, 0), kernel.name
        assert not kernel.count("STL") and not kernel.count("LDL"), kernel.name
        assert kernel.registers <= 255, kernel.name


def test_instructions(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        for start in (
            start for name, wanted in WANTED.items() if re.search(name, kernel.name) for start in wanted
        ):
            assert kernel.count(start), f"{kernel.name} for {kernel.arch} has no {start}"


def test_single_precision_is_exact(kernels: list[Kernel]) -> None:
    """Matrix instructions would round fp32 to TF32."""
    for kernel in kernels:
        if re.search("decodeIf|gather.*If", kernel.name):
            assert not kernel.count("HMMA"), kernel.name


def test_products_run_asynchronously(kernels: list[Kernel]) -> None:
    """Where ptxas finds a hazard it waits after every wgmma: then there are as many waits as products."""
    for kernel in kernels:
        if products := kernel.count("HGMMA"):
            assert kernel.count("WARPGROUP.DEPBAR") * 2 < products, kernel.name


def test_exponentials_run_while_products_do(kernels: list[Kernel]) -> None:
    """ptxas likes to move the wait for a product ahead of the arithmetic that was to fill it (settle)."""
    for kernel in kernels:
        waits = [i for i, (_, text) in enumerate(kernel.listing) if text.startswith("WARPGROUP.DEPBAR")]
        for first, last in pairwise(waits):
            if "0x1" not in kernel.listing[first][1] or "0x0" not in kernel.listing[last][1]:
                continue  # not the wait for all products behind one for all but the last
            after = (text for _, text in kernel.listing[last:])
            block = [*takewhile(lambda text: "BRA " not in text, after)]
            assert not any("MUFU.EX2" in text for text in block), f"{kernel.name}, {kernel.listing[last]}"


def reached(kernel: Kernel, start: int) -> set[int]:
    """Instructions that run behind instruction `start`."""
    at = {address: i for i, (address, _) in enumerate(kernel.listing)}
    found: set[int] = set()
    todo = [start + 1]
    while todo:
        i = todo.pop()
        if i in found or i >= len(kernel.listing):
            continue
        found.add(i)
        text = kernel.listing[i][1]
        if target := re.search(r"\b(?:BRA|CALL)\b.* (0x[0-9a-f]+)", text):
            todo.append(at[int(target[1], 16)])
        ends = re.match(r"(BRA|EXIT|RET)\b(?!.*U?P\d)(?!\.DIV)", text)
        todo += [] if ends else [i + 1]
    return found


def last_register(text: str) -> int:
    sums = re.search(r"HGMMA\.64x(\d+)x16\S* R(\d+)", text)
    named = [int(n) for n in re.findall(r"(?<![\w.])R(\d+)", text)]
    return max([*named, int(sums[2]) + int(sums[1]) // 2 - 1 if sums else 0], default=0)


def test_registers_that_were_handed_on_are_not_used(kernels: list[Kernel]) -> None:
    """Behind each setmaxnreg, subroutines included."""
    for kernel in kernels:
        for i, (_, text) in enumerate(kernel.listing):
            if "USETMAXREG" not in text:
                continue
            held = int(text.split()[-1], 16)
            used = max(last_register(kernel.listing[n][1]) for n in reached(kernel, i))
            assert used < held, f"{kernel.name}: R{used} behind {text}"


def test_nothing_is_added_atomically(kernels: list[Kernel]) -> None:
    """The bodies whose results repeat bitwise in every mode."""
    for kernel in kernels:
        if re.search("decode|gather", kernel.name):
            assert not kernel.count("ATOM") and not kernel.count("RED."), kernel.name
