"""Small calls for the PTX emulator: one or two tiles each way, every kernel, arguments of interest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import test_cuda_tiled
import torch
from saccade import ALiBi, Causal, Chunks, GATv2, Graph, KeyPadding, Segments, Window
from saccade.ops import DECODE, GATHER, TILED
from saccade.testing import Shape, make_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass
class Case:
    shape: Shape
    dtype: torch.dtype = BF16
    mask: Any = None
    body: int = TILED
    gradients: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    arch: int = 80  # 90: Hopper's; -90: those whose dQ repeats bitwise


def run(case: Case, kernels: Callable[..., Any], seed: int = 0) -> None:
    """Output, lse and gradients of operators against the error of plain PyTorch."""
    arch = case.arch
    torch.manual_seed(0)
    inputs = make_inputs(case.shape, case.dtype)
    with mock.patch.object(test_cuda_tiled, "Simulated", kernels):
        if case.gradients:
            test_cuda_tiled.check_gradients(inputs, case.mask, arch, seed, case.body, **case.options)
        else:
            test_cuda_tiled.check(arch, inputs, case.mask, seed, case.body, **case.options)


def drawn(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(3))


def graph(keys: int, queries: int, edges: int) -> Graph:
    draw = torch.Generator().manual_seed(4)
    ends = [torch.randint(0, n, (edges,), generator=draw) for n in (keys, queries)]
    return Graph.from_edge_index(torch.stack(ends), (keys, queries))


def edge_case(dtype: torch.dtype, dim: int, gradients: bool) -> Case:
    edges = graph(23, 19, 70)
    options = {"edge_bias": drawn(2, edges.num_edges).requires_grad_(gradients), "dropout_p": 0.2, "seed": 5}
    return Case(Shape(1, 2, 1, 19, 23, dim, dim), dtype, edges, GATHER, gradients, options)


def bias_case(n: int, m: int, dim: int, gradients: bool) -> Case:
    options = {"bias": drawn(1, 1, n, m).requires_grad_(gradients), "softcap": 4.0}
    return Case(Shape(1, 2, 1, n, m, dim, dim), BF16, Causal(), TILED, gradients, options)


def heads(n: int, m: int, dim: int) -> Shape:
    """Two query heads of one key head."""
    return Shape(1, 2, 1, n, m, dim, dim)


def one(n: int, m: int, dim: int) -> Shape:
    return Shape(1, 1, 1, n, m, dim, dim)


LENGTHS = KeyPadding(torch.tensor([61, 0]))
DROPOUT: dict[str, Any] = {"dropout_p": 0.3, "seed": 11}

CUDA = {
    "sm80": Case(heads(70, 90, 64), BF16, Causal()),
    "sm80, 32": Case(one(131, 70, 32), FP16, Window(40, 3)),
    "sm80, 128": Case(one(65, 130, 128), FP16, Causal()),
    "sm80, 256": Case(one(33, 67, 256), BF16, Causal()),
    "sm80, 40": Case(one(33, 40, 40), BF16, Causal()),
    "sm80, any layout": Case(Shape(1, 2, 1, 33, 40, 7, 5), BF16, Causal()),
    "sm80, padding": Case(Shape(2, 1, 1, 33, 70, 64, 64), BF16, LENGTHS),
    "sm80, dropout": Case(one(40, 70, 64), BF16, Causal(), options=DROPOUT),
    "sm80, bias": bias_case(40, 70, 64, False),
    "sm80 backward": Case(heads(70, 90, 64), BF16, Causal(), gradients=True),
    "sm80 backward, 128": Case(one(33, 70, 128), FP16, Window(40, 3), gradients=True),
    "sm80 backward, 256": Case(one(33, 40, 256), BF16, Causal(), gradients=True),
    "sm80 backward, padding": Case(Shape(2, 1, 1, 33, 70, 64, 64), BF16, LENGTHS, gradients=True),
    "sm80 backward, dropout": Case(one(40, 70, 64), BF16, Causal(), TILED, True, DROPOUT),
    "sm80 backward, bias": bias_case(40, 70, 64, True),
    "sm90": Case(heads(200, 150, 64), BF16, Causal(), arch=90),
    "sm90, 128": Case(one(130, 200, 128), FP16, Causal(), arch=90),
    "sm90, 256": Case(one(70, 130, 256), BF16, Window(40, 3), arch=90),
    "sm90, padding": Case(Shape(2, 1, 1, 33, 170, 64, 64), BF16, LENGTHS, arch=90),
    "sm90, softcap": Case(one(70, 90, 64), FP16, Causal(), options={"softcap": 3.0}, arch=90),
    "sm90 backward": Case(heads(130, 150, 64), BF16, Causal(), gradients=True, arch=90),
    "sm90 backward, 128": Case(one(70, 140, 128), FP16, Causal(), gradients=True, arch=90),
    "sm90 backward, 256": Case(one(70, 90, 256), BF16, Causal(), gradients=True, arch=90),
    "sm90 backward, repeatable": Case(one(130, 140, 64), FP16, Window(90, 3), gradients=True, arch=-90),
    "sm90 backward, repeatable, 128": Case(one(70, 140, 128), BF16, Causal(), gradients=True, arch=-90),
    "sm90 backward, repeatable, 256": Case(one(70, 90, 256), FP16, Causal(), gradients=True, arch=-90),
    "sm90 backward, padding": Case(Shape(2, 1, 1, 70, 140, 64, 64), BF16, LENGTHS, gradients=True, arch=90),
    "decode": Case(Shape(1, 4, 1, 1, 530, 64, 64), BF16, Causal(), DECODE),
    "decode, 128": Case(Shape(1, 3, 1, 3, 70, 128, 128), FP16, KeyPadding(torch.tensor([50])), DECODE),
    "decode, single": Case(Shape(1, 2, 1, 2, 300, 32, 32), FP32, Causal(), DECODE),
    "gather": edge_case(BF16, 64, True),
    "gather, single": edge_case(FP32, 32, True),
    "gather, 128": edge_case(FP16, 128, True),
}

KEEP = drawn(1, 70) < 0.5
IDS = [
    torch.sort(torch.randint(0, 3, (1, n), generator=torch.Generator().manual_seed(2))).values
    for n in (33, 70)
]
POSITIONS = {"position": ALiBi(torch.tensor([0.5, -0.1])), "sink": torch.tensor([0.5, -2.0])}
SCORES = {"score": GATv2(torch.linspace(-1, 1, 64).view(2, 32)), "softcap": 2.0}

TRITON = {
    "plain": Case(one(70, 90, 64), BF16, Causal()),
    "wide": Case(one(33, 90, 128), FP16, Window(40, 3), gradients=True),
    "wide, many tiles": Case(heads(140, 150, 128), BF16, Causal(), gradients=True),
    "widest": Case(one(70, 90, 256), BF16, Causal(), gradients=True),
    "single": Case(one(33, 40, 32), FP32, Causal(), gradients=True),
    "gradients": Case(heads(40, 70, 64), BF16, Causal(), gradients=True),
    "padding": Case(Shape(2, 1, 1, 20, 70, 64, 64), BF16, LENGTHS, gradients=True),
    "dropout": Case(one(40, 70, 64), FP16, None, TILED, True, DROPOUT),
    "chunks": Case(one(33, 40, 32), BF16, Chunks(16, align="end"), options=DROPOUT),
    "bias": bias_case(40, 70, 64, True),
    "keep": Case(heads(33, 70, 64), BF16, KeyPadding(KEEP) & Segments(*IDS), gradients=True),
    "positions": Case(heads(33, 70, 64), BF16, Causal(), TILED, True, POSITIONS),
    "scores": Case(heads(20, 33, 32), BF16, Causal(), TILED, True, SCORES),
    "tiles": Case(heads(70, 90, 64), BF16, Graph.from_dense(drawn(70, 90) < -0.5), TILED, True),
    "decode": Case(Shape(1, 4, 1, 1, 530, 64, 64), BF16, Causal(), DECODE),
    "gather": edge_case(BF16, 64, True),
    "gather single": edge_case(FP32, 32, False),
}
