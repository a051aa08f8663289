"""Two toy languages: sentences whose words have parts of speech, and reviews with a verdict.

"I saw a saw": a word like "saw" is a verb or a noun by its place alone. "The plot was not good": an adjective
counts the other way round after a "not".
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

TAGS = ["PRON", "DET", "ADJ", "NOUN", "VERB", "AUX", "ADP"]
PLAIN = {
    "PRON": "i you we they she he".split(),
    "DET": "a the this every my".split(),
    "ADJ": "old red small loud good".split(),
    "NOUN": "dog house carpenter table river book".split(),
    "VERB": "bought found liked carried wanted".split(),
    "AUX": "will may must".split(),
    "ADP": "with near on behind".split(),
}
BOTH = "saw watch play fly light".split()  # noun, verb; "light" an adjective too
CAN = "can"  # auxiliary or noun
GOOD, BAD = "good great lovely funny clever".split(), "bad awful boring silly weak".split()
THINGS = "plot music acting ending camera dialogue".split()
GLUE = "the was and but not very".split()
WORDS = sorted({w for words in PLAIN.values() for w in words} | {*BOTH, CAN, *GOOD, *BAD, *THINGS, *GLUE})
NUMBER = {word: n + 1 for n, word in enumerate(WORDS)}  # 0 is padding
AMBIGUOUS = {NUMBER[w] for w in [*BOTH, CAN]}

Tagged = list[tuple[str, str]]


def _noun_phrase(draw: random.Random) -> Tagged:
    if draw.random() < 0.3:
        return [(draw.choice(PLAIN["PRON"]), "PRON")]
    found = [(draw.choice(PLAIN["DET"]), "DET")]
    if draw.random() < 0.3:
        found.append((draw.choice([*PLAIN["ADJ"], "light"]), "ADJ"))
    noun = draw.choice([*BOTH, CAN]) if draw.random() < 0.6 else draw.choice(PLAIN["NOUN"])
    return [*found, (noun, "NOUN")]


def sentence(draw: random.Random) -> Tagged:
    """Subject, perhaps an auxiliary, verb, object, perhaps where."""
    found = _noun_phrase(draw)
    if draw.random() < 0.4:
        found.append((draw.choice([*PLAIN["AUX"], CAN, CAN]), "AUX"))
    verb = draw.choice(BOTH) if draw.random() < 0.6 else draw.choice(PLAIN["VERB"])
    found += [(verb, "VERB"), *_noun_phrase(draw)]
    if draw.random() < 0.4:
        found += [(draw.choice(PLAIN["ADP"]), "ADP"), *_noun_phrase(draw)]
    return found


def review(draw: random.Random) -> tuple[list[str], int]:
    """Words and a verdict: 1 if what is praised outweighs what is not. "very" counts double."""
    while True:
        words: list[str] = []
        total = 0
        for n in range(draw.randint(1, 4)):
            good, negated, very = draw.random() < 0.5, draw.random() < 0.5, draw.random() < 0.3
            words += [] if n == 0 else [draw.choice(["and", "but"])]
            words += ["the", draw.choice(THINGS), "was"] + ["not"] * negated + ["very"] * very
            words.append(draw.choice(GOOD if good else BAD))
            total += (1 if good != negated else -1) * (2 if very else 1)
        if total:
            return words, int(total > 0)


@dataclass
class Batch:
    """words [N, S] int64 with 0 as padding; labels [N, S] (tags, -1 at padding) or [N] (verdicts)."""

    words: Tensor
    labels: Tensor

    @property
    def padding(self) -> Tensor:
        return self.words == 0


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    out = torch.full((len(rows), max(map(len, rows))), fill)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = torch.tensor(values)
    return out


def tagged(count: int, seed: int) -> Batch:
    draw = random.Random(seed)
    some = [sentence(draw) for _ in range(count)]
    words = [[NUMBER[w] for w, _ in one] for one in some]
    return Batch(_padded(words, 0), _padded([[TAGS.index(t) for _, t in one] for one in some], -1))


def reviews(count: int, seed: int) -> Batch:
    draw = random.Random(seed)
    some = [review(draw) for _ in range(count)]
    words = [[NUMBER[w] for w in one] for one, _ in some]
    return Batch(_padded(words, 0), torch.tensor([verdict for _, verdict in some]))


def spell(words: Tensor) -> list[str]:
    return [WORDS[n - 1] for n in words.tolist() if n]
