"""Builds of csrc/cuda on the host simulator (csrc/cuda/simulator.h), made once and kept in build/sim."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from saccade import ops
from saccade.problem import Spec
from simulated_params import DTYPES, GatherParams, GradParams, Params, pointer, rows, set_lse
from torch import Tensor

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build/sim"
CXX = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-fPIC", "-Icsrc", "-DSACCADE_HAS_SM90=1"]
HEADERS = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/**/*.h"), *ROOT.glob("tests/sim/*.h")]

needs_compiler = pytest.mark.skipif(shutil.which(CXX[0]) is None, reason=f"no C++ compiler '{CXX[0]}'")


def build(name: str, sources: list[Path], *flags: str) -> Path:
    """One file out of many sources; made again only when a source or a header is newer."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    target = FOLDER / name
    with open(FOLDER / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # every test process asks for it
        newest = max(path.stat().st_mtime for path in [*sources, *HEADERS])
        if target.exists() and target.stat().st_mtime > newest:
            return target
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: compile_one(name, source), sources))
        run([*CXX, *flags, *map(str, objects), "-o", str(target)])
    return target


def compile_one(name: str, source: Path) -> Path:
    output = FOLDER / f"{name}.{source.name}.o"
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    run([*CXX, *FLAGS, *language, "-c", str(source.relative_to(ROOT)), "-o", str(output)])
    return output


def build_operators() -> Path:
    """tests/sim/operators.cpp with the kernels."""
    from torch.utils import cpp_extension

    build_kernels()
    objects = sorted(FOLDER.glob("kernels.so.*.o"))
    source, entries = ROOT / "tests/sim/operators.cpp", ROOT / "csrc/cuda_ops.cpp"
    made, target = FOLDER / "operators.o", FOLDER / "operators.so"
    folders = [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
    flags = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", *folders]
    with open(FOLDER / "operators.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(path.stat().st_mtime for path in [source, entries, *HEADERS, *objects])
        if not target.exists() or target.stat().st_mtime < newest:
            run([*CXX, *FLAGS, *flags, "-c", str(source), "-o", str(made)])
            libraries = [f"-L{cpp_extension.library_paths()[0]}", "-ltorch_cpu"]
            run([*CXX, "-shared", str(made), *map(str, objects), *libraries, "-o", str(target)])
    return target


def build_kernels() -> Path:
    sources = [*sorted(ROOT.glob("csrc/cuda/*.cu")), ROOT / "tests/sim/bridge.cpp"]
    return build("kernels.so", sources, "-shared")


def run(command: list[str]) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr}"


# ---- the kernels of csrc/cuda as operators on CPU tensors ----


class Simulated:
    """The CUDA kernels of one architecture, in the form in which saccade.autograd.attend takes operators."""

    def __init__(self, arch: int, seed: int = 0, deterministic: bool = True) -> None:
        self.arch, self.seed, self.deterministic = arch, seed, deterministic
        self.device = arch  # simulated devices are numbered by what they can do
        self.library = ctypes.CDLL(str(build_kernels()))
        self.library.saccade_sim_size.restype = ctypes.c_int64
        for which, structure in enumerate((Params, GradParams, GatherParams)):
            assert self.library.saccade_sim_size(which) == ctypes.sizeof(structure), structure.__name__

    def share(self, *tensors: Tensor | None) -> None:
        """Only what the tensors hold may be read and written."""
        for t in tensors:
            if t is not None and t.numel():
                last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                size = ctypes.c_int64((last + 1) * t.element_size())
                self.library.saccade_sim_share(ctypes.c_void_p(t.data_ptr()), size)

    def call(self, name: str, p: Params, seed: Tensor | None, *more: Any) -> None:
        launcher = getattr(self.library, name)
        launcher.restype = ctypes.c_char_p
        self.library.saccade_sim_seed(ctypes.c_uint64(self.seed))
        error = launcher(ctypes.byref(p), ctypes.c_void_p(pointer(seed)), *more, self.device, None)
        self.library.saccade_sim_forget()
        if error:
            raise RuntimeError(error.decode())

    def workspace(self, size_of: Any, p: Params, *more: Any) -> ctypes.c_void_p:
        """What a launcher asks for, full of NaN. It lives until the next call asks."""
        size_of.restype = ctypes.c_int64
        size = size_of(ctypes.byref(p), *more)
        memory = torch.full((size // 4 + 4,), torch.nan)
        self.memory = memory[-memory.data_ptr() % 16 // 4 :][: size // 4]
        self.share(self.memory)
        return ctypes.c_void_p(self.memory.data_ptr())

    def fill(self, p: Params, spec: Spec, tensors: Sequence[Tensor | None]) -> None:
        q, k, v, bias, rel_bias, _, sink, *_ = tensors
        assert q is not None and k is not None and v is not None
        for name in ("batch", "heads", "heads_k", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v"):
            setattr(p, name, getattr(spec, name))
        p.q, p.k, p.v = map(rows, (q, k, v))
        if bias is not None:
            p.bias, p.bias_dtype = bias.data_ptr(), DTYPES[bias.dtype]
            strides = [0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True)]
            p.bias_stride = (ctypes.c_int64 * 4)(*strides)
        if rel_bias is not None:
            p.rel_bias, p.rel_size, p.rel_center = rel_bias.data_ptr(), rel_bias.shape[-1], spec.seqlen_k - 1
            p.rel_row = 0 if rel_bias.dim() == 2 else p.rel_size
        p.sink = pointer(sink)
        at, args, mask = spec.layout, spec.args, p.mask
        p.cu_seqlens_q, p.cu_seqlens_k = pointer(at.cu_seqlens_q), pointer(at.cu_seqlens_k)
        p.seqused_k, p.page_table, p.beam = map(pointer, (at.seqused_k, at.page_table, at.beam))
        if at.page_table is not None:
            p.page_table_batch, p.page_size = at.page_table.stride(0), k.shape[2]
        if at.beam is not None:
            p.beam_batch = at.beam.stride(0)
        mask.band = (ctypes.c_int64 * 4)(*args.band)
        self.chunks = (ctypes.c_int64 * len(args.chunks))(*args.chunks)  # lives as long as the call
        mask.chunks, mask.num_chunks = ctypes.addressof(self.chunks), len(args.chunks) // 2
        for name in ("head_bounds", "lengths", "keep", "q_ids", "k_ids"):
            setattr(mask, name, pointer(getattr(args, name)))
        for name in ("keep", "q_ids", "k_ids"):
            tensor = getattr(args, name)
            setattr(mask, f"{name}_batch", 0 if tensor is None else tensor.stride(0))
        for name in ("score", "activation", "scale", "softcap", "slope", "dropout_p"):
            setattr(p, name, getattr(spec, name))
        ids = (args.head_bounds, args.lengths, args.keep, args.q_ids, args.k_ids)
        self.share(q, k, v, bias, rel_bias, sink, *ids, at.cu_seqlens_q, at.cu_seqlens_k)
        self.share(at.seqused_k, at.page_table, at.beam)

    def forward(
        self, spec: Spec, tensors: tuple[Tensor | None, ...], seed: Tensor | None, body: int
    ) -> tuple[Tensor, Tensor]:
        q, k, v, bias, *rest = ops.taken_tensors(tensors)
        assert q is not None and k is not None and v is not None
        packed = spec.layout.is_varlen
        out = torch.full((*q.shape[:-1], v.shape[-1]), torch.nan, dtype=q.dtype)
        shape = (q.shape[1], q.shape[0]) if packed else q.shape[:-1]
        lse = torch.full(shape, torch.nan, dtype=torch.float64)
        p = Params()
        self.fill(p, spec, (q, k, v, ops.expanded_bias(spec, bias), *rest))
        p.out = rows(out)
        set_lse(p, lse)
        self.share(out, lse, seed)
        if body == ops.DECODE:
            place = self.workspace(self.library.saccade_cuda_decode_workspace, p)
            self.call("saccade_cuda_decode", p, seed, place)
            return out, lse
        totals = [ctypes.c_int64(x.shape[0]) for x in (q, k)]
        self.call(f"saccade_cuda_forward_sm{self.arch}", p, seed, *totals)
        return out, lse

    def backward(
        self,
        spec: Spec,
        grads: tuple[Tensor | None, ...],
        tensors: tuple[Tensor | None, ...],
        seed: Tensor | None,
        body_and_needs: tuple[int, int],
    ) -> tuple[Tensor, ...]:
        dout, dlse, out, lse = grads
        q, k, v, bias, *rest = ops.backward_tensors(spec, tensors)
        assert dout is not None and out is not None and lse is not None
        assert q is not None and k is not None and v is not None
        p, needs = GradParams(), body_and_needs[1]
        self.fill(p, spec, (q, k, v, bias, *rest))
        p.dout, p.out, p.needs = rows(dout), rows(out), needs
        set_lse(p, lse)
        dlse = None if dlse is None else dlse.contiguous()
        p.dlse = pointer(dlse)
        found = [torch.empty(0, dtype=q.dtype)] * 3 + [torch.empty(0)] * 5
        for bit, (name, x) in enumerate((("dq", q), ("dk", k), ("dv", v))):
            if needs & (1 << bit):
                found[bit] = torch.full_like(x, torch.nan)
                setattr(p, name, rows(found[bit]))
        if needs & 8:
            assert bias is not None
            sizes = [1 if s == 0 else n for n, s in zip(bias.shape, bias.stride(), strict=True)]
            found[3] = torch.full(sizes, torch.nan)
            p.dbias, p.dbias_size = found[3].data_ptr(), (ctypes.c_int64 * 4)(*sizes)
        self.share(dout, dlse, out, lse, seed, *found)
        count = ctypes.c_int64(lse.numel())
        mode = (ctypes.c_int(self.deterministic), ctypes.c_int(self.device))
        place = [self.workspace(self.library.saccade_cuda_backward_workspace, p, count, *mode), count]
        place.append(ctypes.c_int64(k.shape[0]))
        if self.arch == 90:
            place.append(ctypes.c_int(self.deterministic))
        self.call(f"saccade_cuda_backward_sm{self.arch}", p, seed, *place)
        return tuple(found)

    def gather_forward(
        self,
        spec: Spec,
        tensors: tuple[Tensor | None, ...],
        edge_terms: tuple[Tensor | None, ...],
        seed: Tensor | None,
        order: tuple[int, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, v = tensors[0], tensors[2]
        assert q is not None and v is not None
        out = torch.full((*q.shape[:-1], v.shape[-1]), torch.nan, dtype=q.dtype)
        lse = torch.full(q.shape[:-1], torch.nan, dtype=torch.float64)
        p = self.graph(spec, tensors, edge_terms)
        p.out = rows(out)
        set_lse(p, lse)
        self.share(out, lse, seed)
        place = self.workspace(self.library.saccade_cuda_gather_forward_workspace, p)
        self.call("saccade_cuda_gather_forward", p, seed, place)
        return out, lse, q.new_empty(0)

    def gather_backward(
        self,
        spec: Spec,
        heads: tuple[Tensor | None, ...],
        tensors: tuple[Tensor | None, ...],
        edge_terms: tuple[Tensor | None, ...],
        seed: Tensor | None,
        needs: int,
    ) -> tuple[Tensor, ...]:
        dout, dlse, _, out, lse, _ = heads
        assert dout is not None and out is not None and lse is not None and spec.args.graph is not None
        p = self.graph(spec, tensors, edge_terms)
        p.dout, p.out, p.needs = rows(dout), rows(out), needs
        set_lse(p, lse)
        dlse = None if dlse is None else dlse.contiguous()
        p.dlse = pointer(dlse)
        columns = spec.args.graph.columns()
        p.t_indptr, p.t_rows, p.t_edges = map(pointer, columns)
        found = [torch.empty(0) for _ in range(7)]
        for bit, (name, x) in enumerate(zip(("dq", "dk", "dv"), tensors, strict=False)):
            if needs & (1 << bit):
                assert x is not None
                found[bit] = torch.full_like(x, torch.nan)
                setattr(p, name, rows(found[bit]))
        if needs & 256:
            assert edge_terms[0] is not None
            left_out = p.edges < p.num_edges
            found[4] = torch.full_like(edge_terms[0], 0.0 if left_out else torch.nan, dtype=torch.float32)
            p.dedge_bias = found[4].data_ptr()
        self.share(dout, dlse, out, lse, seed, *columns, *found)
        place = self.workspace(self.library.saccade_cuda_gather_backward_workspace, p)
        self.call("saccade_cuda_gather_backward", p, seed, place)
        return tuple(found)

    def graph(
        self, spec: Spec, tensors: tuple[Tensor | None, ...], edge_terms: tuple[Tensor | None, ...]
    ) -> GatherParams:
        """A call's tensors and the edges of its graph."""
        p, graph, (edge_bias, _, features) = GatherParams(), spec.args.graph, edge_terms
        assert graph is not None
        self.fill(p, spec, tensors)
        p.indptr, p.indices, p.edge_ids = map(pointer, (graph.indptr, graph.indices, graph.edge_ids))
        p.edges, p.num_edges = graph.indices.numel(), graph.num_edges
        p.edge_bias = pointer(edge_bias)
        p.edge_bias_head = 0 if edge_bias is None or edge_bias.shape[0] == 1 else edge_bias.stride(0)
        p.edge_dim = 0 if features is None else features.shape[1]
        self.share(graph.indptr, graph.indices, graph.edge_ids, edge_bias)
        return p
