"""ListOps (Nangia, Bowman: 1804.06028), generated as the Long Range Arena (2011.04006) does.

    [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]   ->   5

Trees of depth 10 at most, operators of 2 to 10 arguments, each argument an operator with probability 1/4;
what is shorter than 500 tokens or longer than 2000 is thrown away. Other bounds make an easier task.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from saccade import Graph
from torch import Tensor

OPERATORS = ["[MIN", "[MAX", "[MED", "[SM"]
TOKENS = [*map(str, range(10)), *OPERATORS, "]"]
CLOSE, PAD = TOKENS.index("]"), len(TOKENS)
MAX_DEPTH, MAX_ARGS, OPERATOR_SHARE = 10, 10, 0.25
PAPER = (500, 2000)

Tree = int | tuple[str, list["Tree"]]


def tree(draw: random.Random, depth: int = 1) -> Tree:
    if depth >= MAX_DEPTH or draw.random() > OPERATOR_SHARE:
        return draw.randrange(10)
    values = [tree(draw, depth + 1) for _ in range(draw.randint(2, MAX_ARGS))]
    return draw.choice(OPERATORS), values


def value(node: Tree) -> int:
    """Minimum, maximum, median (rounded down) or sum modulo 10."""
    if isinstance(node, int):
        return node
    operator, arguments = node[0], sorted(value(x) for x in node[1])
    if operator == "[MED":
        half = len(arguments) // 2
        return arguments[half] if len(arguments) % 2 else (arguments[half - 1] + arguments[half]) // 2
    return {"[MIN": arguments[0], "[MAX": arguments[-1], "[SM": sum(arguments) % 10}[operator]


@dataclass
class Expression:
    """Tokens, their value, and pairs of places: operators with their arguments' first tokens and brackets."""

    tokens: list[int]
    value: int
    pairs: list[tuple[int, int]]


def write(node: Tree) -> Expression:
    tokens: list[int] = []
    pairs: list[tuple[int, int]] = []

    def visit(x: Tree) -> int:
        place = len(tokens)
        if isinstance(x, int):
            tokens.append(x)
            return place
        tokens.append(TOKENS.index(x[0]))
        pairs.extend((place, visit(argument)) for argument in x[1])
        pairs.append((place, len(tokens)))
        tokens.append(CLOSE)
        return place

    visit(node)
    return Expression(tokens, value(node), pairs)


def expressions(count: int, bounds: tuple[int, int], seed: int) -> list[Expression]:
    """`count` different expressions of bounds[0] to bounds[1] tokens."""
    draw, found, seen = random.Random(seed), [], set()
    while len(found) < count:
        one = write(tree(draw))
        if bounds[0] <= len(one.tokens) <= bounds[1] and tuple(one.tokens) not in seen:
            seen.add(tuple(one.tokens))
            found.append(one)
    return found


@dataclass
class Batch:
    """tokens [N, S] with PAD, values [N], and the tree of each as a graph over the N * S places."""

    tokens: Tensor
    values: Tensor
    tree: Graph

    @property
    def padding(self) -> Tensor:
        return self.tokens == PAD


def batch(some: list[Expression], multiple: int = 64) -> Batch:
    """S is a multiple of `multiple`, so that patterns over positions are made for few lengths."""
    longest = -(-max(len(x.tokens) for x in some) // multiple) * multiple
    tokens = torch.full((len(some), longest), PAD)
    for row, x in zip(tokens, some, strict=True):
        row[: len(x.tokens)] = torch.tensor(x.tokens)
    pairs = [
        torch.tensor(x.pairs, dtype=torch.int64).reshape(-1, 2).t() + n * longest for n, x in enumerate(some)
    ]
    down = torch.cat(pairs, 1)
    own = torch.arange(tokens.numel())[tokens.flatten() != PAD].expand(2, -1)
    edges = torch.cat([down, down.flip(0), own], 1)  # both ways, and every token itself
    graph = Graph.from_edge_index(edges, tokens.numel())
    return Batch(tokens, torch.tensor([x.value for x in some]), graph)


def spell(x: Expression) -> str:
    return " ".join(TOKENS[n] for n in x.tokens)
