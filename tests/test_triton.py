"""What is particular to the Triton backend: tile shapes, cut rows, tuning, operators under torch's tools."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import saccade
import torch
from saccade.testing import Shape, check_attention, derivatives, make_inputs, poisoned

if "triton" not in saccade.backends() or not saccade.ops_triton.INTERPRETED:
    pytest.skip("triton is not installed, or not interpreted", allow_module_level=True)

from saccade.kernels import config, edges, tune
from saccade.kernels.config import Config
from saccade.kernels.mask import UNBOUNDED


def small(rows: int, keys: int, width: int = 16) -> dict[str, Config]:
    return {name: Config(rows, keys, width, 4, 1) for name in config.PASSES}


@pytest.mark.parametrize("shape", [(16, 32), (32, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("mask", ["causal", "window", "lengths"])
def test_tile_shapes_change_nothing(shape: tuple[int, int], mask: str) -> None:
    masks = {
        "causal": saccade.Causal(),
        "window": saccade.Window(9, 4),
        "lengths": saccade.KeyPadding(torch.tensor([50])),
    }
    inputs = make_inputs(Shape(1, 2, 1, 53, 70, 16, 16), torch.float32)
    with config.override(small(*shape)):
        check_attention(inputs, masks[mask], "triton", return_lse=True)


@pytest.mark.parametrize("score", ["dot", "gatv2"])
def test_wide_heads_are_split_into_blocks(score: str) -> None:
    shape = Shape(1, 2, 1, 9, 17, 40, 50)
    options: dict[str, Any] = {}
    if score == "gatv2":
        options["score"] = saccade.GATv2(torch.randn(2, 40).requires_grad_(), 0.2)
    with config.override(small(16, 16, 16)):
        check_attention(make_inputs(shape, torch.float32), saccade.Causal(), "triton", **options)


TIGHT: dict[str, Any] = {  # what leaves the passes of wide heads too few registers for several loops
    "bias": {"bias": (2, 2, 35, 41), "dropout_p": 0.2, "seed": 3},
    "bias alone": {"bias": (1, 2, 1, 41), "scale": 0.2},
    "distance": {"position": 2, "dropout_p": 0.2, "seed": 3},
    "sigmoid": {"activation": "sigmoid"},
    "chunks": {},
    "lengths": {},
}


@pytest.mark.parametrize("case", TIGHT)
def test_one_loop_serves_all_tiles(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles and those at the ends of a window, where all columns of a wide head are held."""
    from saccade.kernels.call import Call

    tight: set[str] = set()
    find = Call.is_tight

    def spy(self: Call, name: str) -> bool:
        tight.update([name] if find(self, name) else [])
        return find(self, name)

    monkeypatch.setattr(Call, "is_tight", spy)
    options = dict(TIGHT[case])
    if "bias" in options:
        options["bias"] = torch.randn(options["bias"]).requires_grad_()
    if "position" in options:
        options["position"] = saccade.ALiBi(torch.randn(2).requires_grad_())
    more = {
        "chunks": saccade.Chunks(12, 1, align="end"),
        "lengths": saccade.KeyPadding(torch.tensor([41, 29])),
    }
    mask: Any = saccade.Window(21, 3)
    mask = mask & more[case] if case in more else mask
    inputs = make_inputs(Shape(2, 2, 1, 35, 41, 72, 72), torch.float32)
    with config.override(small(16, 16, 128)):
        check_attention(inputs, mask, "triton", **options)
    wanted = {"bias": {"backward_q", "backward_kv"}, "bias alone": set(config.PASSES[:3])}
    assert tight >= wanted.get(case, {"backward_kv"})


def test_one_loop_serves_scores_that_are_no_product() -> None:
    weight = torch.randn(1, 72).requires_grad_()
    tensors = [*make_inputs(Shape(1, 1, 1, 35, 41, 72, 72), torch.float64)]
    options: dict[str, Any] = {"score": saccade.GATv2(weight), "mask": saccade.Window(21, 3)}
    found = []
    with config.override(small(16, 16, 128)):
        for backend in ("triton", "reference"):
            out = saccade.attention(*tensors, backend=backend, **options)
            found.append(derivatives(out, [*tensors, weight]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_tiles_outside_a_band_are_not_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    from saccade.kernels import forward

    visited: list[tuple[int, bool]] = []
    run = forward.attend_tile.fn

    def spy(*args: Any) -> Any:
        visited.append((int(args[13]), bool(args[-2])))
        return forward.attend_tile.rewrite()(*args)

    monkeypatch.setattr(type(forward.attend_tile), "__call__", _calling(forward.attend_tile, spy))
    q, k, v = (torch.randn(1, 1, 128, 16) for _ in range(3))
    with config.override(small(16, 16)):
        saccade.attention(q, k, v, window=(32, 0), backend="triton")
    assert run is not None
    blocks = 8
    assert len(visited) == sum(min(m, 2) + 1 for m in range(blocks))
    whole = [checked for _, checked in visited if not checked]
    assert len(whole) == sum(1 for m in range(blocks) if m >= 1)  # of the three, only the middle one


def _calling(target: Any, spy: Any) -> Any:
    call = type(target).__call__

    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        return spy(*args) if self is target else call(self, *args, **kwargs)

    return replacement


def test_a_hub_is_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from saccade import ops_triton

    monkeypatch.setattr(ops_triton, "ITEM", 4)
    edges = torch.cat([torch.stack([torch.arange(11), torch.zeros(11, dtype=torch.int64)]),
                       torch.tensor([[3, 3, 3, 3, 3], [1, 2, 3, 4, 5]])], 1)  # fmt: skip
    graph = saccade.Graph.from_edge_index(edges, (12, 7))
    *pieces, cut, ends = graph.work(4, False)
    assert cut.tolist() == [0] and ends.tolist() == [0, 3]
    assert sorted((pieces[2] - pieces[1]).tolist()) == [0, 1, 1, 1, 1, 1, 3, 4, 4]
    bias = torch.randn(2, 16).requires_grad_()
    for sink in (None, torch.randn(2).requires_grad_()):
        check_attention(
            make_inputs(Shape(6, 2, 1, 7, 12, 5, 6), torch.float32),
            graph,
            "triton",
            edge_bias=bias,
            sink=sink,
        )


def test_nothing_runs_unasked_on_a_cpu() -> None:
    q = torch.randn(1, 1, 4, 8)
    told = saccade.explain(q, q, q)
    assert told.backend != "triton" and told.reasons["triton"] == [f"can, but {told.backend} comes first"]


def test_operators_hold_their_contracts() -> None:
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (5, 7, 7))
    graph = saccade.Graph.from_dense(torch.rand(5, 7) < 0.5).prepare()
    for mask in (saccade.Causal(), graph):
        fn = torch.compile(
            lambda q, k, v, m=mask: saccade.attention(q, k, v, m, backend="triton"),
            fullgraph=True, backend="aot_eager",
        )  # fmt: skip
        got, want = fn(q, k, v), saccade.attention(q, k, v, mask, backend="reference")
        torch.testing.assert_close(got, want)
        cotangent = torch.randn_like(want)
        for a, b in zip(
            torch.autograd.grad(got, (q, k, v), cotangent), torch.autograd.grad(want, (q, k, v), cotangent),
            strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(a, b)


def test_bands_fit_the_kernels_integers() -> None:
    assert saccade.maskbase.UNBOUNDED > UNBOUNDED
    q = torch.randn(1, 1, 3, 8)
    got = saccade.attention(q, q, q, window=(1 << 40, 0), backend="triton")
    torch.testing.assert_close(got, saccade.attention(q, q, q, causal=True, backend="reference"))


@pytest.mark.parametrize("left", [None, 1, 50331648], ids=str)
def test_chunks_fit_the_kernels_integers(left: int | None) -> None:
    """However many chunks are kept before a query's own: dropout's numbers stay those of every backend."""
    shape = Shape(1, 2, 1, 40, 70, 16, 16)
    mask = saccade.Chunks(64 if left else 16, left, align="end")
    with config.override(small(16, 16)):
        check_attention(make_inputs(shape, torch.float32), mask, "triton", dropout_p=0.3, seed=3)


@pytest.mark.parametrize("rows", [32, 33])
def test_keys_that_a_bias_hides_reach_nothing(rows: int) -> None:
    """NaN and infinities there, beside rows that lie beyond the last query too."""
    q, k, v = make_inputs(Shape(1, 2, 1, rows, 40, 16, 16), torch.float32)
    hidden = torch.zeros(1, 1, 40, dtype=torch.bool)
    hidden[..., 20:28] = True
    bias = torch.where(hidden[:, :, None], -torch.inf, 0.0)
    for mask in (None, saccade.Causal()):
        found = []
        with config.override(small(16, 16)):
            for inputs in ((q, k, v), (q, poisoned(k, hidden), poisoned(v, hidden))):
                out = saccade.attention(*inputs, mask, bias=bias, backend="triton")
                found.append([out, *derivatives(out, inputs)])
        for clean, got in zip(*found, strict=True):
            assert torch.equal(clean, got)


def test_tuning_keeps_the_fastest_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path))
    monkeypatch.setattr(config, "this_gpu", lambda: ("Some GPU (80 GB)", "sm90"))
    monkeypatch.setattr(config, "TABLE", dict(config.TABLE))

    def time(name: str, dtype: torch.dtype, dim: int, kind: str) -> float:
        shape = config.pick(name, "sm90", 2, dim, kind)
        return abs(shape.block_m - 32) + abs(shape.block_n - 64) + shape.num_warps + shape.num_stages

    best = tune.tune([64], [2], time, say=lambda line: None, check=lambda *row: None)
    assert {key[0] for key in best} == set(config.PASSES[:3]) and {key[4] for key in best} == set(
        config.KINDS
    )
    for key, shape in best.items():
        assert (shape.block_m, shape.block_n, shape.num_warps, shape.num_stages) == (32, 64, 4, 1)
        assert "Some GPU" in shape.measured and config.TABLE[key] == shape
    (path,) = (tmp_path / "saccade").iterdir()
    rows = json.loads(path.read_text())
    assert len(rows) == 6
    rows[0]["config"] = {**rows[0]["config"], "num_warps": 16}
    path.write_text(json.dumps(rows))
    config.load(path)
    first = tuple(rows[0]["key"])
    assert config.TABLE[first] == replace(best[first], num_warps=16)


def test_offsets_of_a_gradient_fit_the_kernels() -> None:
    """Inside of a tile they are 32 bits wide, but where q, k or v needs more."""
    from saccade.kernels.call import Call

    def strided(row: int) -> torch.Tensor:
        return torch.empty_strided((1, 1, 2, 8), (0, 0, row, 1), device="meta")

    numbers: list[Any] = [[], [1 << 62] * 4, [], 0, 0, 0, 0, 1.0, 0.0, 0.0, 0.0, 0]
    for row, moved in ((1 << 20, False), (1 << 23, True)):
        call, dout = Call(*[strided(8)] * 3, *[None] * 17, *numbers), strided(row)
        assert (call.near(dout) is not dout) == moved and not call.static().far
        assert Call(dout, *[strided(8)] * 2, *[None] * 17, *numbers).near(dout) is dout


@pytest.mark.parametrize(("setting", "wanted"), [
    ("pass", "ieee"), ("torch.set_float32_matmul_precision('high')", "tf32"),
    ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
    ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
    ("torch.backends.fp32_precision = 'tf32'", "tf32"),
    ("torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'", "ieee"),
])  # fmt: skip
def test_products_of_fp32_are_as_exact_as_torchs(setting: str, wanted: str) -> None:
    """In a process of its own: some settings cannot be undone."""
    program = f"""
import torch
from saccade.kernels.call import Call
{setting}
q = torch.empty(1, 1, 4, 16)
numbers = [[], [1 << 62] * 4, [], 0, 0, 0, 0, 1.0, 0.0, 0.0, 0.0, 0]
for dtype in (torch.float32, torch.bfloat16):
    x = q.to(dtype)
    print(Call(x, x, x, *[None] * 17, *numbers).static().precision)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [wanted, "ieee"]


def test_every_architecture_has_a_column() -> None:
    assert config.architecture((8, 0)) == "sm80" and config.architecture((9, 0)) == "sm90"
    assert config.architecture((8, 9)) == "sm86" == config.architecture((12, 0))
    assert config.width(1) == 16 and config.width(65) == 128 and config.width(1000) == 256
    assert edges.Items._fields[-1] == "slot"
