"""How attention on graphs is measured: saccade beside PyTorch Geometric, gather and scatter, torch.sparse, a
dense mask, and the copies that the rows of all edges cost.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import saccade
import torch
import torch.nn.functional as F
from saccade.dropout import as_seed, kept
from saccade.graph import Graph
from torch import Tensor

from . import graph_limits
from .cases import DTYPES, FORWARD, TRAIN
from .check import compare
from .formulas import mean_over_edges
from .graph_cases import GraphCase
from .peers import SEED

Call = Callable[[], list[Tensor]]
_DENSE_NODES = 2048  # no dense mask above
_ORACLE_EDGES = {"cpu": 1 << 17, "cuda": 1 << 21}


@dataclass(frozen=True)
class Inputs:
    """q, k, v and the cotangent [N, H, D], as layers for graphs hold them."""

    case: GraphCase
    graph: Graph
    sources: Tensor  # [E] int64, by target
    targets: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    bias: Tensor | None  # [H, E]

    @property
    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        return [self.q, self.k, self.v, *([] if self.bias is None else [self.bias])]

    def plain(self) -> Inputs:
        """The same with nothing but the graph."""
        return replace(self, case=self.case.plain(), bias=None)

    def without_dropout(self) -> Inputs:
        """For providers whose pattern is their own."""
        return replace(self, case=replace(self.case, dropout_p=0.0))

    @classmethod
    def of(cls, case: GraphCase, device: str) -> Inputs:
        """Drawn from N(0, 1) with a fixed seed."""
        draw, graph = torch.Generator(device).manual_seed(0), case.graph().to(device)
        shape, dtype = (graph.num_keys, case.heads, case.head_dim), DTYPES[case.dtype]
        q, k, v = (
            torch.randn(shape, generator=draw, device=device).to(dtype).requires_grad_() for _ in range(3)
        )
        dout = torch.randint(-8, 9, shape, generator=draw, device=device).to(dtype) / 8
        bias = None
        if case.edge_bias:
            bias = torch.randn(case.heads, graph.num_edges, generator=draw, device=device).to(dtype)
            bias.requires_grad_()
        return cls(case, graph, graph.indices.long(), graph.rows, q, k, v, dout, bias)


def _call(inputs: Inputs, direction: str, forward: Callable[[], Tensor]) -> Call:
    def forward_only() -> list[Tensor]:
        with torch.no_grad():
            return [forward()]

    def train() -> list[Tensor]:
        out = forward()
        return [out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.dout)]

    return train if direction == TRAIN else forward_only


def ours(inputs: Inputs, direction: str) -> Call | str:
    """`saccade.attention`."""
    q, k, v = (x.transpose(0, 1) for x in (inputs.q, inputs.k, inputs.v))
    case = inputs.case
    mask = inputs.graph & saccade.Causal() if case.causal else inputs.graph
    options = {"dropout_p": case.dropout_p, "seed": SEED} if case.dropout_p else {}
    return _call(
        inputs,
        direction,
        lambda: saccade.attention(q, k, v, mask, edge_bias=inputs.bias, **options).transpose(0, 1),
    )


def ours_plain(inputs: Inputs, direction: str) -> Call | str:
    """`saccade.attention` with nothing but the graph."""
    return ours(inputs.plain(), direction)


def pyg(inputs: Inputs, direction: str) -> Call | str:
    """What TransformerConv does between its projections."""
    try:
        from torch_geometric.nn import TransformerConv
    except ImportError:
        return "torch_geometric is not installed"
    case = inputs.case
    if case.edge_bias or case.causal:
        return "TransformerConv takes neither a bias of edges nor a mask"
    conv = TransformerConv(1, case.head_dim, case.heads, dropout=case.dropout_p).to(inputs.q.device)
    index = torch.stack([inputs.sources, inputs.targets])

    def forward() -> Tensor:
        found = conv.propagate(index, query=inputs.q, key=inputs.k, value=inputs.v, edge_attr=None)
        conv._alpha = None
        return found

    return _call(inputs, direction, forward)


def gather_scatter(inputs: Inputs, direction: str) -> Call | str:
    """The same written in torch: gather, softmax by scatter, scatter."""
    i, j = inputs.targets, inputs.sources

    def forward() -> Tensor:
        n, _, dim = inputs.q.shape
        logits = (inputs.q[i] * inputs.k[j]).sum(-1) * dim**-0.5
        return mean_over_edges(logits, inputs.v[j], i, n)

    return _call(inputs, direction, forward)


def sparse(inputs: Inputs, direction: str) -> Call | str:
    """torch.sparse, head by head: sampled_addmm, softmax over the CSR rows, CSR times dense."""
    if direction != FORWARD:
        return "compared in forward only"
    n, heads, dim = inputs.q.shape
    graph, i = inputs.graph, inputs.targets
    columns = inputs.sources

    def csr(values: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(graph.indptr, columns, values, (n, n), check_invariants=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, once, that the layout is in beta state
        pattern = csr(torch.zeros(columns.numel(), dtype=inputs.q.dtype, device=inputs.q.device))

    def forward() -> Tensor:
        outs = []
        for h in range(heads):
            q, k, v = (x[:, h].contiguous() for x in (inputs.q, inputs.k, inputs.v))
            logits = torch.sparse.sampled_addmm(pattern, q, k.t(), beta=0.0, alpha=dim**-0.5).values()
            # The empty rows' -inf never leaves this line.
            peak = torch.segment_reduce(logits, "max", offsets=graph.indptr, initial=-torch.inf)
            powers = torch.exp(logits - peak[i])
            total = torch.segment_reduce(powers, "sum", offsets=graph.indptr, initial=0)
            outs.append(csr(powers / total[i]) @ v)
        return torch.stack(outs, 1)

    return _call(inputs, direction, forward)


def sdpa_mask(inputs: Inputs, direction: str) -> Call | str:
    """scaled_dot_product_attention with a dense mask; rows without edges are set to 0 as elsewhere."""
    if inputs.graph.num_keys > _DENSE_NODES:
        return "a dense mask would not fit"
    keep = inputs.graph.materialize()
    some = keep.any(-1)
    mask = torch.zeros(keep.shape, dtype=inputs.q.dtype, device=inputs.q.device)
    mask = mask.masked_fill_(~(keep | ~some[:, None]), -torch.inf)

    def forward() -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)
        return out if bool(some.all()) else torch.where(some[:, None, None], out, 0.0)

    return _call(inputs, direction, forward)


PROVIDERS = {
    "saccade": ours,
    "pyg": pyg,
    "gather-scatter": gather_scatter,
    "sparse": sparse,
    "sdpa-mask": sdpa_mask,
    "gather": graph_limits.gather,
    "traffic": graph_limits.traffic,
}
OPTION_PROVIDERS = {"saccade": ours, "saccade-plain": ours_plain, "pyg": pyg}


def _factors(inputs: Inputs, head: int) -> Tensor:
    """[E], what dropout multiplies the weights of one head by."""
    case, device = inputs.case, inputs.q.device
    if not case.dropout_p:
        return torch.ones(len(inputs.sources), device=device)
    b, h = (torch.full((1,), x, device=device) for x in (0, head))
    keep = kept(as_seed(SEED, device), case.dropout_p, b, h, inputs.targets, inputs.sources)
    return keep.double() / (1 - case.dropout_p)


def by_edges(inputs: Inputs, head: int, dtype: torch.dtype, train: bool) -> list[Tensor]:
    """out [N, D], the gradients of q, k, v, and that of the bias [E], of one head from the formulas, a run of
    edges at a time.
    """
    q, k, v, dout = (x.detach()[:, head].to(dtype) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    run, case = _ORACLE_EDGES[q.device.type], inputs.case
    parts = list(zip(inputs.targets.split(run), inputs.sources.split(run), strict=True))
    scale, n = q.shape[1] ** -0.5, len(q)
    logits = torch.cat([(q[i] * k[j]).sum(-1) * scale for i, j in parts])
    if inputs.bias is not None:
        logits = logits + inputs.bias.detach()[head, inputs.graph.ids].to(dtype)
    if case.causal:
        logits = logits.masked_fill(~case.causal_edges().to(q.device), -torch.inf)
    peak = logits.new_full((n,), -torch.inf).scatter_reduce(0, inputs.targets, logits, "amax")
    powers = torch.exp(logits - torch.where(peak == -torch.inf, 0.0, peak)[inputs.targets])
    sums = powers.new_zeros(n).index_add(0, inputs.targets, powers)
    weights = powers / torch.where(sums == 0, 1.0, sums)[inputs.targets]
    factors = _factors(inputs, head).to(dtype)
    runs = list(zip(parts, weights.split(run), factors.split(run), strict=True))
    out = torch.zeros_like(v)
    for (i, j), p, z in runs:
        out.index_add_(0, i, (p * z)[:, None] * v[j])
    if not train:
        return [out]
    delta = (dout * out).sum(-1)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dbias = []
    for (i, j), p, z in runs:
        dbias.append(p * (z * (dout[i] * v[j]).sum(-1) - delta[i]))
        ds = (dbias[-1] * scale)[:, None]
        dq.index_add_(0, i, ds * k[j])
        dk.index_add_(0, j, ds * q[i])
        dv.index_add_(0, j, (p * z)[:, None] * dout[i])
    if inputs.bias is None:
        return [out, dq, dk, dv]
    stored = torch.cat(dbias)
    return [out, dq, dk, dv, torch.empty_like(stored).scatter_(0, inputs.graph.ids, stored)]


class GraphWork:
    """One graph made ready: its inputs, its providers, its check on the last head."""

    def __init__(self, case: GraphCase, device: str, excluded: frozenset[str] = frozenset()) -> None:
        self.case, self.inputs = case, Inputs.of(case, device)
        offered = PROVIDERS if case == case.plain() else OPTION_PROVIDERS
        self._providers = {name: p for name, p in offered.items() if name not in excluded}
        self._known: dict[GraphCase, tuple[list[Tensor], list[Tensor]]] = {}

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.case.dtype]

    @property
    def directions(self) -> tuple[str, ...]:
        return self.case.directions

    def offers(self, direction: str) -> dict[str, Call | str]:
        """The call of every provider, or its reason."""
        return {name: offer(self.inputs, direction) for name, offer in self._providers.items()}

    def fault(self, name: str, direction: str, call: Any) -> str:
        """Run a provider once and compare; empty when it is right."""
        if name in graph_limits.LIMITS:
            return graph_limits.fault(self.inputs, name, direction, call)
        inputs = self.inputs
        if name == "saccade-plain":
            inputs = inputs.plain()
        elif name == "pyg" and self.case.dropout_p:  # its pattern is its own
            inputs = inputs.without_dropout()
            call = pyg(inputs, direction)
        got, head = call(), self.case.heads - 1
        if inputs.case not in self._known:
            train = TRAIN in self.directions
            plain, exact = (by_edges(inputs, head, d, train) for d in (self.dtype, torch.float64))
            self._known[inputs.case] = plain, exact
        wanted = 1 + (len(inputs.leaves) if direction == TRAIN else 0)
        if len(got) != wanted:
            return f"{len(got)} results instead of {wanted}"
        return compare(
            [x[head] if n > 3 else x[:, head] for n, x in enumerate(got)], *self._known[inputs.case]
        )

    def flops(self, direction: str, name: str) -> int:
        return (self.case.plain() if name == "saccade-plain" else self.case).flops(direction)
