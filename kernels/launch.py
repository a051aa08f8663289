"""From a `Call` and its outputs to kernel launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import runtime
from .backward import Statistics, row_statistics, tiled_backward_kv, tiled_backward_q
from .call import Call, blocks_of, cdiv, on_device
from .config import Config
from .forward import tiled_forward
from .tile import Static

_QUERY, _KEY, _VALUE, _BIAS, _REL_BIAS, _WEIGHT, _EXTRA_K, _EXTRA_V = (1 << n for n in range(8))


def forward(call: Call, out: Tensor, lse: Tensor) -> None:
    """Fill out and lse."""
    shape = call.config("forward")
    dims, widths = (call.q.shape[-1], call.v.shape[-1]), _widths(call, shape)
    blocks = cdiv(call.seqlen_q, shape.block_m)
    grid = (blocks * call.heads * call.batch * cdiv(dims[1], widths[1]),)
    if not grid[0]:
        return
    with on_device(out):
        tiled_forward[grid](
            call.rows(call.q), call.rows(call.k), call.rows(call.v), call.rows(out), call.vector(lse),
            *_shared(call), call.tile_lists(False), *call.lengths_and_band(blocks),
            S=call.static("forward"), M=shape.block_m, N=shape.block_n, BLOCK_D=widths[0], BLOCK_DV=widths[1],
            num_warps=shape.num_warps, num_stages=shape.num_stages,
        )  # fmt: skip


def backward(
    call: Call,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, ...],
    needs: int,
) -> None:
    """Fill the gradients that `needs` names, in the operator's order."""
    dq, dk, dv, dbias, drel_bias, dweight, dextra_k, dextra_v = grads
    if not call.batch * call.heads * call.seqlen_q:
        for grad in grads:
            grad.zero_()
        return
    with on_device(dout):
        dout = call.near(dout)
        state = (call.rows(dout), statistics(call, dout, dlse, out, lse))
        if needs & (_QUERY | _WEIGHT):
            _queries(call, state, dq if needs & _QUERY else None, dweight if needs & _WEIGHT else None)
        if needs & (_KEY | _VALUE):
            _keys(call, state, dk if needs & _KEY else None, dv if needs & _VALUE else None)
        if needs & (_EXTRA_K | _EXTRA_V):
            _extra(call, state, dextra_k, dextra_v, needs)
        if needs & _BIAS:
            from .bias import dense_gradient

            dense_gradient(call, state, dbias)
        if needs & _REL_BIAS:
            from .bias import relative_gradient

            relative_gradient(call, state, drel_bias)


def _widths(call: Call, shape: Config) -> tuple[int, int]:
    return blocks_of(shape, call.q.shape[-1]), blocks_of(shape, call.v.shape[-1])


def _shared(call: Call) -> tuple[Any, ...]:
    return call.terms(), call.mask(), call.packed()


def statistics(
    call: Call, dout: Tensor | None, dlse: Tensor | None, out: Tensor | None, lse: Tensor,
    static: Static | None = None,
) -> Statistics:  # fmt: skip
    """What the passes after the forward one need of each row, computed once; `static` as theirs."""
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    lse = lse.contiguous()  # what is found lies as it does; vmap gives expanded ones
    found = torch.empty((3, *lse.shape), dtype=wide, device=lse.device)
    row = call.vector(lse)
    stats = Statistics(found, runtime(lse.numel()), row.batch, row.head)
    shape = call.config("backward_q")
    blocks = cdiv(call.seqlen_q, shape.block_m)
    if call.has_lse and blocks * call.heads * call.batch:
        row_statistics[(blocks * call.heads * call.batch,)](
            None if out is None else call.rows(out), None if dout is None else call.rows(dout),
            None if dlse is None else call.vector(dlse.contiguous()), row, stats, call.terms(),
            call.packed(), call.seqlen_q, blocks,
            S=static or call.static(), M=shape.block_m, BLOCK_DV=blocks_of(shape, call.v.shape[-1]),
            num_warps=shape.num_warps,
        )  # fmt: skip
    return stats


def _queries(call: Call, state: tuple[Any, ...], dq: Tensor | None, dweight: Tensor | None) -> None:
    shape = call.config("backward_q")
    widths, dim = _widths(call, shape), call.q.shape[-1]
    blocks = cdiv(call.seqlen_q, shape.block_m)
    dout, stats = state
    shares = None
    if dweight is not None:
        shares = dweight.new_empty(call.batch, call.heads, blocks, dim)
    tiled_backward_q[(blocks * call.heads * call.batch * cdiv(dim, widths[0]),)](
        call.rows(call.q), call.rows(call.k), call.rows(call.v), dout,
        None if dq is None else call.rows(dq), shares, stats, *_shared(call), call.tile_lists(False),
        *call.lengths_and_band(blocks),
        S=call.static("backward_q"), M=shape.block_m, N=shape.block_n, BLOCK_D=widths[0], BLOCK_DV=widths[1],
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    if dweight is not None and shares is not None:
        torch.sum(shares, (0, 2), out=dweight)


def _keys(call: Call, state: tuple[Any, ...], dk: Tensor | None, dv: Tensor | None) -> None:
    shape = call.config("backward_kv")
    widths = _widths(call, shape)
    blocks = cdiv(call.seqlen_k, shape.block_n)
    ways = max(cdiv(call.q.shape[-1], widths[0]), cdiv(call.v.shape[-1], widths[1]))
    grid = (blocks * call.k.shape[1] * call.batch * ways,)
    if grid[0]:
        _launch_keys(call, state, (call.k, call.v, dk, dv), grid, blocks, shape, False)


def _extra(call: Call, state: tuple[Any, ...], dextra_k: Tensor, dextra_v: Tensor, needs: int) -> None:
    assert call.extra_k is not None and call.extra_v is not None
    shape = call.config("backward_kv")
    widths = _widths(call, shape)
    ways = max(cdiv(call.q.shape[-1], widths[0]), cdiv(call.v.shape[-1], widths[1]))
    wide = dextra_k.dtype
    shares = [torch.empty(call.batch, call.heads, 1, x.shape[-1], dtype=wide, device=x.device)
              for x in (call.extra_k, call.extra_v)]  # fmt: skip
    one = [x[None, :, None] for x in (call.extra_k, call.extra_v)]
    one = [x.expand(call.batch, -1, -1, -1) for x in one]
    _launch_keys(call, state, (*one, *shares), (call.heads * call.batch * ways,), 1, shape, True)
    for need, grad, share in ((_EXTRA_K, dextra_k, shares[0]), (_EXTRA_V, dextra_v, shares[1])):
        if needs & need:
            torch.sum(share[:, :, 0], 0, out=grad)


def _launch_keys(
    call: Call, state: tuple[Any, ...], tensors: tuple[Any, ...], grid: tuple[int], blocks: int, shape:
    Config, extra: bool,
) -> None:  # fmt: skip
    k, v, dk, dv = tensors
    dout, stats = state
    widths = _widths(call, shape)
    tiled_backward_kv[grid](
        call.rows(call.q), call.rows(k), call.rows(v), dout,
        None if dk is None else call.rows(dk), None if dv is None else call.rows(dv), stats,
        *_shared(call), call.tile_lists(True), *call.lengths_and_band(blocks),
        S=call.static("backward_kv"), M=shape.block_m, N=16 if extra else shape.block_n, BLOCK_D=widths[0],
        BLOCK_DV=widths[1], EXTRA=extra, num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
