"""Triton's decode body: the heads of a key head share a tile, whatever else a call asks for."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import saccade
import torch
from saccade import ALiBi, Band, Causal, Chunks, KeyPadding, Segments, Window
from saccade.autograd import attend
from saccade.backends import reference
from saccade.ops import DECODE
from saccade.packed import cache_layout
from saccade.problem import Layout, Problem
from saccade.testing import Shape, assert_no_worse_than, make_inputs, pairwise, poisoned, widened
from torch import Tensor

if "triton" not in saccade.backends() or not saccade.ops_triton.INTERPRETED:
    pytest.skip("triton is not installed, or not interpreted", allow_module_level=True)

from saccade import ops_triton
from saccade.kernels import call, config, decode
from saccade.kernels.config import Config

FP32, BF16 = torch.float32, torch.bfloat16
KEYS, PAGE = 80, 20
DRAW = torch.Generator().manual_seed(1)
KEEP = torch.rand(2, KEYS, generator=DRAW) < 0.7
IDS = torch.sort(torch.randint(0, 3, (2, KEYS), generator=DRAW)).values


@pytest.fixture(autouse=True)
def many_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three splits of 80 keys, and at most two merged at a time."""
    monkeypatch.setattr(decode, "_SPLIT_KEYS", 32)
    monkeypatch.setattr(decode, "_MERGED_BYTES", 128)


def mask_of(name: str, heads: int, seqlen_q: int) -> Any:
    ends = torch.arange(heads)
    return {
        "dense": None,
        "causal": Causal(),
        "window": Window(30, 0),
        "per head": Band(ends * 11 % 70, ends % 3 - 1),
        "keep": KeyPadding(KEEP) & Causal(),
        "segments": Segments(IDS[:, -seqlen_q:].clone(), IDS),
    }[name]


def terms_of(name: str, heads: int, dim: int) -> dict[str, Any]:
    numbers = torch.linspace(-1, 1, heads * dim).view(heads, dim)
    found: dict[str, dict[str, Any]] = {
        "plain": {},
        "softcap": {"softcap": 3.0, "scale": -0.3},
        "sink": {"sink": torch.linspace(-2, 4, heads)},
        "softmax1": {"activation": "softmax1"},
        "sigmoid": {"activation": "sigmoid"},
        "dropout": {"dropout_p": 0.3, "seed": 11},
        "alibi": {"position": ALiBi(torch.linspace(0, 0.5, heads))},
        "shaw": {"position": saccade.Shaw(torch.linspace(-1, 1, 9 * dim).view(9, dim))},
        "gatv2": {"score": saccade.GATv2(numbers)},
    }
    return found[name]


def cached(kind: str, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The caches that hold keys and values, and what says where: NaN and absurd numbers where nothing is in
    use.
    """
    batch = k.shape[0]
    unused = torch.arange(KEYS) >= lengths[:, None]
    dirty = [poisoned(x, unused[:, None]).detach() for x in (k, v)]
    if kind == "contiguous":
        return dirty, {}
    if kind == "beam":
        order = torch.rand(batch, KEYS, generator=DRAW).argsort(0)  # a permutation of the rows by column
        at = order[:, None, :, None]
        caches = [torch.full_like(x, torch.nan).scatter_(0, at.expand_as(x), x) for x in dirty]
        return caches, {"beam": order.int().masked_fill(unused, 2147480000)}
    table = torch.randperm(batch * KEYS // PAGE, generator=DRAW).view(batch, -1)
    caches = [torch.empty(table.numel(), x.shape[1], PAGE, x.shape[3], dtype=x.dtype) for x in dirty]
    for cache, x in zip(caches, dirty, strict=True):
        cache[table] = x.unflatten(2, (-1, PAGE)).transpose(1, 2)
    return caches, {"page_table": table.int().masked_fill(unused[:, ::PAGE], 2147480000)}


def check(inputs: Any, mask: Any, layout: Layout | None = None, **options: Any) -> None:
    """Output and lse of the body against the error of plain PyTorch."""
    inputs = tuple(x.detach() for x in inputs)
    options |= {} if layout is None else {"layout": layout}
    problem = Problem.of(*inputs, mask, **options)
    got = attend(problem, DECODE, ops_triton)
    wide = Problem.of(*widened(inputs), mask, **options)
    plain, exact = (reference.weigh(p.spec, p.tensors, p.position, wide=p.q.dtype) for p in (problem, wide))
    for name, *values in zip(("out", "lse"), got, plain[:2], exact[:2], strict=True):
        assert_no_worse_than(*values, name=name)


CASES = pairwise(
    {
        "mask": ["dense", "causal", "window", "per head", "keep", "segments"],
        "terms": ["plain", "softcap", "sink", "softmax1", "sigmoid", "dropout", "alibi", "shaw", "gatv2"],
        "cache": ["none", "contiguous", "pages", "beam"],
        "group": [1, 2, 3, 8],
        "seqlen_q": [1, 2, 5],
        "dims": [(16, 16), (7, 24), (40, 9)],
        "dtype": [FP32, BF16],
    }
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_options(case: dict[str, Any]) -> None:
    heads_k = 1 if case["group"] == 8 else 2
    heads, seqlen_q, dims = heads_k * case["group"], case["seqlen_q"], case["dims"]
    shape = Shape(2, heads, heads_k, seqlen_q, KEYS, *dims)
    q, k, v = (x.detach() for x in make_inputs(shape, case["dtype"]))
    mask, options = mask_of(case["mask"], heads, seqlen_q), terms_of(case["terms"], heads, dims[0])
    if case["cache"] == "none":
        check((q, k, v), mask, **options)
    else:
        lengths = torch.tensor([KEYS, 3])
        caches, where = cached(case["cache"], k, v, lengths)
        layout = cache_layout(q, caches[0], lengths, where.get("page_table"), where.get("beam"))
        check((q, *caches), mask, layout, **options)


@pytest.mark.parametrize("shape", [
    Shape(1, 1, 1, 1, 1, 16, 16), Shape(1, 1, 1, 1, 0, 16, 16), Shape(2, 2, 2, 0, 20, 16, 16),
    Shape(1, 6, 2, 11, 70, 16, 16),  # 33 rows: two tiles
    Shape(5, 2, 1, 1, 70, 300, 20),  # wider than the table
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [FP32, torch.float64])
def test_shapes(shape: Shape, dtype: torch.dtype) -> None:
    if dtype == FP32:
        check(make_inputs(shape, dtype), Causal())
    else:
        q, k, v = (x.detach() for x in make_inputs(shape, dtype))
        got = attend(Problem.of(q, k, v, Causal()), DECODE, ops_triton)
        want = saccade.attention(q, k, v, Causal(), return_lse=True, backend="reference")
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("hiding", [False, True])
def test_dense_biases(hiding: bool) -> None:
    bias = torch.randn(2, 6, 2, KEYS, generator=DRAW)
    if hiding:
        bias = torch.where(torch.rand(KEYS, generator=DRAW) < 0.5, -torch.inf, 0.0)
    check(make_inputs(Shape(2, 6, 2, 2, KEYS, 16, 16)), Causal(), bias=bias)


def test_gradients_follow() -> None:
    q, k, v = make_inputs(Shape(1, 4, 2, 1, 300, 8, 8))
    assert saccade.explain(q, k, v, backend="triton").kernel == "decode"
    saccade.testing.check_attention((q, k, v), Window(200, 0), "triton", return_lse=True)


def test_dead_keys_are_never_read() -> None:
    """NaN in keys and values between the bands of two heads of a tile reaches nothing."""
    q, k, v = make_inputs(Shape(2, 4, 1, 3, KEYS, 16, 16))
    mask = Band(torch.tensor([5, 78, 60, 4]), torch.tensor([0, -65, -50, 2]))
    dead = torch.zeros(2, 1, KEYS, dtype=torch.bool)
    dead[..., 32:70] = True
    assert not mask.materialize(3, KEYS)[..., 32:70].any()
    found = [attend(Problem.of(q, *kv, mask), DECODE, ops_triton)
             for kv in ((k, v), (poisoned(k, dead), poisoned(v, dead)))]  # fmt: skip
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


# ---- how often a key is read ----


@pytest.mark.parametrize(("group", "seqlen_q", "rows", "times"), [
    (1, 1, 16, 1), (8, 1, 16, 1), (3, 5, 16, 1), (8, 4, 32, 1), (8, 5, 32, 2), (24, 1, 32, 1),
])  # fmt: skip
def test_a_key_tile_is_read_once_for_its_heads(
    monkeypatch: pytest.MonkeyPatch, group: int, seqlen_q: int, rows: int, times: int
) -> None:
    """Each (sequence, key head, key tile) by as many programs as the rows fill tiles: of the table's 32."""
    read: Counter[tuple[int, int, int]] = Counter()
    attend_tile = decode.attend_tile

    def spy(*args: Any) -> Any:
        k_base, j0, b = args[7], args[13], args[17]
        assert args[0].shape[0] == rows
        read[int(b), int(k_base.handle.data.item()), int(j0)] += 1
        return attend_tile(*args)

    monkeypatch.setattr(decode, "attend_tile", spy)
    check(make_inputs(Shape(2, 2 * group, 2, seqlen_q, KEYS, 16, 16)), None)
    tiles = -(-KEYS // config.pick("decode", "sm80", 4, 16).block_n)
    assert len(read) == 2 * 2 * tiles and set(read.values()) == {times}


class Counted:
    """The launches of each kernel, by their programs, whether they had a place for partial results, and the
    key tiles that were gone through.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.programs: dict[str, list[int]] = {"decode_split": [], "merge_splits": []}
        self.partial: list[bool] = []
        self.visits: Counter[tuple[int, int, int]] = Counter()  # sequence, head, key tile
        for name in self.programs:
            monkeypatch.setattr(decode, name, self._launches(name, getattr(decode, name)))
        attend_tile = decode.attend_tile

        def spy(*args: Any) -> Any:
            self.visits[int(args[17]), int(args[18].handle.data.min()), int(args[13])] += 1
            return attend_tile(*args)

        monkeypatch.setattr(decode, "attend_tile", spy)

    def _launches(self, name: str, kernel: Any) -> Any:
        counted = self

        class Launch:
            def __getitem__(self, grid: tuple[int]) -> Any:
                counted.programs[name].append(grid[0])

                def launch(*args: Any, **options: Any) -> None:
                    counted.partial.append(args[5] is not None)
                    kernel[grid](*args, **options)

                return launch

        return Launch()


LONG = 1500


@pytest.mark.parametrize(("mask", "seqlen_q", "splits"), [
    (None, 1, 6), (Causal(), 3, 6),
    (Window(30, 0), 1, 1), (Window(255, 0), 1, 1), (Window(256, 0), 1, 2), (Window(1023, 0), 1, 4),
    (Window(1023, 0), 4, 5), (Window(40, 40), 4, 1), (Window(LONG + 9, 0), 1, 6),
    (Band(None, -1200), 1, 6), (Band(None, 500, align="start"), 2, 2), (Chunks(128, 0, align="end"), 1, 1),
    (Band(torch.tensor([30, 700, 5, 90]), torch.tensor([0, 0, 0, -9])), 2, 6),
    (Band(torch.tensor([30, 700, 5, 90]), 0) & Window(300, 0), 1, 2),
    (Band(torch.tensor([-9, 700, -9, 90]), 0), 1, 6), (Band(-9, 0), 1, 1),  # rows that keep nothing
], ids=str)  # fmt: skip
@pytest.mark.parametrize("by_length", [False, True])
def test_splits_are_cut_from_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, mask: Any, seqlen_q: int, splits: int, by_length: bool
) -> None:
    """Each key tile of the window is visited once, and no other; where one split is enough there is one
    launch, and nothing to merge.
    """
    monkeypatch.setattr(decode, "_SPLIT_KEYS", 256)
    counted = Counted(monkeypatch)
    q, k, v = (x.detach() for x in make_inputs(Shape(2, 4, 2, seqlen_q, LONG, 16, 16)))
    lengths = torch.tensor([LONG, 70])
    layout = cache_layout(q, k, lengths, None, None) if by_length else None
    check((q, k, v), mask, layout)
    assert counted.programs["decode_split"] == [2 * 2 * splits]
    assert counted.programs["merge_splits"] == ([] if splits == 1 else [2 * 4 * seqlen_q])
    assert counted.partial[0] == (splits > 1)
    tile = config.pick("decode", "sm80", 4, 16).block_n
    want: Counter[tuple[int, int, int]] = Counter()
    for b, h in itertools.product(range(2), range(0, 4, 2)):
        seqlen_k = int(lengths[b]) if by_length else LONG
        kept = (Window(LONG, LONG) if mask is None else mask).materialize(seqlen_q, seqlen_k)
        kept = kept.expand(2, 4, seqlen_q, seqlen_k)[b, h : h + 2].flatten(0, -2).any(0).nonzero()
        if kept.numel():
            first, last = int(kept.min()) // tile * tile, int(kept.max()) + 1
            want.update((b, h, j0) for j0 in range(first, last, tile))
    assert counted.visits == want


def test_a_window_of_a_long_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """17 tiles of 64 keys of a cache of 100,000, in 4 splits."""
    monkeypatch.setattr(decode, "_SPLIT_KEYS", 256)
    counted = Counted(monkeypatch)
    q, k, v = (torch.randn(1, 2, n, 16, dtype=BF16) for n in (1, 100_000, 100_000))
    lengths = torch.tensor([99_990])
    check((q, k, v), Window(1023, 0), cache_layout(q, k, lengths, None, None))
    assert counted.programs == {"decode_split": [2 * 4], "merge_splits": [2]}
    tile = config.pick("decode", "sm80", 2, 16).block_n
    assert set(counted.visits.values()) == {1}
    assert len(counted.visits) == 2 * (-(-99_990 // tile) - (99_990 - 1024) // tile)


@pytest.mark.parametrize("kind", ["none", "contiguous", "pages", "beam"])
@pytest.mark.parametrize("terms", ["plain", "sink", "softmax1", "sigmoid", "dropout", "shaw", "gatv2"])
def test_one_split_writes_results_itself(monkeypatch: pytest.MonkeyPatch, kind: str, terms: str) -> None:
    """Grouped heads, queries beyond a tile's, empty rows: no partial results are made."""
    monkeypatch.setattr(decode, "_SPLIT_KEYS", KEYS)
    counted = Counted(monkeypatch)
    q, k, v = (x.detach() for x in make_inputs(Shape(2, 24, 2, 5, KEYS, 24, 9)))
    options, mask = terms_of(terms, 24, 24), Window(30, 0)
    if kind == "none":
        check((q, k, v), mask, **options)
    else:
        lengths = torch.tensor([KEYS, 3])  # of five queries two see nothing
        caches, where = cached(kind, k, v, lengths)
        layout = cache_layout(q, caches[0], lengths, where.get("page_table"), where.get("beam"))
        check((q, *caches), mask, layout, **options)
    assert counted.programs == {"decode_split": [2 * 2 * 2], "merge_splits": []}
    assert counted.partial == [False]


def test_rows_of_a_tile() -> None:
    """A power of two from 16 on, up to the table's; half of that and of the keys for heads twice as wide."""

    def rows(heads: int, seqlen_q: int, dim: int, dtype: torch.dtype = BF16) -> tuple[int, int]:
        q, k = torch.empty(1, heads, seqlen_q, dim, dtype=dtype), torch.empty(1, 2, 99, dim, dtype=dtype)
        spec = [None] * 17
        made = call.Call(q, k, k, *spec, [], [], [], 0, 0, 0, 0, 1.0, 0.0, 0.0, 0.0, DECODE)
        shape = decode.tile_shape(made)[0]
        return shape.block_m, shape.block_n

    with config.override({"decode": Config(64, 32, 256, 4, 3)}):
        assert rows(2, 1, 64) == (16, 32) and rows(16, 2, 64) == (16, 32) and rows(18, 2, 64) == (32, 32)
        assert rows(16, 8, 64) == (64, 32) and rows(64, 9, 64) == (64, 32) and rows(64, 9, 257) == (32, 16)
