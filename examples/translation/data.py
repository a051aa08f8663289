"""Numbers in words and in digits: "three hundred and five thousand twelve" -> "3 0 5 0 1 2"."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

PAD, BOS, EOS = 0, 1, 2
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SCALES = ["", "thousand", "million"]
WORDS = [*ONES, *TENS, "hundred", "and", *SCALES[1:]]
SOURCE = {word: n + 3 for n, word in enumerate(WORDS)}
DIGITS = {str(d): d + 3 for d in range(10)}
NAMES = {n: digit for digit, n in DIGITS.items()}


def words(number: int, british: bool = False) -> list[str]:
    """English words; British ones have an "and" after the hundreds."""
    if number == 0:
        return ["zero"]
    groups = []
    while number:
        groups.append(number % 1000)
        number //= 1000
    found: list[str] = []
    for scale in range(len(groups) - 1, -1, -1):
        found += _group(groups[scale], british)
        if scale and groups[scale]:
            found.append(SCALES[scale])
    return found


def _group(number: int, british: bool) -> list[str]:
    found = []
    if number >= 100:
        found += [ONES[number // 100], "hundred"]
        if british and number % 100:
            found.append("and")
    number %= 100
    if number >= 20:
        found.append(TENS[number // 10 - 2])
        number %= 10
    return [*found, ONES[number]] if number else found


def draw(source: random.Random, held_out: bool) -> int:
    """A number of one to nine digits; a tenth of all numbers is never trained on."""
    while True:
        number = source.randrange(10 ** source.randint(1, 9))
        if (number * 2654435761 % 2**32 % 10 == 0) == held_out:
            return number


@dataclass
class Pairs:
    """A batch: `source` [N, S] and `target` [N, T] int64, the latter with END, both padded with PAD."""

    source: Tensor
    target: Tensor

    @property
    def padding(self) -> Tensor:
        return self.source == PAD

    @property
    def source_lengths(self) -> Tensor:
        return (self.source != PAD).sum(1)

    @property
    def target_lengths(self) -> Tensor:
        return (self.target != PAD).sum(1)


def pairs(count: int, seed: int, held_out: bool = False) -> Pairs:
    generator = random.Random(seed)
    numbers = [draw(generator, held_out) for _ in range(count)]
    said = [[SOURCE[w] for w in words(n, generator.random() < 0.5)] for n in numbers]
    written = [[*(DIGITS[d] for d in str(n)), EOS] for n in numbers]
    return Pairs(_padded(said), _padded(written))


def _padded(rows: list[list[int]]) -> Tensor:
    out = torch.full((len(rows), max(map(len, rows))), PAD)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = torch.tensor(values)
    return out


def sentence(tokens: Tensor) -> str:
    """Digits between spaces, up to END."""
    found = []
    for token in tokens.tolist():
        if token in (EOS, PAD):
            break
        found.append(NAMES.get(token, "?"))
    return " ".join(found)


def phrase(tokens: Tensor) -> list[str]:
    return [WORDS[n - 3] for n in tokens.tolist() if n > EOS]
