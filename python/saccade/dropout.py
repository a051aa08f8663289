"""Which pairs dropout keeps: Philox4x32-10 in plain PyTorch, the twin of the kernels'.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). Key: the 64-bit seed; counter: (j >> 3,
i, h, b); pair j reads the 16-bit lane j & 7 of the result (word lane >> 1, low half first) and is kept iff it
reaches the threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import as_int, is_int, probability

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def threshold(dropout_p: float) -> int:
    """Lanes below this are dropped."""
    return int(dropout_p * 65536.0 + 0.5)


def philox(
    seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words, as int64 tensors, for broadcastable int64 counters and a seed [1] int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # The product wraps to a signed 64-bit number; its bits are right and the mask undoes the signed
        # shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def kept(seed: Tensor, dropout_p: float, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """True where pair (i, j) of head h and batch entry b is kept; int64 indices that broadcast."""
    words = philox(seed, (j >> 3, i, h, b))
    lane = j & 7
    word = torch.where(
        lane < 4, torch.where(lane < 2, words[0], words[1]), torch.where(lane < 6, words[2], words[3])
    )
    return ((word >> (16 * (lane & 1))) & 0xFFFF) >= threshold(dropout_p)


def as_seed(seed: object, device: torch.device) -> Tensor:
    """The [1] int64 tensor of a call. None draws from torch's generator of the device, without a
    synchronisation.
    """
    if seed is None:
        return torch.randint(-(1 << 63), (1 << 63) - 1, (1,), device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            got = f"{seed.dtype} {list(seed.shape)} on {seed.device}"
            raise ValueError(f"seed: expected an int64 tensor of one element on {device}, got {got}")
        return seed.reshape(1)
    if not is_int(seed):
        raise TypeError(f"seed: expected an int or an int64 tensor of one element, got {type(seed).__name__}")
    wrapped = (as_int(seed) + (1 << 63)) % (1 << 64) - (1 << 63)
    return torch.full((1,), wrapped, dtype=torch.int64, device=device)


def dropout_mask(seed: int | Tensor, dropout_p: float, B: int, H: int, Sq: int, Sk: int) -> Tensor:
    """[B, H, Sq, Sk] bool, True where a weight is kept: the mask every backend uses for this seed."""
    device = seed.device if isinstance(seed, Tensor) else torch.device("cpu")
    p = probability("dropout_p", dropout_p)

    def axis(n: int, dim: int) -> Tensor:
        return torch.arange(n, device=device).view([-1 if d == dim else 1 for d in range(4)])

    for name, size in (("B", B), ("H", H), ("Sq", Sq), ("Sk", Sk)):
        if not is_int(size):
            raise TypeError(f"{name}: expected an int, got {type(size).__name__}")
        if size < 0:
            raise ValueError(f"{name}: expected a size >= 0, got {size}")
    if seed is None:
        raise TypeError("seed: expected an int or an int64 tensor of one element, got None")
    return kept(as_seed(seed, device), p, axis(B, 0), axis(H, 1), axis(Sq, 2), axis(Sk, 3)).expand(
        B, H, Sq, Sk
    )
