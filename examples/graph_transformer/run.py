"""Trains graph Transformers: on Zachary's karate club, on a stochastic block model, on batches of molecules.

Node classification: who goes with whom, from two known members, and from a tenth of noisy nodes. Graph
classification: whether a molecule's ring has five or six atoms, which degrees and neighbours do not tell but
random-walk encodings do. Leaves a picture of the attention on the graphs and a CSV of the losses in
results/.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from data import ATOMS, WALK, Batch, Nodes, batch, blocks, karate, molecules
from model import GraphClassifier, NodeClassifier
from torch import Tensor
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
STEPS = {"karate club": 60, "block model": 30, "molecules": 100}
BATCH = 32
Report = Callable[[float], None]


@contextmanager
def progress(title: str, steps: int) -> Iterator[Report]:
    """A bar where rich is installed, else nothing until the end."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda loss: None
        return
    text = TextColumn("{task.description:<34}")
    with Progress(text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task(title, total=steps)
        yield lambda loss: bar.update(task, advance=1, description=f"{title}: loss {loss:.3f}")


def optimise(model: torch.nn.Module, loss_of: Callable[[int], Tensor], title: str, steps: int) -> list[float]:
    """Adam; the loss of every step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=1e-4)
    losses: list[float] = []
    model.train()
    with progress(title, steps) as report:
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_of(step)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            report(losses[-1])
    model.eval()
    return losses


def train_nodes(data: Nodes, steps: int) -> tuple[NodeClassifier, list[float], float]:
    """The model, its losses, and the share of the other nodes that it gets right."""
    torch.manual_seed(0)
    model = NodeClassifier(data.x.shape[1], int(data.y.max()) + 1)

    def loss_of(step: int) -> Tensor:
        return F.cross_entropy(model(data.x, data.graph)[data.train], data.y[data.train])

    losses = optimise(model, loss_of, data.name, steps)
    with torch.no_grad():
        right = model(data.x, data.graph).argmax(-1) == data.y
    return model, losses, right[~data.train].float().mean().item()


def train_molecules(
    steps: int, seen: int = 512, held_out: int = 256
) -> tuple[Any, list[float], float, Batch]:
    """The same for molecules, with the batch it was tested on."""
    torch.manual_seed(0)
    some, test = molecules(seen, 0), batch(molecules(held_out, 1))
    model = GraphClassifier(ATOMS + WALK, 2, edge_dim=2)
    batches = [batch(some[n : n + BATCH]) for n in range(0, seen, BATCH)]

    def loss_of(step: int) -> Tensor:
        b = batches[step % len(batches)]
        return F.cross_entropy(model(b.x, b.graph, b.bonds, b.of, len(b.y)), b.y)

    losses = optimise(model, loss_of, "molecules", steps)
    with torch.no_grad():
        found = model(test.x, test.graph, test.bonds, test.of, len(test.y)).argmax(-1)
    return model, losses, (found == test.y).float().mean().item(), test


def draw_attention(ax: Any, index: Tensor, weights: Tensor, colours: Any, title: str) -> None:
    """A graph with the weight of its edges: the wider and darker, the more the target looks at the source."""
    import networkx

    drawing = networkx.DiGraph()
    drawing.add_nodes_from(range(len(colours)))
    for (source, target), weight in zip(index.t().tolist(), weights.tolist(), strict=True):
        if source != target:
            drawing.add_edge(source, target, weight=weight)
    places = networkx.spring_layout(drawing.to_undirected(), seed=0)
    strength = [drawing[a][b]["weight"] for a, b in drawing.edges]
    networkx.draw_networkx_nodes(drawing, places, node_color=colours, cmap="tab10", node_size=90, ax=ax)
    networkx.draw_networkx_edges(
        drawing, places, edge_color=strength, edge_cmap=ax.figure.colormap, edge_vmin=0, ax=ax,
        width=[0.3 + 3 * s for s in strength], arrowsize=6, node_size=90, connectionstyle="arc3,rad=0.12",
    )  # fmt: skip
    ax.set_title(title, fontsize=10)
    ax.axis("off")


def draw(path: Path, club: Any, group: Any, molecule: Any, curves: dict[str, list[float]]) -> bool:
    """Attention on the club, between the blocks, on a molecule; the losses. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(20, 5), layout="constrained")
    figure.colormap = plt.get_cmap("viridis_r")
    with torch.no_grad():
        data, model = club
        draw_attention(
            axes[0],
            data.graph.edge_index,
            model.attention(data.x, data.graph),
            data.y,
            "karate club, by side",
        )
        data, model = group
        count = int(data.y.max()) + 1
        source, target = data.graph.edge_index
        shares = torch.zeros(count * count).index_add(
            0, data.y[target] * count + data.y[source], model.attention(data.x, data.graph)
        )
        shares = shares.view(count, count) / torch.bincount(data.y)[:, None]
        picture = axes[1].imshow(shares.numpy(), cmap="viridis_r", vmin=0)
        axes[1].set(
            xlabel="block of the source", ylabel="block of the target", title="attention between blocks"
        )
        axes[1].set(xticks=range(count), yticks=range(count))
        figure.colorbar(picture, ax=axes[1], shrink=0.8)
        data, model = molecule
        atoms = int((data.of == 0).sum())
        index = data.graph.edge_index
        mine = (index < atoms).all(0)
        weights = model.attention(data.x, data.graph, data.bonds)[mine]
        kinds = data.x[:atoms, :ATOMS].argmax(-1)
        draw_attention(axes[2], index[:, mine], weights, kinds, f"a molecule, ring of {5 + int(data.y[0])}")
    for name, losses in curves.items():
        axes[3].plot([n / max(len(losses) - 1, 1) for n in range(len(losses))], losses, label=name)
    axes[3].set(xlabel="share of training", ylabel="loss", title="training")
    axes[3].legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, help=f"training steps of each model (default {STEPS})")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="folder of the picture and the CSV"
    )
    asked = parser.parse_args()
    if asked.steps is not None and asked.steps < 1:
        parser.error(f"--steps: expected at least 1, got {asked.steps}")
    steps = {name: asked.steps or default for name, default in STEPS.items()}
    curves: dict[str, list[float]] = {}
    trained = []
    for data in (karate(), blocks()):
        model, curves[data.name], right = train_nodes(data, steps[data.name])
        size = (
            f"{data.graph.num_keys} nodes, {data.graph.num_edges} edges, {int(data.train.sum())} labels known"
        )
        print(f"{data.name}: {size}; {right:.1%} of the others right")
        trained.append((data, model))
    model, curves["molecules"], right, test = train_molecules(steps["molecules"])
    print(f"molecules: {len(test.y)} that were not seen; {right:.1%} right")
    asked.out.mkdir(parents=True, exist_ok=True)
    files = [asked.out / "training.csv"]
    with files[0].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "step", "loss"])
        writer.writerows([name, n, loss] for name, losses in curves.items() for n, loss in enumerate(losses))
    if draw(asked.out / "attention.png", *trained, (test, model), curves):
        files.append(asked.out / "attention.png")
    print("written:", *files)


if __name__ == "__main__":
    main()
