"""The twins of PyTorch Geometric's convolutions: state_dict, initial values, results, gradients, dropout."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import pytest
import saccade
import torch
from saccade.nn import _edges
from saccade.testing import pairwise
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

NAMES = ("TransformerConv", "GATConv", "GATv2Conv")
SHARED = {
    "in_channels": [8, (8, 6), -1],
    "heads": [1, 3],
    "concat": [True, False],
    "edge_dim": [None, 5, -1],
    "bias": [True, False],
    "weights": [None, True],
}
GAT = {
    "negative_slope": [0.2, 0.5],
    "add_self_loops": [True, False],
    "fill_value": ["mean", 0.5, "add", "min", "max", "mul", torch.arange(5.0)],
    "residual": [False, True],
}
AXES = {
    "TransformerConv": SHARED | {"beta": [False, True], "root_weight": [True, False]},
    "GATConv": SHARED | GAT,
    "GATv2Conv": SHARED | GAT | {"share_weights": [False, True]},
}


def options_of(name: str) -> list[Any]:
    found = []
    for case in pairwise(AXES[name]):
        shape = case["in_channels"]
        if case.get("share_weights") and isinstance(shape, tuple):
            case["in_channels"] = (8, 8)
        found.append(pytest.param(name, case, id=f"{name}-" + "-".join(str(v) for v in case.values())))
    return found


def geometric() -> Any:
    return pytest.importorskip("torch_geometric", reason="torch_geometric is not installed").nn


def pair(name: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    """(ours, theirs), built under the same seed, in fp64."""
    made = []
    for module in (saccade.nn, geometric()):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made.append(getattr(module, name)(*args, **options).double())
    return made[0], made[1]


def same_state(ours: Any, theirs: Any) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    lazy = {n.rpartition(".")[0] for n, y in b.items() if isinstance(y, UninitializedParameter)}
    for name, x in a.items():
        assert name.rpartition(".")[0] in lazy or torch.equal(x, b[name])


def some_edges(sources: int, targets: int, count: int = 60) -> Tensor:
    """With loops, repeats, and a target without edges."""
    index = torch.stack([torch.randint(sources, (count,)), torch.randint(targets - 1, (count,))])
    index[:, 0] = 2
    return torch.cat([index, index[:, :3]], 1)


@pytest.mark.parametrize(("name", "case"), [c for name in NAMES for c in options_of(name)])
def test_equals_pytorch_geometric(name: str, case: dict[str, Any]) -> None:
    options = dict(case)
    shape, weights = options.pop("in_channels"), options.pop("weights")
    ours, theirs = pair(name, shape, 4, **options)
    same_state(ours, theirs)
    bipartite = isinstance(shape, tuple)
    widths = shape if bipartite else (8, 8)
    x = torch.randn(11, widths[0], dtype=torch.float64)
    y = torch.randn(7, widths[1], dtype=torch.float64) if bipartite else x
    index = some_edges(11, len(y))
    e = None if options["edge_dim"] is None else torch.randn(index.shape[1], 5, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(5)  # lazy layers take their values now
        leaves = [t.clone().requires_grad_() for t in ((x, y) if bipartite else (x,))]
        features = None if e is None else e.clone().requires_grad_()
        found = module(
            tuple(leaves) if bipartite else leaves[0], index, features, return_attention_weights=weights
        )
        out, alpha = (found[0], found[1]) if weights else (found, None)
        scores = [out] if alpha is None else [out, alpha[1]]
        draw = torch.Generator().manual_seed(1)
        loss = sum((t * torch.randn(t.shape, generator=draw, dtype=t.dtype)).sum() for t in scores)
        used = [p for p in module.parameters() if not isinstance(p, UninitializedParameter)]
        tensors = [*leaves, *([] if features is None else [features]), *used]
        grads = torch.autograd.grad(loss, tensors, allow_unused=True)
        results.append(([*scores, *([] if alpha is None else [alpha[0]])], grads))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        if b is None or a is None:
            assert (a is None or not a.any()) and (b is None or not b.any())
        else:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"edge_dim": 5, "heads": 2, "concat": False}, {"bias": False}])
def test_state_dicts_go_both_ways(name: str, options: dict[str, Any]) -> None:
    ours, theirs = pair(name, 8, 4, **options)
    for target, source in ((ours, theirs), (theirs, ours)):
        for p in source.parameters():
            p.data.normal_()
        assert not any(target.load_state_dict(source.state_dict()))
        same_state(target, source)
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict(pair(name, 9, 4, **options)[1].state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_lazy_layers_load_before_their_first_input(name: str) -> None:
    ours, theirs = pair(name, -1, 4)
    full = pair(name, 8, 4)[1]
    ours.load_state_dict(full.state_dict())
    same_state(ours, full)
    assert repr(ours) == repr(theirs)


def test_sources_without_targets() -> None:
    """GATConv takes x = (sources, None)."""
    ours, theirs = pair("GATConv", (8, 6), 4, heads=2, add_self_loops=False)
    x = torch.randn(9, 8, dtype=torch.float64)
    index = some_edges(9, 5)
    for size in (None, (9, 5), (9, 9)):
        a, b = (m((x, None), index, size=size) for m in (ours, theirs))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_every_form_of_edges(name: str) -> None:
    ours, theirs = pair(name, 8, 4, heads=2)
    x, index = torch.randn(9, 8, dtype=torch.float64), torch.unique(some_edges(9, 9), dim=1)
    index = index[:, torch.randperm(index.shape[1])]
    expected = theirs(x, index)
    adjacency = torch.sparse_coo_tensor(index.flip(0), torch.ones(index.shape[1]), (9, 9)).coalesce()
    graph = saccade.Graph.from_edge_index(index, 9)
    forms = (index, index.int(), index.t().contiguous().t(), graph, adjacency, adjacency.to_sparse_csr())
    for form in forms:
        torch.testing.assert_close(ours(x, form), expected)
    alpha = ours(x, graph, return_attention_weights=True)[1]
    known = theirs(x, index, return_attention_weights=True)[1]
    assert torch.equal(alpha[0], known[0])
    torch.testing.assert_close(alpha[1], known[1])


# -- what is ours


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("edge_dim", [None, 5])
def test_dropout_in_training(name: str, edge_dim: int | None) -> None:
    """The output is the sum over the very weights that dropout leaves; its pattern is `dropout_mask`'s."""
    n, p = 40, 0.4
    torch.manual_seed(0)
    module = getattr(saccade.nn, name)(8, 4, heads=2, dropout=p, edge_dim=edge_dim).double()
    x, index = torch.randn(n, 8, dtype=torch.float64), torch.unique(torch.randint(n, (2, 300)), dim=1)
    e = None if edge_dim is None else torch.randn(index.shape[1], edge_dim, dtype=torch.float64)
    whole, (pairs, alpha) = module.eval()(x, index, e, return_attention_weights=True)
    module.train()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(module(x, index, e, return_attention_weights=True))
    assert torch.equal(outs[0][0], outs[1][0]) and not torch.equal(outs[0][0], outs[2][0])
    torch.manual_seed(1)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (1,))
    stays = saccade.dropout_mask(seed, p, 1, 2, n, n)[0][:, pairs[1], pairs[0]].t()
    assert abs(stays.double().mean() - (1 - p)) < 0.1
    weights = torch.where(stays, alpha / (1 - p), 0.0)
    if name != "TransformerConv":
        torch.testing.assert_close(outs[0][1][1], weights)
        first = module.lin if name == "GATConv" else module.lin_l
        values = first(x).view(n, 2, 4)[pairs[0]]
        root = module.bias
    else:
        torch.testing.assert_close(outs[0][1][1], alpha)  # as in PyTorch Geometric: before dropout
        values = module.lin_value(x).view(n, 2, 4)[pairs[0]]
        values = values if e is None else values + module.lin_edge(e).view(-1, 2, 4)
        root = module.lin_skip(x)
    by_hand = torch.zeros(n, 2, 4, dtype=torch.float64).index_add(0, pairs[1], weights[..., None] * values)
    torch.testing.assert_close(outs[0][0], by_hand.flatten(1) + root)
    assert not torch.equal(whole, outs[0][0])


def test_a_graph_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count = []
    build = _edges._build
    monkeypatch.setattr(_edges, "_build", lambda *args: count.append(args[1:]) or build(*args))
    layers = [saccade.nn.TransformerConv(8, 8), saccade.nn.GATv2Conv(8, 8), saccade.nn.GATConv(8, 8)]
    x, index = torch.randn(9, 8), some_edges(9, 9)
    for _ in range(3):
        for layer in layers:
            layer(x, index).sum().backward()
    assert count == [((9, 9), False), ((9, 9), True)]
    first = layers[0](x, index)
    index[0, 5] = (index[0, 5] + 1) % 9  # written in place: what was built is stale
    second = layers[0](x, index)
    assert len(count) == 3 and not torch.equal(first, second)
    assert torch.equal(second, layers[0](x, index.clone()))
    built = len(_edges._built)
    del index
    gc.collect()
    assert len(_edges._built) < built


def test_cached_edges_serve_other_sizes_and_threads_of_use() -> None:
    index = torch.tensor([[0, 1], [1, 0]])
    conv = saccade.nn.GATConv(3, 2)
    assert conv(torch.randn(2, 3), index).shape == (2, 2)
    assert conv(torch.randn(5, 3), index).shape == (5, 2)
    with torch.inference_mode():
        fresh = torch.tensor([[0, 1], [1, 0]])
        assert conv(torch.randn(2, 3), fresh).shape == (2, 2)
    twin = copy.deepcopy(conv)
    x = torch.randn(2, 3)
    assert torch.equal(twin(x, index), conv(x, index))


@pytest.mark.parametrize("name", ["TransformerConv", "GATv2Conv"])
def test_logits_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk at a time gives the same logits and gradients as all at once."""
    torch.manual_seed(0)
    module = getattr(saccade.nn, name)(8, 4, heads=2, edge_dim=5).double()
    x, index = torch.randn(9, 8, dtype=torch.float64, requires_grad=True), some_edges(9, 9)
    e = torch.randn(index.shape[1], 5, dtype=torch.float64, requires_grad=True)
    found = []
    for chunk in (1 << 16, 1):  # 1: as many edges as nodes
        monkeypatch.setattr(_edges, "CHUNK", chunk)
        out, (_, alpha) = module(x, index, e, return_attention_weights=True)
        loss = (alpha**2).sum() + out.sum()
        found.append(
            (out, alpha, *torch.autograd.grad(loss, [x, e, *module.parameters()], allow_unused=True))
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = getattr(saccade.nn, name)(8, 4, heads=2, edge_dim=5)
    x, index = torch.randn(9, 8), some_edges(9, 9)
    e = torch.randn(index.shape[1], 5)
    low = copy.deepcopy(module).to(dtype)(x.to(dtype), index, e.to(dtype))
    assert low.dtype == dtype
    torch.testing.assert_close(low.float(), module(x, index, e), rtol=0.05, atol=0.05)


def refused(name: str, *args: Any, make: Any = (8, 4), **options: Any) -> Any:
    return lambda: getattr(saccade.nn, name)(*make, **options)(*args)


X, INDEX = torch.zeros(5, 8), torch.tensor([[0, 4], [1, 2]])
SMALL, BESIDE = saccade.Graph.from_edge_index(INDEX[:, :1], 4), INDEX + torch.tensor([[1], [0]])
T, GAT, V2, ONES = "TransformerConv", "GATConv", "GATv2Conv", torch.ones(2, 3)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x: expected a tensor", refused(GAT, None, INDEX)),
        (ValueError, r"x: expected shape \[N, F\]", refused(GAT, X[None], INDEX)),
        (ValueError, "x: expected a pair", refused(V2, (X, X, X), INDEX)),
        (TypeError, r"x\[1\]: expected a tensor", refused(V2, (X, None), INDEX)),
        (TypeError, "edge_index: expected a tensor", refused(GAT, X, [[0], [1]])),
        (ValueError, r"edge_index\[0\].* < 5, got 1 to 5", refused(GAT, X, BESIDE)),
        (ValueError, "edge_index: expected an integer", refused(T, X, INDEX.float())),
        (ValueError, "edge_index: 4 sources", refused(GAT, X, SMALL)),
        (ValueError, "edge_index: expected shape", refused(GAT, X, torch.eye(4).to_sparse())),
        (ValueError, "edge_attr: a layer with edge_dim=None", refused(T, X, INDEX, ONES)),
        (ValueError, "edge_attr: a layer with edge_dim=3", refused(T, X, INDEX, edge_dim=3)),
        (ValueError, "edge_attr: a layer", refused(V2, X, INDEX, ONES)),
        (ValueError, r"edge_attr: expected shape \[2", refused(GAT, X, INDEX, torch.ones(3, 3), edge_dim=3)),
        (TypeError, "edge_attr: expected a tensor", refused(GAT, X, INDEX, [1.0, 2.0], edge_dim=1)),
        (ValueError, "fill_value", refused(GAT, X, INDEX, ONES, edge_dim=3, fill_value="median")),
        (ValueError, "size: expected", refused(GAT, X, INDEX, None, (5, 4))),
        (NotImplementedError, "flow", refused(GAT, X, INDEX, flow="target_to_source")),
        (NotImplementedError, "aggr", refused(T, X, INDEX, aggr="max")),
        (TypeError, "depth: unexpected", refused(T, X, INDEX, depth=3)),
    ],
)
def test_bad_input(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()
