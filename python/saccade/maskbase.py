"""The base of all masks. `Mask.keep` is the single definition; every kernel's own form is compared with it in
the tests.

A mask is an immutable object; masks are joined with `&`. True means keep.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from .graph import Graph

_PROXY = torch._C._TorchDispatchModeKey.PROXY
_TRACERS = (_PROXY, torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.FUNCTIONAL)
_TRANSFORMS = "FuncTorchDynamicLayerFrontMode"  # the dispatch key of torch.func
UNBOUNDED = 1 << 62  # a bound no position reaches; twice it still fits in int64
Index = Tensor | int


@dataclass(frozen=True, slots=True, eq=False)
class MaskArgs:
    """A mask in the one normal form the operators take."""

    band: tuple[int, int, int, int] = (UNBOUNDED,) * 4  # left_end, right_end, left_start, right_start
    head_bounds: Tensor | None = None  # [H, 4] int64, replaces band
    chunks: tuple[int, ...] = ()  # (size, left) pairs, flattened
    lengths: Tensor | None = None  # [B] int64
    keep: Tensor | None = None  # [B, Sk] bool
    q_ids: Tensor | None = None  # [B, Sq] int32
    k_ids: Tensor | None = None  # [B, Sk] int32
    graph: Graph | None = None

    @property
    def is_band(self) -> bool:
        return self.lengths is None and self.keep is None and self.q_ids is None and self.graph is None

    @property
    def is_band_alone(self) -> bool:
        """One band for all heads and nothing else."""
        return self.is_band and self.head_bounds is None and not self.chunks

    @property
    def is_graph_alone(self) -> bool:
        """A graph and nothing else: a pair is kept iff it is an edge."""
        parts = (self.head_bounds, self.lengths, self.keep, self.q_ids)
        return all(x is None for x in parts) and not self.chunks and self.band == NO_MASK.band


NO_MASK = MaskArgs()


@dataclass(frozen=True, slots=True)
class Dims:
    """What a mask must fit: `seqlen_*` are the longest sequences where there are several (`ragged`)."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    device: torch.device
    ragged: bool = False


class Mask:
    """Which pairs (query i, key j) are kept, for each batch entry b and head h."""

    __slots__ = ("_resolved",)

    @property
    def parts(self) -> tuple[Mask, ...]:
        return (self,)

    def keep(self, b: Index, h: Index, i: Tensor, j: Tensor, sq: Index, sk: Index) -> Tensor:
        """The definition: a boolean of the broadcast shape of the int64 indices `b, h, i, j`.

        `sq` and `sk` are the numbers of queries and keys of the sequence, ints or tensors that broadcast too.
        """
        raise NotImplementedError

    def check(self, dims: Dims) -> None:
        """Raise ValueError where this part cannot serve such a call. Reads shapes only, never values."""

    def to(self, device: torch.device | str) -> Mask:
        """The same mask with its tensors on `device`."""
        return self

    @property
    def num_batch(self) -> int | None:
        """The number of batch entries the values are given for; None where they hold for every one."""
        return None

    @property
    def num_heads(self) -> int | None:
        """The number of heads the values are given for; None where they hold for every one."""
        return None

    @property
    def device(self) -> torch.device | None:
        """Where the values are; None without tensors."""
        return None

    @property
    def static(self) -> MaskArgs | None:
        """The normal form where it is the same for every call: bands of plain ints. None otherwise."""
        return None

    @property
    def graph(self) -> Graph | None:
        """The edges that are kept where only edges are."""
        return None

    def __and__(self, other: object) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        from .join import And

        return And(self.parts + other.parts)

    def materialize(self, seqlen_q: int, seqlen_k: int) -> Tensor:
        """The dense boolean, [Sq, Sk] with leading [B] and [H] where the parts need them. For tests and
        pictures.
        """
        dims = Dims(
            1 if self.num_batch is None else self.num_batch,
            1 if self.num_heads is None else self.num_heads,
            seqlen_q,
            seqlen_k,
            self.device or torch.device("cpu"),
            True,
        )
        for part in self.parts:
            part.check(dims)

        def axis(n: int, dim: int) -> Tensor:
            return torch.arange(n, device=dims.device).view([-1 if d == dim else 1 for d in range(4)])

        full = self.keep(
            axis(dims.batch, 0), axis(dims.heads, 1), axis(seqlen_q, 2), axis(seqlen_k, 3), seqlen_q, seqlen_k
        )
        full = full.expand(dims.batch, dims.heads, seqlen_q, seqlen_k)
        if self.num_heads is None:
            full = full[:, 0]
        return (full[0] if self.num_batch is None else full).contiguous()

    def plot(self, seqlen_q: int, seqlen_k: int, ax: Any = None) -> Any:
        """Draw the mask with matplotlib: kept pairs dark, one picture per batch entry and head. Returns the
        axes.
        """
        import matplotlib.pyplot as plt

        pictures = self.materialize(seqlen_q, seqlen_k).reshape(-1, seqlen_q, seqlen_k).cpu()
        if ax is None:
            _, ax = plt.subplots(1, len(pictures), squeeze=False)
            ax = ax[0, 0] if len(pictures) == 1 else ax[0]
        for axes, picture in zip([ax] if len(pictures) == 1 else ax, pictures, strict=True):
            axes.imshow(picture.numpy(), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xlabel="key j", ylabel="query i", title=repr(self))
        return ax

    def prepare(self) -> Mask:
        """Builds every cached form of the graphs inside now, so that compiled and captured calls find them.
        Returns the mask itself.
        """
        return self

    def resolve(self, dims: Dims) -> MaskArgs:
        """The normal form for a call of these dimensions; kept for the next call of the same ones."""
        from .join import resolve

        if torch.compiler.is_compiling() or has_modes():  # traced or fake tensors are not for the next call
            return resolve(self, dims)
        last = getattr(self, "_resolved", None)
        if last is None or last[0] != dims:
            with plainly():
                last = (dims, resolve(self, dims))
            object.__setattr__(self, "_resolved", last)
        return last[1]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable")

    def __getstate__(self) -> dict[str, Any]:
        names = [n for c in type(self).__mro__ for n in getattr(c, "__slots__", ())]
        return {n: getattr(self, n) for n in names if n != "_resolved" and hasattr(self, n)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        set_fields(self, **state)


def values_are_known(x: Tensor) -> bool:
    """False on the meta device, for fake tensors and while a call is traced: masks made there are not checked
    (kernels clamp what they count).
    """
    return not x.is_meta and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def has_modes() -> bool:
    """Whether a FakeTensorMode, a tracer or another dispatch mode is active."""
    return torch._C._len_torch_dispatch_stack() > 0


def unwatched(x: Tensor) -> bool:
    """Whether the values of `x` may be read, and what they say be kept: it has some, and no compiler, tracer
    or transform looks on, which would take the answer for a constant. Modes that only count or save may look
    on: a checkpoint that computes again outside of them must do the same.
    """
    if not values_are_known(x) or _has_tracers():
        return False
    if forward_ad._current_level >= 0 and x.is_floating_point():
        return False  # it may have a tangent
    in_transform = torch._C._functorch.peek_interpreter_stack() is not None
    return not in_transform or torch._C._dispatch_tls_is_dispatch_key_excluded(_TRANSFORMS)  # by `plainly`


def _has_tracers() -> bool:
    """Whether torch.jit.trace, make_fx or a FakeTensorMode is active."""
    if torch._C._get_tracing_state() is not None:
        return True
    before = torch._ops._get_dispatch_mode_pre_dispatch(_PROXY) is not None
    return before or has_modes() and any(torch._C._get_dispatch_mode(k) is not None for k in _TRACERS)


@contextlib.contextmanager
def plainly(*given: object) -> Iterator[None]:
    """For what is kept between calls: tensors made here are plain ones, whatever mode the caller is in. Fake
    ones, those of a tracer, of a transform of torch.func and of inference mode would serve no other caller.
    """
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if not (transformed or has_modes() or torch.is_inference_mode_enabled()):  # mostly, and a stack is slow
        with torch.no_grad():
            yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if has_modes():
            stack.enter_context(_disable_current_modes())
        if transformed and not any(map(_is_wrapped, given)):
            stack.enter_context(torch._C._DisableFuncTorch())
        yield


def _is_wrapped(x: object) -> bool:
    """Whether a transform of torch.func holds the values."""
    return isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x)


_Given = ParamSpec("_Given")
_Built = TypeVar("_Built")


def untraced(what: str) -> Callable[[Callable[_Given, _Built]], Callable[_Given, _Built]]:
    """For functions whose results have sizes that torch.compile cannot know (how many edges there are), and
    are kept: called by a compiled function they run outside of it; with fullgraph=True the error says `what`.
    What they make is plain in every mode.
    """

    def decorate(build: Callable[_Given, _Built]) -> Callable[_Given, _Built]:
        outside: list[Callable[_Given, _Built]] = []

        @functools.wraps(build)
        def plain(*args: _Given.args, **kwargs: _Given.kwargs) -> _Built:
            given = (*args, *kwargs.values())
            if has_modes() and any(isinstance(x, FakeTensor) for x in given):
                raise RuntimeError(f"saccade builds from real tensors, these are fake: {what}")
            with plainly(*given):
                return build(*args, **kwargs)

        @functools.wraps(build)
        def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Built:
            if not torch.compiler.is_dynamo_compiling():
                return plain(*args, **kwargs)
            torch._dynamo.graph_break(msg=f"saccade builds outside of compiled functions: {what}")
            if not outside:  # made earlier it would import the compiler, for over a second, with the package
                outside.append(torch.compiler.disable(plain))
            return outside[0](*args, **kwargs)

        return run

    return decorate


def set_fields(obj: object, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(obj, name, value)
