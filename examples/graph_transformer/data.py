"""The graphs: Zachary's karate club, a stochastic block model, and molecules that differ in their ring."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from saccade import Graph
from saccade.nn import laplacian_encoding, random_walk_encoding
from torch import Tensor


@dataclass
class Nodes:
    """One graph whose nodes are to be classified; labels of the `train` nodes are known."""

    name: str
    graph: Graph
    x: Tensor  # [N, F]
    y: Tensor  # [N]
    train: Tensor  # [N] bool


def both_ways(pairs: Tensor) -> Tensor:
    return torch.cat([pairs, pairs.flip(0)], 1)


def karate() -> Nodes:
    """34 members of a club that split in two (Zachary, 1977); the sides of the two leaders are known.

    A node's features are its place in the graph: Laplacian eigenvectors and returns of random walks.
    """
    import networkx

    club = networkx.karate_club_graph()
    n = club.number_of_nodes()
    index = both_ways(torch.tensor(list(club.edges())).t())
    graph = Graph.from_edge_index(index, n).add_self_loops()
    x = torch.cat([10 * laplacian_encoding(graph, n, 4), random_walk_encoding(graph, n, 4)], 1)
    y = torch.tensor([int(club.nodes[i]["club"] == "Officer") for i in range(n)])
    train = torch.zeros(n, dtype=torch.bool)
    train[[0, n - 1]] = True
    return Nodes("karate club", graph, x, y, train)


def blocks(size: int = 1000, count: int = 4, inside: int = 8, across: int = 4, seed: int = 0) -> Nodes:
    """A stochastic block model (Holland, Laskey, Leinhardt, 1983): `count` groups of `size` nodes, each with
    about `inside` edges to its own group and `across` to others; features that say little about the group.
    """
    draw = torch.Generator().manual_seed(seed)
    n = size * count
    y = torch.arange(n) % count

    def sample(edges: int, same: bool) -> Tensor:
        source = torch.randint(n, (edges,), generator=draw)
        shift = torch.randint(0 if same else 1, 1 if same else count, (edges,), generator=draw)
        target = torch.randint(size, (edges,), generator=draw) * count + (y[source] + shift) % count
        return torch.stack([source, target])

    pairs = torch.cat([sample(n * inside // 2, True), sample(n * across // 2, False)], 1)
    graph = Graph.from_edge_index(both_ways(pairs), n).add_self_loops()
    x = torch.randn(n, 8, generator=draw) + torch.nn.functional.one_hot(y, 8)
    train = torch.rand(n, generator=draw) < 0.1
    return Nodes("block model", graph, x, y, train)


@dataclass
class Molecule:
    """Atoms and bonds; the question is whether its ring has six atoms or five."""

    graph: Graph
    x: Tensor  # [N, F]: kind of atom, returns of random walks
    bonds: Tensor  # [E, 2]: kind of each edge
    y: int


WALK = 8  # steps of the random-walk encoding
ATOMS = 4


def molecule(draw: random.Random, atoms: int = 16) -> Molecule:
    """A ring of five or six, and chains grown on it until there are `atoms`. The degrees say nothing."""
    ring = draw.choice((5, 6))
    pairs = [(i, (i + 1) % ring) for i in range(ring)]
    degree = [2] * ring
    for new in range(ring, atoms):
        at = draw.choice([i for i, d in enumerate(degree) if d < 3])
        pairs.append((at, new))
        degree[at] += 1
        degree.append(1)
    index = both_ways(torch.tensor(pairs).t())
    graph = Graph.from_edge_index(index, atoms)
    kinds = torch.tensor([draw.randrange(ATOMS) for _ in range(atoms)])
    bond = torch.tensor([draw.randrange(2) for _ in pairs] * 2)
    walks = random_walk_encoding(graph, atoms, WALK).sqrt()  # late returns are rare: the root shows them too
    x = torch.cat([torch.nn.functional.one_hot(kinds, ATOMS), walks], 1)
    return Molecule(graph, x, torch.nn.functional.one_hot(bond, 2).float(), int(ring == 6))


def molecules(count: int, seed: int) -> list[Molecule]:
    draw = random.Random(seed)
    return [molecule(draw, draw.randrange(10, 20)) for _ in range(count)]


@dataclass
class Batch:
    """Molecules side by side in one block-diagonal graph."""

    graph: Graph
    x: Tensor
    bonds: Tensor
    of: Tensor  # [N]: the molecule of each atom
    y: Tensor


def batch(some: list[Molecule]) -> Batch:
    sizes = torch.tensor([len(m.x) for m in some])
    return Batch(
        Graph.batch([m.graph for m in some]),
        torch.cat([m.x for m in some]),
        torch.cat([m.bonds for m in some]),
        torch.repeat_interleave(torch.arange(len(some)), sizes),
        torch.tensor([m.y for m in some]),
    )
