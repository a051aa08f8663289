"""Voices by a source-filter synthesiser: glottal harmonics and noise through a vocal tract of four formants.

Written straight as log mel spectrograms: of every frame the power of source times filter, then 40 mel bands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RATE, BINS, MELS, FRAMES_PER_SECOND = 16000, 257, 40, 100
FLOOR = 1e-9  # log: -20.7

# Formants in Hz (Peterson and Barney's averages, roughly) and the level of voice and of noise.
PHONES = {
    "a": ((730, 1090, 2440, 3400), 1.0, 0.0),
    "e": ((530, 1840, 2480, 3500), 1.0, 0.0),
    "i": ((270, 2290, 3010, 3700), 0.8, 0.0),
    "o": ((570, 840, 2410, 3300), 1.0, 0.0),
    "u": ((300, 870, 2240, 3200), 0.8, 0.0),
    "@": ((500, 1500, 2500, 3500), 0.8, 0.0),
    "m": ((250, 1100, 2100, 3000), 0.35, 0.0),
    "l": ((360, 1300, 2700, 3400), 0.5, 0.0),
    "s": ((4500, 5500, 6500, 7500), 0.0, 0.25),
    "sh": ((2300, 3200, 4500, 6000), 0.0, 0.25),
    "z": ((300, 4500, 5500, 6500), 0.3, 0.15),
    " ": ((500, 1500, 2500, 3500), 0.0, 0.0),
}


@dataclass
class Voice:
    """What makes a speaker."""

    pitch: float  # Hz
    tract: float  # formants are scaled by it: short tracts are above 1
    offsets: Tensor  # [4], formants once more, each its own
    tilt: float  # dB per octave of the source
    breath: float  # noise in the voice
    rate: float  # phones per second
    swing: float  # of the pitch, in octaves


def voice(draw: torch.Generator) -> Voice:
    def between(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=draw).item()

    return Voice(
        pitch=math.exp(between(math.log(85), math.log(260))),
        tract=between(0.86, 1.18),
        offsets=1 + 0.06 * torch.randn(4, generator=draw),
        tilt=between(-15, -7),
        breath=between(0.01, 0.12),
        rate=between(8, 14),
        swing=between(0.05, 0.25),
    )


def mel_bands() -> Tensor:
    """[40, 257]: triangles, equally far apart in mel = 2595 log10(1 + f / 700)."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, MELS + 2, dtype=torch.float64) / 2595) - 1)
    f = torch.linspace(0, RATE / 2, BINS, dtype=torch.float64)
    up = (f - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - f) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(up, down).clamp(min=0).float()


BANDS = mel_bands()


def utterance(who: Voice, seconds: float, draw: torch.Generator) -> Tensor:
    """The log mel spectrogram [frames, 40] of `who` saying anything, in a room and at a level of its own."""
    frames = int(seconds * FRAMES_PER_SECOND)
    formants, voiced, noise = _track(who, frames, draw)  # [T, 4], [T], [T]
    t = torch.arange(frames) / FRAMES_PER_SECOND
    phase = 2 * math.pi * torch.rand(2, generator=draw)
    swing = torch.sin(2 * math.pi * 0.7 * t + phase[0]) + 0.3 * torch.sin(2 * math.pi * 4 * t + phase[1])
    pitch = who.pitch * 2 ** (who.swing * swing)
    f = torch.linspace(0, RATE / 2, BINS)
    # The window smears every harmonic over about 30 Hz; the nearest one counts.
    number = torch.round(f / pitch[:, None]).clamp(min=1)
    lobe = torch.exp(-((f - number * pitch[:, None]) ** 2) / (2 * 28.0**2))
    slope = (f.clamp(min=60) / 200) ** (who.tilt / (10 * math.log10(2)))  # in power
    grain = torch.empty(frames, BINS).exponential_(generator=draw)
    source = voiced[:, None] * slope * (lobe + who.breath * grain) + noise[:, None] * 0.02 * grain
    power = source * _filter(formants, f)
    room = 10 ** (0.3 * torch.randn((), generator=draw) + 0.1 * torch.randn((), generator=draw) * f / 4000)
    power = power * room + 1e-6 * 10 ** torch.rand((), generator=draw) * grain
    return torch.log((power @ BANDS.t()).clamp(min=FLOOR))


def _track(who: Voice, frames: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random phones, one gliding into the next."""
    phones = list(PHONES.values())
    count = int(frames / FRAMES_PER_SECOND * who.rate) + 2
    order = torch.randint(len(phones), (count,), generator=draw).tolist()
    targets = torch.tensor([[*phones[n][0], phones[n][1], phones[n][2]] for n in order])  # [count, 6]
    place = torch.linspace(0, count - 1, frames)
    at = place.long().clamp(max=count - 2)
    glide = ((place - at - 0.5) * 2 + 0.5).clamp(0, 1)[:, None]
    mixed = targets[at] * (1 - glide) + targets[at + 1] * glide
    return mixed[:, :4] * who.tract * who.offsets, mixed[:, 4], mixed[:, 5]


def _filter(formants: Tensor, f: Tensor) -> Tensor:
    """|H|^2 [T, 257] of resonances at `formants` [T, 4], their bandwidths growing with frequency."""
    centre = formants[..., None]
    half = (25 + 0.03 * centre) ** 2
    gain = (centre**2 + half) ** 2 / (((f - centre) ** 2 + half) * ((f + centre) ** 2 + half))
    return gain.prod(1)
