"""What is measured: attention with the sizes of real models, and sweeps over length, dtype and mask."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from saccade.masks import Causal, KeyPadding, Mask, Window

FORWARD, TRAIN, BACKWARD = "forward", "forward+backward", "backward"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One attention call. `directions`: what is measured of FORWARD, TRAIN (both passes) and BACKWARD."""

    name: str
    batch: int = 1
    heads: int = 8
    heads_k: int = 8
    seqlen_q: int = 1024
    seqlen_k: int = 1024
    head_dim: int = 64
    head_dim_v: int = 64
    dtype: str = "fp32"
    causal: bool = False
    window: tuple[int, int] | None = None
    lengths: tuple[int, ...] | None = None  # keys that are not padding, per batch entry
    bias: bool = False  # a [H, Sq, Sk] bias that needs a gradient
    dropout_p: float = 0.0
    directions: tuple[str, ...] = (FORWARD, TRAIN)
    flex: bool = False  # whether compiled flex_attention joins (it takes 6 to 20 s to compile)

    def mask(self) -> Mask | None:
        """The case's mask; the same object serves saccade, the check and the count of pairs."""
        parts: list[Mask] = []
        if self.causal:
            parts.append(Causal())
        if self.window is not None:
            parts.append(Window(*self.window))
        if self.lengths is not None:
            parts.append(KeyPadding(list(self.lengths)))
        whole = parts[0] if parts else None
        for part in parts[1:]:
            whole = whole & part if whole is not None else part
        return whole

    def pairs(self) -> int:
        """Kept (query, key) pairs over batch and heads, without writing the mask down."""
        first, last = self.bounds()
        rows = torch.arange(self.seqlen_q)
        total = 0
        for length in self.lengths or (self.seqlen_k,) * self.batch:
            low, high = (rows + first).clamp(min=0), (rows + last).clamp(max=length - 1)
            total += int((high - low + 1).clamp(min=0).sum())
        return total * self.heads

    def bounds(self) -> tuple[int, int]:
        """Query i keeps keys i + first to i + last, before they are clipped to those that exist."""
        shift, far = self.seqlen_k - self.seqlen_q, self.seqlen_q + self.seqlen_k
        left, right = self.window or (far, far)
        return shift - left, shift + (min(right, 0) if self.causal else right)

    def flops(self, direction: str) -> int:
        """Useful floating-point operations over kept pairs: QK' and PV, and five products more backward."""
        d, dv = self.head_dim, self.head_dim_v
        forward, backward = d + dv, 3 * d + 2 * dv
        parts = {FORWARD: forward, BACKWARD: backward, TRAIN: forward + backward}
        return 2 * self.pairs() * parts[direction]

    def plain(self) -> Case:
        """The same call without what may be costly: no dropout, no bias, values as wide as keys."""
        return replace(self, dropout_p=0.0, bias=False, head_dim_v=self.head_dim)

    def describe(self) -> dict[str, object]:
        """The columns of a result row that say what was measured."""
        return {
            "case": self.name,
            "dtype": self.dtype,
            "batch": self.batch,
            "heads": self.heads,
            "heads_k": self.heads_k,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v,
            "mask": repr(self.mask()) if self.mask() else "",
            "bias": self.bias,
            "dropout_p": self.dropout_p,
        }


@dataclass(frozen=True)
class Group:
    """Cases that are summarised by one geometric mean of speed against `peer`, per direction.

    `goal` is the mean the project wants, per direction, and `floor` the least for any single case. `others`
    are further peers with goals of their own; `note` is printed under the table.
    """

    name: str
    cases: tuple[Case, ...]
    peer: str = "sdpa"
    goal: dict[str, float] = field(default_factory=dict)
    floor: float | None = None
    others: dict[str, dict[str, float]] = field(default_factory=dict)
    note: str = ""


def square(name: str, length: int, **options: object) -> Case:
    """Self-attention over `length` positions."""
    return Case(name, seqlen_q=length, seqlen_k=length, **options)  # type: ignore[arg-type]


def few_queries(name: str, keys: int, queries: int = 1, **options: object) -> Case:
    """A step of decoding: `queries` positions over all keys of a cache, without gradients."""
    return Case(name, seqlen_q=queries, seqlen_k=keys, directions=(FORWARD,), **options)  # type: ignore[arg-type]


def decoding() -> list[Group]:
    """Steps of decoding with caches of many lengths, by one sequence and by several."""
    lengths = [few_queries(f"decode-k{n}", n) for n in (128, 512, 2048, 8192)]
    others = [
        few_queries("decode-b8-k128", 128, batch=8),
        few_queries("decode-b8-k1024", 1024, batch=8),
        few_queries("decode-k1024-d128", 1024, head_dim=128, head_dim_v=128),
        few_queries("decode-k2048-grouped", 2048, heads=32, heads_k=8, head_dim=128, head_dim_v=128),
        few_queries("decode-k1024-4-queries", 1024, 4),
    ]
    cases = tuple(lengths + others)
    low = tuple(replace(c, name=f"{c.name}-bf16", dtype="bf16") for c in cases)
    return [Group("decode fp32", cases), Group("decode bf16", low)]


def models() -> list[Group]:
    """One call with the sizes of a layer of well-known models."""
    gpt2 = square("gpt2-small", 1024, heads=12, heads_k=12, causal=True, flex=True)
    bert = square(
        "bert-base-padded", 128, batch=8, heads=12, heads_k=12, lengths=(128, 97, 64, 121, 33, 80, 128, 50)
    )
    vit = square("vit-b16", 197, batch=4, heads=12, heads_k=12)
    wav2vec = square("wav2vec2-30s", 1499, heads=12, heads_k=12)
    whisper = square("whisper-small-encoder", 1500, heads=12, heads_k=12)
    llm = Case(
        "llama-8b-prefill",
        heads=32,
        heads_k=8,
        seqlen_q=512,
        seqlen_k=512,
        head_dim=128,
        head_dim_v=128,
        causal=True,
    )
    decode = few_queries("llama-8b-decode", 4096, heads=32, heads_k=8, head_dim=128, head_dim_v=128)
    molecules = square("molecules-23", 23, batch=64, heads=4, heads_k=4, head_dim=16, head_dim_v=16)
    speech = square("speech-window", 3000, heads=4, heads_k=4, window=(128, 128))
    text = square(
        "local-causal", 2048, heads=8, heads_k=2, causal=True, window=(256, 0), head_dim=128, head_dim_v=128
    )
    plain = (gpt2, vit, wav2vec, whisper, llm, decode, molecules)
    low = tuple(
        replace(c, name=f"{c.name}-bf16", dtype="bf16", flex=False) for c in (gpt2, vit, whisper, llm, decode)
    )
    return [
        Group("models fp32", plain),
        Group("models bf16", low),
        Group("models, padded or windowed", (bert, speech, text), "sdpa-mask"),
    ]


LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
_TOKENS = 4096  # batch * length of the sweep, as far as one sequence allows


def sweep() -> list[Group]:
    """Length 128 to 8192, head_dim 64 and 128, fp32 and bf16, full and causal."""
    goals = {
        ("fp32", False): {FORWARD: 1.1, TRAIN: 1.1},
        ("fp32", True): {FORWARD: 1.4, TRAIN: 1.4},
        ("bf16", False): {FORWARD: 1.3, TRAIN: 2.0},
        ("bf16", True): {FORWARD: 1.3, TRAIN: 2.0},
    }
    groups = []
    for (dtype, causal), goal in goals.items():
        kind = "causal" if causal else "full"
        cases = tuple(
            square(
                f"{dtype}-{kind}-d{d}-n{n}",
                n,
                batch=max(1, _TOKENS // n),
                dtype=dtype,
                causal=causal,
                head_dim=d,
                head_dim_v=d,
            )
            for d in (64, 128)
            for n in LENGTHS
        )
        floor = 0.95 if (dtype, causal) == ("fp32", False) else None
        groups.append(Group(f"{dtype} {kind}", cases, "sdpa", goal, floor))
    return groups


def windows() -> list[Group]:
    """Windows of +-64 and +-256 over 8192 positions, beside torch with a mask and compiled flex_attention."""
    groups = []
    for dtype, goals in (("fp32", {64: 45.0, 256: 28.0}), ("bf16", {64: 32.0, 256: 20.0})):
        others = {"flex": {FORWARD: 3.0 if dtype == "fp32" else 2.0}}
        for reach, mean in goals.items():
            case = square(f"{dtype}-window{reach}-n8192", 8192, dtype=dtype, window=(reach, reach), flex=True)
            goal = {FORWARD: mean, TRAIN: mean}
            groups.append(Group(f"{dtype} window +-{reach}", (case,), "sdpa-mask", goal, others=others))
    return groups


def options() -> list[Group]:
    """Dropout, a bias with gradient, Dv != D, each beside saccade's own plain call, per operation."""
    groups = []
    for dtype, goal in (("fp32", {FORWARD: 1 / 1.5, TRAIN: 1 / 1.5}), ("bf16", {})):
        base = square("", 1024, batch=2, dtype=dtype)
        cases = (
            replace(base, name=f"{dtype}-dropout", dropout_p=0.1),
            replace(base, name=f"{dtype}-bias-gradient", bias=True),
            replace(base, name=f"{dtype}-dv32", head_dim_v=32),
            replace(base, name=f"{dtype}-dv128", head_dim_v=128),
        )
        groups.append(
            Group(f"{dtype} options, beside plain", cases, "saccade-plain", goal, goal.get(FORWARD))
        )
    return groups


@dataclass(frozen=True)
class ModuleCase:
    """One call of nn.MultiheadAttention, torch's and the same module swapped."""

    name: str
    length: int
    batch: int
    embed_dim: int = 512
    num_heads: int = 8
    dtype: str = "fp32"
    training: bool = True
    causal: bool = False
    padding: bool = False
    need_weights: bool = False

    def describe(self) -> dict[str, object]:
        """The columns of a result row that say what was measured."""
        head_dim = self.embed_dim // self.num_heads
        kept = [n for n in ("causal", "padding", "need_weights") if getattr(self, n)]
        return {
            "case": self.name,
            "dtype": self.dtype,
            "batch": self.batch,
            "heads": self.num_heads,
            "heads_k": self.num_heads,
            "seqlen_q": self.length,
            "seqlen_k": self.length,
            "head_dim": head_dim,
            "head_dim_v": head_dim,
            "mask": " ".join(kept),
            "bias": False,
            "dropout_p": 0.0,
        }

    def flops(self) -> int:
        """Projections and attention, masked pairs too; three times that with the backward pass."""
        tokens, e = self.batch * self.length, self.embed_dim
        return (8 * tokens * e * e + 4 * tokens * self.length * e) * (3 if self.training else 1)


def modules() -> list[Group]:
    """nn.MultiheadAttention end to end, E 512, train and eval, length 128 to 2048, every kind of mask."""
    kinds: dict[str, dict[str, bool]] = {
        "full": {},
        "causal": {"causal": True},
        "padded": {"padding": True},
        "weights": {"need_weights": True},
    }
    groups = []
    for dtype in ("fp32", "bf16"):
        for kind, flags in kinds.items():
            better = 1.3 if kind == "weights" else 1.05 if (dtype, kind) == ("fp32", "full") else 1.2
            cases = tuple(
                ModuleCase(
                    f"mha-{dtype}-{kind}-{'train' if training else 'eval'}-n{n}",
                    n,
                    max(1, 4096 // n),
                    dtype=dtype,
                    training=training,
                    **flags,
                )
                for training in (True, False)
                for n in (128, 256, 512, 1024, 2048)
            )
            goal = {FORWARD: better, TRAIN: better}
            groups.append(Group(f"module {dtype} {kind}", cases, "torch", goal, 1.0))  # type: ignore[arg-type]
    return groups
