"""Bad input: the right exception, naming the argument, raised before any kernel starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import saccade
import torch
from saccade import Band, Chunks, Graph, KeyPadding, Segments, Window
from saccade.backends import named
from saccade.testing import Shape, make_inputs

Q, K, V = (x.detach() for x in make_inputs(Shape(2, 4, 2, 5, 7, 8, 6)))
GRAPH = Graph.from_edge_index(torch.tensor([[0, 6, 2], [0, 4, 2]]), (7, 5))
CU = torch.tensor([0, 2, 5])
PACKED = torch.randn(5, 4, 8)
CACHE = torch.randn(2, 2, 7, 8)
LOOPS = torch.arange(5).expand(2, -1)
MHA = saccade.nn.MultiheadAttention(8, 2)


def attend(q: Any = Q, k: Any = K, v: Any = V, mask: Any = None, **options: Any) -> Callable[[], Any]:
    return lambda: saccade.attention(q, k, v, mask, **options)


def packed(
    cu_q: Any = CU, cu_k: Any = CU, max_q: Any = 3, max_k: Any = 3, **options: Any
) -> Callable[[], Any]:
    return lambda: saccade.attention_varlen(PACKED, PACKED, PACKED, cu_q, cu_k, max_q, max_k, **options)


def decode(lengths: Any = None, **options: Any) -> Callable[[], Any]:
    lengths = torch.tensor([3, 7]) if lengths is None else lengths
    return lambda: saccade.attention_decode(Q, CACHE, CACHE, lengths, **options)


BAD: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    # q, k, v
    (TypeError, "q: expected a tensor", attend(q=[1.0])),
    (TypeError, "v: expected a tensor", attend(v=None)),
    (ValueError, "q: expected dtype", attend(Q.int(), K.int(), V.int())),
    (ValueError, "k: expected the dtype of q", attend(k=K.double())),
    (ValueError, "v: expected the dtype of q", attend(v=V.bfloat16())),
    (ValueError, "k: expected the device of q", attend(k=K.to("meta"))),
    (ValueError, "q: expected shape", attend(q=Q[0, 0])),
    (ValueError, "k: expected 4 dimensions", attend(k=K[0])),
    (ValueError, "v: expected 3 dimensions", attend(Q[0], K[0])),
    (ValueError, "k: expected batch 2", attend(k=K[:1], v=V[:1])),
    (ValueError, "k: expected a number of heads that divides", attend(Q[:, :3])),
    (ValueError, "k: expected the head dimension of q", attend(k=K[..., :5])),
    (ValueError, "head dimension of q (at least 1)", attend(Q[..., :0], K[..., :0])),
    (ValueError, "v: expected shape [2, 2, 7, Dv] as in k", attend(v=V[:, :, :3])),
    (ValueError, "v: expected shape", attend(v=V[..., :0])),
    # numbers
    (ValueError, "scale: expected a finite number", attend(scale=float("inf"))),
    (ValueError, "scale: expected a finite number", attend(scale=10**400)),
    (ValueError, "softcap: expected a finite number", attend(softcap=1e39)),
    (ValueError, "softcap: expected a positive number", attend(softcap=1e-46)),
    (TypeError, "seed: expected an int", attend(seed="x")),
    (TypeError, "seed: expected an int", attend(seed=np.True_)),
    (TypeError, "left: expected an int", attend(window=(np.array([1, 2]), 0))),
    (TypeError, "left: expected an int", attend(window=(np.float32(1), 0))),
    (TypeError, "missing 1 required positional argument: 'right'", lambda: Window(128)),
    (TypeError, "deterministic: expected a bool", attend(deterministic="x")),
    (ValueError, "slope: expected a finite number", lambda: saccade.GATv2(torch.randn(4, 8), float("nan"))),
    (ValueError, "base: expected a positive number", lambda: saccade.RoPE(base=-1.0)),
    (ValueError, "base: expected a finite number", lambda: saccade.RoPE(base=float("nan"))),
    (TypeError, "dim: expected an int", lambda: saccade.RoPE(dim=2.0)),
    (TypeError, "max_distance: expected an int", lambda: saccade.T5(torch.randn(8, 2), max_distance=9.5)),
    (TypeError, "num_buckets: expected an int", lambda: saccade.T5(torch.randn(8, 2), num_buckets=8.0)),
    (ValueError, "heads: expected at least 1", lambda: saccade.ALiBi.default_slopes(0)),
    (ValueError, "bias: expected a dense tensor", attend(bias=torch.eye(5, 7).to_sparse())),
    (ValueError, "radius: expected an int or", lambda: saccade.patterns.grid2d(2, 2, (1,))),
    (ValueError, "radius: expected an int or", lambda: saccade.nn.PixelAttention(8, 2, (1,))),
    (ValueError, "max_seqlen_q: expected 0 to", packed(max_q=10**30)),
    (ValueError, "heads: expected at least 1", lambda: saccade.nn.TransformerConv(3, 4, heads=0)),
    (TypeError, "global_tokens: expected positions", lambda: saccade.patterns.longformer(8, 2, 1)),
    (TypeError, "qk_norm: expected a bool", lambda: saccade.nn.MultiheadAttention(8, 2, qk_norm="no")),
    (TypeError, "verify: expected a bool", lambda: saccade.accelerate(torch.nn.Linear(2, 2), verify="x")),
    *((ValueError, "edge_attr: expected 3 features of each edge, got 2",
       lambda kind=kind: kind(4, 8, edge_dim=3)(torch.ones(5, 4), LOOPS, edge_attr=torch.ones(5, 2)))
      for kind in (saccade.nn.GATConv, saccade.nn.GATv2Conv, saccade.nn.TransformerConv)),
    (ValueError, "edge_attr: expected 3 features of each edge, got 2",
     lambda: saccade.nn.GraphMultiheadAttention(4, 2, edge_dim=3)(
         torch.ones(5, 4), LOOPS, edge_attr=torch.ones(5, 2))),
    (TypeError, "attn_mask: expected a tensor; a saccade mask is given as mask=",
     lambda: MHA(Q[0], Q[0], Q[0], attn_mask=saccade.Causal())),
    (TypeError, "key_padding_mask: expected a tensor; a saccade mask is given as mask=",
     lambda: MHA(Q[0], Q[0], Q[0], key_padding_mask=KeyPadding([5, 5, 5, 5]))),
    (ValueError, "page_table: expected 0 <= entry < 2, got 4294967296",
     decode(page_table=torch.tensor([[1 << 32], [0]]))),
    (ValueError, "beam: expected 0 <= entry < 2, got 4294967297",
     decode(beam=torch.full((2, 7), (1 << 32) + 1))),
    # the mask
    (TypeError, "Graph.from_dense", attend(mask=torch.ones(5, 7).bool())),
    (TypeError, "mask: expected a saccade.Mask", attend(mask="causal")),
    (TypeError, "window: expected a pair", attend(window=3)),
    (ValueError, "left: a window reaches", attend(window=(-1, 0))),
    (ValueError, "use None", lambda: Window(0, -1)),
    (ValueError, "left: a window reaches", lambda: Window(torch.tensor([2, -1]), 0)),
    (TypeError, "right: expected an int", lambda: Band(None, 1.5)),
    (ValueError, "left: expected shape", lambda: Band(torch.zeros(2, 2).int())),
    (ValueError, "align: expected", lambda: Band(1, 1, align="middle")),
    (ValueError, "bounds for 3 heads", attend(mask=Band(torch.tensor([1, 2, 3]), 0))),
    (TypeError, "unsupported operand", lambda: Band() & 3),
    (ValueError, "lengths: expected values >= 0", lambda: KeyPadding(torch.tensor([2, -1]))),
    (ValueError, "lengths: expected an integer dtype", lambda: KeyPadding(torch.tensor([2.0]))),
    (ValueError, "a mask of keys [B, Sk] is bool", lambda: KeyPadding(torch.ones(2, 7).int())),
    (ValueError, "keep: expected dtype torch.bool", lambda: KeyPadding(keep=torch.ones(2, 7))),
    (TypeError, "expected lengths or keep", lambda: KeyPadding()),
    (ValueError, "length of 8, the call has 7 keys", attend(mask=KeyPadding(torch.tensor([2, 8])))),
    (ValueError, "batch of 3, the call has 2", attend(mask=KeyPadding(torch.tensor([2, 3, 4])))),
    (ValueError, "KeyPadding has 6 keys", attend(mask=KeyPadding(torch.ones(2, 6).bool()))),
    (ValueError, "is on meta", attend(mask=KeyPadding(torch.ones(2, 7, device="meta").bool()))),
    (ValueError, "say Segments(q_ids, k_ids)", attend(mask=Segments(torch.zeros(2, 5).int()))),
    (ValueError, "key ids", attend(mask=Segments(torch.zeros(2, 5).int(), torch.zeros(2, 6).int()))),
    (ValueError, "q_ids: expected an integer dtype", lambda: Segments(torch.zeros(2, 5))),
    (ValueError, "k_ids: expected the batch",
     lambda: Segments(torch.zeros(2, 5).int(), torch.zeros(1, 5).int())),
    (ValueError, 'say Chunks(size, left, align="end")', attend(mask=Chunks(2, 1))),
    (ValueError, "size: expected at least 1", lambda: Chunks(0, 1)),
    (ValueError, "left: expected at least 0", lambda: Chunks(2, -1)),
    # graphs
    (TypeError, "edge_index: expected a tensor", lambda: Graph.from_edge_index([[0], [0]], 2)),
    (ValueError, "edge_index: expected shape", lambda: Graph.from_edge_index(torch.zeros(3, 2).long(), 2)),
    (ValueError, "edge_index: expected an integer", lambda: Graph.from_edge_index(torch.zeros(2, 2), 2)),
    (ValueError, r"edge_index[0] (sources): expected 0 <= index < 2, got 0 to 2",
     lambda: Graph.from_edge_index(torch.tensor([[0, 2], [0, 1]]), 2)),
    (ValueError, "edge_index[1] (targets)", lambda: Graph.from_edge_index(torch.tensor([[0], [-1]]), 2)),
    (TypeError, "num_nodes", lambda: Graph.from_edge_index(torch.zeros(2, 0).long(), 2.0)),
    (ValueError, "indptr: expected to rise",
     lambda: Graph.from_csr(torch.tensor([0, 2, 1]), torch.tensor([0]), 3)),
    (ValueError, "indices: expected 0 <= index < 3",
     lambda: Graph.from_csr(torch.tensor([0, 1]), torch.tensor([3]), 3)),
    (ValueError, "mask: expected dtype torch.bool", lambda: Graph.from_dense(torch.ones(2, 2))),
    (ValueError, "mask: expected shape [Sq, Sk]", lambda: Graph.from_dense(torch.ones(2).bool())),
    (TypeError, "graphs: expected", lambda: Graph.batch([])),
    (ValueError, "as many keys as queries", lambda: GRAPH.add_self_loops()),
    (ValueError, "the call has 5 and 7", attend(mask=Graph.from_dense(torch.ones(7, 5).bool()))),
    (ValueError, "edge_bias: needs a Graph", attend(edge_bias=torch.zeros(3))),
    (ValueError, "edge_bias: expected shape [3] or [4, 3]", attend(mask=GRAPH, edge_bias=torch.zeros(4))),
    (TypeError, "edge_attr: expected a pair", attend(mask=GRAPH, edge_attr=torch.zeros(3, 2))),
    (ValueError, "edge_attr: needs Dv == D",
     attend(mask=GRAPH, edge_attr=(torch.zeros(3, 2), torch.zeros(4, 8, 2)))),
    (ValueError, "edge_attr's W: expected shape [4, 8, 2]",
     attend(v=K, mask=GRAPH, edge_attr=(torch.zeros(3, 2), torch.zeros(8, 2)))),
    # terms
    (ValueError, "bias: expected a float dtype, got torch.bool", attend(bias=torch.ones(5, 7).bool())),
    (TypeError, "bias: expected a tensor", attend(bias=1.0)),
    (ValueError, "bias: expected a shape that broadcasts to [2, 4, 5, 7]", attend(bias=torch.zeros(2, 5, 7))),
    (ValueError, "bias: expected the device", attend(bias=torch.zeros(5, 7, device="meta"))),
    (ValueError, "sink: expected shape [4]", attend(sink=torch.zeros(2))),
    (ValueError, "sink: belongs to the softmax", attend(sink=torch.zeros(4), activation="relu")),
    (ValueError, "sink: belongs to the softmax", attend(sink=torch.zeros(4), activation="softmax1")),
    (ValueError, "return_lse: relu", attend(return_lse=True, activation="relu")),
    (ValueError, "return_lse: sigmoid", attend(return_lse=True, activation="sigmoid")),
    (ValueError, "activation: expected one of", attend(activation="gelu")),
    (TypeError, "activation: expected a string", attend(activation=torch.relu)),
    (ValueError, "score: expected", attend(score="cosine")),
    (TypeError, "score: expected", attend(score=None)),
    (ValueError, "score's weight: expected shape [4, 8]", attend(score=saccade.Additive(torch.zeros(4, 7)))),
    (TypeError, "weight: expected a tensor", lambda: saccade.GATv2([1.0])),
    (TypeError, "position: expected", attend(position=torch.zeros(4))),
    (ValueError, "position: ALiBi is for 3 heads", attend(position=saccade.ALiBi(torch.zeros(3)))),
    (ValueError, "position: T5 is for 2 heads", attend(position=saccade.T5(torch.zeros(8, 2)))),
    (ValueError, "position: Shaw has vectors of 7", attend(position=saccade.Shaw(torch.zeros(5, 7)))),
    (ValueError, "needs Sq + Sk - 1 = 11 rows",
     attend(position=saccade.TransformerXL(torch.zeros(5, 8), torch.zeros(4, 8), torch.zeros(4, 8)))),
    (ValueError, "needs the dot score",
     attend(position=saccade.Shaw(torch.zeros(5, 8)), score=saccade.GATv2(torch.zeros(8)))),
    (ValueError, "RoPE turns an even number", attend(position=saccade.RoPE(dim=10))),
    (TypeError, "scale: expected a float", attend(scale="1")),
    (ValueError, "softcap: expected a positive number", attend(softcap=0.0)),
    (ValueError, "dropout_p: expected 0 to 1", attend(dropout_p=1.5)),
    (TypeError, "dropout_p: expected a float", attend(dropout_p="half")),
    (TypeError, "seed: expected an int", attend(dropout_p=0.5, seed=1.5)),
    (ValueError, "seed: expected an int64 tensor", attend(dropout_p=0.5, seed=torch.zeros(2).long())),
    # backends
    (TypeError, "backend: expected a name", attend(backend=1)),
    (ValueError, "backend: expected one of", attend(backend="flash")),
    # packed sequences and caches
    (TypeError, "cu_seqlens_q: expected an integer tensor", packed(cu_q=[0, 5])),
    (ValueError, "cu_seqlens_q: expected an int32 or int64", packed(cu_q=CU.float())),
    (ValueError, "cu_seqlens_q: expected values from 0 to 5", packed(cu_q=torch.tensor([0, 2, 4]))),
    (ValueError, "cu_seqlens_k: expected values that do not fall",
     packed(cu_k=torch.tensor([0, 6, 5]), max_k=9)),
    (ValueError, "cu_seqlens_k: expected shape [3]", packed(cu_k=torch.tensor([0, 5]), max_k=5)),
    (ValueError, "max_seqlen_q: expected at least 3", packed(max_q=2)),
    (TypeError, "max_seqlen_k: expected an int", packed(max_k=3.0)),
    (ValueError, "bias: serves dense calls only", packed(bias=torch.zeros(5, 5))),
    (ValueError, "mask: a Graph serves dense calls only",
     packed(mask=Graph.from_dense(torch.ones(3, 3).bool()))),
    (ValueError, "lengths: expected values from 0 to 7, got 3 to 8 (k_cache is [2, 2, 7, 8], read as [B, Hk,",
     decode(torch.tensor([3, 8]))),
    (ValueError, "lengths: expected shape [2]", decode(torch.tensor([3]))),
    (ValueError, "page_table: expected 0 <= entry < 2", decode(page_table=torch.tensor([[0], [2]]))),
    (ValueError, "page_table: expected shape [2, pages]", decode(page_table=torch.zeros(3, 1).int())),
    (ValueError, "beam: expected 0 <= entry < 2", decode(beam=torch.full((2, 7), -1))),
    (ValueError, "beam: expected no page_table",
     decode(beam=torch.zeros(2, 7).int(), page_table=torch.zeros(2, 1).int())),
    # merge
    (ValueError, "merge: expected as many outs as lses", lambda: saccade.merge([Q], [])),
    (ValueError, "merge: expected lse", lambda: saccade.merge([Q], [Q])),
    (TypeError, "merge: expected outs as a sequence of tensors, got one of [2, 4, 5, 8]",
     lambda: saccade.merge(Q, Q[..., 0])),
    (TypeError, "merge: expected lses as a sequence", lambda: saccade.merge([Q], Q[None, ..., 0])),
    (TypeError, "merge: expected tensors, got int and int", lambda: saccade.merge([1], [2])),
    # what torch or Python would refuse further down, in other words
    (TypeError, "q: expected a dense tensor, got torch.sparse_coo", attend(q=Q.to_sparse())),
    (TypeError, "q: expected a dense tensor, got a nested one",
     attend(*(torch.nested.nested_tensor(list(x), layout=torch.jagged) for x in (Q, K, V)))),
    (TypeError, "causal: expected a bool, got Tensor", attend(causal=torch.ones(5, 7).bool())),
    (TypeError, "causal: expected a bool, got str", attend(causal="no")),
    (ValueError, "softcap: expected a finite number", attend(softcap=float("inf"))),
    (TypeError, "lengths: expected a tensor or numbers, got str", lambda: KeyPadding("abc")),
    (ValueError, "mask: expected graphs of one size",
     lambda: GRAPH & Graph.from_dense(torch.ones(7, 5).bool())),
    (TypeError, "attention_varlen() got an unexpected keyword argument 'foo'", packed(foo=1)),
    (TypeError, "attention_decode() got an unexpected keyword argument 'layout'", decode(layout=1)),
    (TypeError, "explain() got an unexpected keyword argument 'foo'",
     lambda: saccade.explain(Q, K, V, foo=1)),
    (ValueError, "Sq: expected a size >= 0, got -1", lambda: saccade.dropout_mask(1, 0.5, 1, 1, -1, 2)),
    (TypeError, "B: expected an int, got float", lambda: saccade.dropout_mask(1, 0.5, 1.5, 1, 1, 2)),
    (TypeError, "query: expected a tensor, got str", lambda: saccade.scaled_dot_product_attention("q", K, V)),
    (TypeError, "attn_mask: expected a tensor, got list",
     lambda: saccade.scaled_dot_product_attention(K, K, V, [[0.0]])),
    (ValueError, "attn_mask: expected a shape that broadcasts to [2, 2, 7, 7], got [7, 5]",
     lambda: saccade.scaled_dot_product_attention(K, K, V, torch.zeros(7, 5))),
    (ValueError, "attn_mask: expected a shape that broadcasts to [2, 7, 7], got [3, 1, 7]",
     lambda: saccade.scaled_dot_product_attention(K[0], K[0], V[0], torch.ones(3, 1, 7).bool())),
    (ValueError, "attn_mask: expected dtype bool or float",
     lambda: saccade.scaled_dot_product_attention(K, K, V, torch.zeros(7, 7).int())),
    (ValueError, "enable_gqa=True", lambda: saccade.scaled_dot_product_attention(Q, K, V)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "message", "call"), BAD, ids=[f"{n}-{m[:40]}" for n, (_, m, _) in enumerate(BAD)]
)
def test_bad_input(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind and message in str(caught.value)


def test_a_named_backend_never_falls_back_and_gives_every_reason() -> None:
    distances = Q.shape[-2] + K.shape[-2] - 1
    u, v = torch.zeros(2, Q.shape[-3], 8)
    options = {"position": saccade.TransformerXL(torch.randn(distances, 8), u, v)}
    with pytest.raises(NotImplementedError) as caught:
        saccade.attention(Q, K, V, **options, backend="cpu")
    text = str(caught.value)
    assert (
        "'cpu' cannot run" in text
        and "TransformerXL" in text
        and all(f"  {n}: " in text for n in ("cuda", "triton", "reference"))
    )
    for name in ("cuda", "triton"):
        if name not in saccade.backends():
            with pytest.raises(NotImplementedError, match=f"backend '{name}'"):
                saccade.attention(Q, K, V, backend=name)


def test_explain_tells_what_would_run() -> None:
    told = saccade.explain(Q, K, V, GRAPH, edge_bias=torch.zeros(3), bias=torch.zeros(5, 7))
    assert told.backend == "reference" and told.kernel == "edges"
    assert set(told.reasons) == {"cuda", "triton", "cpu"}
    if "cpu" in saccade.backends():
        assert "edge terms" in "".join(told.reasons["cpu"])
        kernels = {
            "tiled": saccade.explain(*(x.repeat(1, 1, 2, 1) for x in (Q, K, V))),
            "gather": saccade.explain(Q, K, V, GRAPH, edge_bias=torch.zeros(3)),
            "decode": saccade.explain(Q, K, V),
        }
        assert [told.kernel for told in kernels.values()] == list(kernels)
    assert "-> reference" in str(told) and "5 queries" in str(told)
    others = [n for n in saccade.backends() if n != "triton"]
    assert others[-1] == "reference" and named("reference").NAME == "reference"


def test_ints_of_numpy() -> None:
    n, graph = np.int64, Graph.from_edge_index(LOOPS, np.int32(5))
    assert type(graph.num_keys) is int and graph.num_queries == 5
    got = saccade.attention(Q, K, V, Chunks(n(3), n(1), align="end"), window=(n(2), np.uint8(1)), seed=n(3),
                            dropout_p=0.5)  # fmt: skip
    mask = Chunks(3, 1, align="end")
    assert torch.equal(got, saccade.attention(Q, K, V, mask, window=(2, 1), seed=3, dropout_p=0.5))
    assert saccade.nn.MultiheadAttention(8, 4, num_kv_heads=n(2)).num_kv_heads == 2
