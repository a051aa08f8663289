"""Reads scikit-learn's handwritten digits: as patches, as pixels that see their neighbours, by convolution.

The convolutional network is then run as self-attention, with the same weights: the results agree to rounding.
Leaves a picture of what the models attend to and a CSV of the losses in results/.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from model import SIDE, Pixels, as_attention, convolutions, patches
from saccade.nn import ConvolutionalAttention
from torch import Tensor
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from common import arguments, parse, progress, pyplot, write_csv  # noqa: E402

BATCH, SEEN = 64, 1400


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] from -1 to 1 and their digits [1797], in an order of ours."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    return images[order], torch.from_numpy(data.target).long()[order]


def train(model: Any, images: Tensor, labels: Tensor, name: str, steps: int) -> list[float]:
    """AdamW with a warm-up and a cosine; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1, pct_start=0.15)
    draw = torch.Generator().manual_seed(1)
    losses = []
    model.train()
    with progress(name, steps) as report:
        for _ in range(steps):
            at = torch.randint(len(images), (BATCH,), generator=draw)
            loss = F.cross_entropy(model(images[at]), labels[at])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            report(losses[-1])
    model.eval()
    return losses


@torch.no_grad()
def accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(-1) == labels).float().mean().item()


@torch.no_grad()
def weights_of(module: Any, run: Any) -> Tensor:
    """[N, L, S], averaged over heads: the weights of an attention module when `run()` calls it."""
    seen: list[Any] = []

    def see(_: Any, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))

    hook = module.register_forward_pre_hook(see, with_kwargs=True)
    run()
    hook.remove()
    (query, key, value, *_), options = seen[0]
    return module(query, key, value, mask=options.get("mask"))[1]


def draw(path: Path, models: dict[str, Any], images: Tensor, curves: dict[str, list[float]]) -> bool:
    """What the class token and a pixel look at, where heads of a convolution do. False without matplotlib."""
    plt = pyplot()
    if plt is None:
        return False
    figure, axes = plt.subplots(1, 5, figsize=(21, 4.2), layout="constrained")
    one = images[:1]
    axes[0].imshow(one[0, 0].numpy(), cmap="gray_r")
    axes[0].set_title("a digit")
    vit, pixels = models["patches"], models["pixels"]
    looks = weights_of(vit.encoder.layers[-1].self_attn, lambda: vit(one))[0, 0, 1:].view(4, 4)
    axes[1].imshow(looks.numpy(), cmap="viridis")
    axes[1].set_title("patches: the class token, last layer")
    looks = weights_of(pixels.blocks[1].attention.attention, lambda: pixels(one))[0, 3 * SIDE + 4].view(
        SIDE, SIDE
    )
    axes[2].imshow(looks.numpy(), cmap="viridis")
    axes[2].plot(4, 3, "rs", markersize=9, fillstyle="none")
    axes[2].set_title("pixels: what (3, 4) looks at")
    first = next(m for m in models["attention"] if isinstance(m, ConvolutionalAttention))
    for h, (down, across) in enumerate((first.shift.detach() - 1).tolist()):
        axes[3].annotate(str(h), (across, down), ha="center", va="center", fontsize=14)
    axes[3].set(xlim=(-1.6, 1.6), ylim=(1.6, -1.6), title="convolution: where each head looks")
    for name, losses in curves.items():
        axes[4].plot(losses, label=name, linewidth=0.8)
    axes[4].set(xlabel="step", title="loss", yscale="log")
    axes[4].legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return True


def main() -> None:
    parser = arguments(__doc__, HERE, steps=500)
    asked = parse(parser)
    try:
        images, labels = digits()
    except ImportError:
        parser.error("this example reads scikit-learn's digits: pip install scikit-learn")
    torch.manual_seed(0)
    models: dict[str, Any] = {"patches": patches(), "pixels": Pixels(), "convolutions": convolutions()}
    curves = {}
    for name, model in models.items():
        start = time.perf_counter()
        curves[name] = train(model, images[:SEEN], labels[:SEEN], name, asked.steps)
        seconds, right = time.perf_counter() - start, accuracy(model, images[SEEN:], labels[SEEN:])
        print(f"{name:<13} {right:6.1%} of {len(images) - SEEN} unseen digits right   ({seconds:.0f} s)")
    models["attention"] = as_attention(models["convolutions"])
    with torch.no_grad():
        plain, twin = (models[name](images[SEEN:]) for name in ("convolutions", "attention"))
    right = (twin.argmax(-1) == labels[SEEN:]).float().mean().item()
    apart = (plain - twin).abs().max() / plain.abs().max()
    print(f"{'as attention':<13} {right:6.1%}, logits apart by {apart:.1e} of the largest")
    rows = [[name, step, loss] for name, losses in curves.items() for step, loss in enumerate(losses)]
    files = [write_csv(asked.out / "training.csv", ["model", "step", "loss"], rows)]
    if draw(asked.out / "digits.png", models, images[SEEN:], curves):
        files.append(asked.out / "digits.png")
    print("written:", *files)


if __name__ == "__main__":
    main()
