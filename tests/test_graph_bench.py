"""The graph suite: its graphs, and that a wrong provider gets no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saccade.benchmarks import convolutions, graph, graph_cases, graph_limits
from saccade.benchmarks.cases import FORWARD, TRAIN
from saccade.benchmarks.graph_cases import KINDS, GraphCase


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_are_what_they_say(kind: str) -> None:
    made = graph_cases.build(kind, 10_000)
    assert abs(made.num_edges - 10_000) < 1000 and not made.has_repeats
    degree = made.indptr.diff()
    assert {"grid": 9, "molecules": 3, "erdos-renyi": 30, "power-law": 2000}[kind] >= int(degree.max())
    if kind == "power-law":
        assert int(degree.max()) > 10 * float(degree.float().mean())
    if kind == "molecules":
        sources, targets = made.edge_index
        assert torch.equal(sources // 23, targets // 23) and bool((degree >= 1).all())


@pytest.mark.parametrize("direction", [FORWARD, TRAIN])
@pytest.mark.parametrize("kind", KINDS)
def test_every_provider_is_right(kind: str, direction: str) -> None:
    work = graph.GraphWork(GraphCase("small", kind, 1500, 2, 16), "cpu")
    absent = {"sparse"} if direction == TRAIN else set()
    for name, call in work.offers(direction).items():
        if isinstance(call, str):
            assert name in absent | {"pyg"}
        else:
            assert not work.fault(name, direction, call), name


def test_a_wrong_result_is_found() -> None:
    work = graph.GraphWork(GraphCase("small", "grid", 1500, 2, 16), "cpu")
    call = graph.ours(work.inputs, TRAIN)
    assert not isinstance(call, str)

    def bent(n: int) -> list[torch.Tensor]:
        found = call()
        found[n] = found[n] * 1.001
        return found

    for n in range(4):
        assert work.fault("saccade", TRAIN, lambda n=n: bent(n))
    assert work.fault("saccade", TRAIN, lambda: call()[:3]) and work.fault(
        "saccade", TRAIN, lambda: [*call()] * 2
    )


@pytest.mark.parametrize("direction", [FORWARD, TRAIN])
def test_limits_copy_what_they_say(direction: str) -> None:
    work = graph.GraphWork(GraphCase("small", "grid", 1500, 2, 16), "cpu")
    gather, traffic = (work.offers(direction)[name] for name in graph_limits.LIMITS)
    assert not isinstance(gather, str) and not isinstance(traffic, str)
    assert len(gather()) == 1 and len(traffic()) == (2 if direction == FORWARD else 5)  # type: ignore[arg-type]
    assert work.fault("gather", direction, lambda: [torch.zeros(10, 32)])
    assert work.fault("gather", direction, traffic) and work.fault("traffic", direction, gather)
    for n in range(1, len(traffic())):  # type: ignore[arg-type]
        bent = [x + 1 if i == n else x for i, x in enumerate(traffic())]  # type: ignore[arg-type, var-annotated]
        assert work.fault("traffic", direction, lambda bent=bent: bent)


def test_operations_and_columns() -> None:
    case = GraphCase("small", "grid", 900, 4, 16)
    edges = case.graph().num_edges
    assert case.flops(FORWARD) == 4 * edges * 4 * 16 and case.flops(TRAIN) == 14 * edges * 4 * 16
    assert case.describe()["edges"] == edges
    causal = GraphCase("small", "grid", 900, 4, 16, causal=True)
    sources, targets = causal.graph().edge_index
    assert causal.flops(FORWARD) == 4 * int((sources <= targets).sum()) * 4 * 16 < case.flops(FORWARD)
    work = graph.GraphWork(causal, "cpu")
    assert work.flops(FORWARD, "saccade-plain") == case.flops(FORWARD) > work.flops(FORWARD, "saccade")


@pytest.mark.parametrize("direction", [FORWARD, TRAIN])
@pytest.mark.parametrize("layer", ["GATv2Conv", "GATConv", "TransformerConv"])
def test_every_convolution_is_right(layer: str, direction: str) -> None:
    work = convolutions.ConvWork(convolutions.ConvCase("small", layer, "power-law", 1500, 2, 16, 3), "cpu")
    for name, call in work.offers(direction).items():
        if isinstance(call, str):
            assert name == "pyg"
            continue
        assert not work.fault(name, direction, call), name
        for n, result in enumerate(call()):
            bent = [x + 0.1 if i == n else x for i, x in enumerate(call())]  # a bias of keys has gradient 0
            assert work.fault(name, direction, lambda bent=bent: bent), (name, n, result.shape)
    assert "saccade" not in convolutions.ConvWork(work.case, "cpu", frozenset({"saccade"})).offers(direction)


@pytest.mark.parametrize("direction", [FORWARD, TRAIN])
@pytest.mark.parametrize("option", [{"dropout_p": 0.3}, {"edge_bias": True}, {"causal": True}])
def test_options_are_right(option: dict[str, Any], direction: str) -> None:
    work = graph.GraphWork(GraphCase("small", "power-law", 1500, 2, 16, **option), "cpu")
    columns = work.case.describe()
    assert (columns["dropout_p"], columns["bias"]) == (option.get("dropout_p", 0), "edge_bias" in option)
    assert ("Band" in str(columns["mask"])) == ("causal" in option)
    offers = work.offers(direction)
    assert set(offers) == {"saccade", "saccade-plain", "pyg"}
    for name, call in offers.items():
        if isinstance(call, str):
            assert name == "pyg"
            continue
        assert not work.fault(name, direction, call), name
    call, plain = offers["saccade"], offers["saccade-plain"]
    assert not isinstance(call, str) and not isinstance(plain, str)
    assert work.fault("saccade", direction, plain)
    for n in range(len(call())):
        bent = [x * 1.001 if i == n else x for i, x in enumerate(call())]
        assert work.fault("saccade", direction, lambda bent=bent: bent), n
