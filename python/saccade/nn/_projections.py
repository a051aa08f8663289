"""The projections around attention. Weights are read by attribute at every call: they may be computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def project(module: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [..., H, D], k and v [..., Hk, D]: views of one product where inputs are the same object."""
    heads, dim = module.num_heads, module.head_dim
    heads_k = module.num_kv_heads or heads
    weight, bias = module.in_proj_weight, module.in_proj_bias
    if weight is not None and query is key and key is value:
        q, k, v = _heads(F.linear(query, weight, bias), dim, [heads, heads_k, heads_k])
    elif weight is not None and key is value:
        first = heads * dim
        q = F.linear(query, weight[:first], None if bias is None else bias[:first]).unflatten(
            -1, (heads, dim)
        )
        joint = F.linear(key, weight[first:], None if bias is None else bias[first:])
        k, v = _heads(joint, dim, [heads_k, heads_k])
    else:
        sizes = [heads * dim, heads_k * dim, heads_k * dim]
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        weights = weights if weight is None else weight.split(sizes)
        biases = (None, None, None) if bias is None else bias.split(sizes)
        parts = zip((query, key, value), weights, biases, strict=True)
        q, k, v = (F.linear(*part).unflatten(-1, (-1, dim)) for part in parts)
    return (module.q_norm(q), module.k_norm(k), v) if module.qk_norm else (q, k, v)


def project_query(module: Any, query: Tensor) -> Tensor:
    """q [..., H, D] alone."""
    size = module.num_heads * module.head_dim
    weight, bias = module.in_proj_weight, module.in_proj_bias
    weight = module.q_proj_weight if weight is None else weight[:size]
    q = F.linear(query, weight, None if bias is None else bias[:size]).unflatten(-1, (-1, module.head_dim))
    return module.q_norm(q) if module.qk_norm else q


def project_memory(module: Any, memory: Tensor) -> tuple[Tensor, Tensor]:
    """k and v [..., Hk, D] of one tensor."""
    first, dim = module.num_heads * module.head_dim, module.head_dim
    heads_k = module.num_kv_heads or module.num_heads
    weight, bias = module.in_proj_weight, module.in_proj_bias
    bias = None if bias is None else bias[first:]
    weight = torch.cat([module.k_proj_weight, module.v_proj_weight]) if weight is None else weight[first:]
    k, v = _heads(F.linear(memory, weight, bias), dim, [heads_k, heads_k])
    return (module.k_norm(k), v) if module.qk_norm else (k, v)


def _heads(joint: Tensor, dim: int, sizes: list[int]) -> tuple[Tensor, ...]:
    # Cut before heads and sequence change places: the gradients are joined where they lie.
    return torch.split_with_sizes(joint.view(*joint.shape[:-1], sum(sizes), dim), sizes, -2)


def project_out(module: Any, out: Tensor) -> Tensor:
    """[..., H, D] to [..., E]. torch too uses out_proj's weights without calling it."""
    return F.linear(out.flatten(-2), module.out_proj.weight, module.out_proj.bias)


def extra_key(module: Any) -> dict[str, Tensor]:
    """bias_k and bias_v as one more key of every head."""
    if module.bias_k is None or module.bias_v is None:
        return {}
    group = module.num_heads // (module.num_kv_heads or module.num_heads)
    found = {}
    for name, value in (("extra_k", module.bias_k), ("extra_v", module.bias_v)):
        rows = value.view(-1, module.head_dim)
        found[name] = rows.repeat_interleave(group, 0) if group > 1 else rows
    return found
