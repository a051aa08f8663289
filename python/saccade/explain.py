"""`saccade.explain`: which backend runs a call, with which kernel, and why not the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import backends
from .problem import Problem, check_options


@dataclass(frozen=True)
class Explanation:
    """`backend` and `kernel` that run the call; `reasons`: for every other backend, why not."""

    backend: str
    kernel: str
    reasons: dict[str, list[str]]
    problem: str

    def __str__(self) -> str:
        width = max(map(len, (*self.reasons, self.backend)))
        lines = [self.problem, f"-> {self.backend:<{width}}  {self.kernel}"]
        lines += [f"   {name:<{width}}  {'; '.join(why)}" for name, why in self.reasons.items()]
        return "\n".join(lines)


def explain(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *, backend: str | None = None, **options: Any
) -> Explanation:
    """What `saccade.attention` would do with the same arguments; nothing is computed. Raises what it would
    raise.
    """
    check_options("explain", {n: x for n, x in options.items() if n != "return_lse"})
    problem = Problem.of(q, k, v, mask, **options)
    chosen = backends.choose(problem, backend)
    why = backends.reasons(problem)
    others = {n: r or [f"can, but {chosen.NAME} comes first"] for n, r in why.items() if n != chosen.NAME}
    return Explanation(chosen.NAME, chosen.kernel(problem), others, _headline(problem))


def _headline(problem: Problem) -> str:
    spec = problem.spec
    heads = f"{spec.heads}" if spec.heads == spec.heads_k else f"{spec.heads}/{spec.heads_k}"
    shape = f"batch {spec.batch}, heads {heads}, {spec.seqlen_q} queries, {spec.seqlen_k} keys"
    dims = f"{spec.head_dim}" if spec.head_dim == spec.head_dim_v else f"{spec.head_dim}/{spec.head_dim_v}"
    kind = str(problem.q.dtype).removeprefix("torch.")
    return f"attention: {shape}, head_dim {dims}, {kind} on {problem.q.device}, mask {spec.mask!r}"


def list_backends() -> list[str]:
    """The names of the backends this machine has, best first."""
    return backends.available()
