"""The Python blocks of README.md and docs/ run as they stand, one page after the other, on small inputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import saccade
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]


def _function() -> dict[str, Any]:
    q, bias = torch.randn(2, 4, 6, 8), torch.randn(6, 6)
    packed, cu = torch.randn(6, 4, 8), torch.tensor([0, 2, 6])
    return {
        "model": nn.TransformerEncoderLayer(8, 2), "q": q, "k": q, "v": q, "bias": bias, "n": 6,
        "lengths": torch.tensor([6, 3]), "edge_index": torch.randint(6, (2, 9)), "b": torch.randn(9),
        "w": torch.randn(8), "packed_q": packed, "packed_k": packed, "packed_v": packed,
        "cu_q": cu, "cu_k": cu, "max_q": 4, "max_k": 4,
    }  # fmt: skip


def _graphs() -> dict[str, Any]:
    q = torch.randn(2, 6, 8)
    return {
        "edge_index": torch.randint(6, (2, 9)), "num_nodes": 6, "q": q, "k": q, "v": q,
        "x": torch.randn(6, 8), "b": torch.randn(9), "e": torch.randn(9, 3), "W": torch.randn(2, 8, 3),
        "w": torch.randn(8), "model": saccade.nn.TransformerConv(8, 8),
    }  # fmt: skip


def _masks() -> dict[str, Any]:
    return {n: saccade.Graph.from_dense(torch.rand(5, 5) < 0.5) for n in ("graph", "other")}


def _positions() -> dict[str, Any]:
    return {"x": torch.randn(2, 5, 16), "d_model": 16}


class Translator(nn.Module):
    """Vectors in, logits out."""

    def __init__(self) -> None:
        super().__init__()
        layer = saccade.nn.TransformerDecoderLayer(512, 8, batch_first=True)
        self.decoder, self.head = saccade.nn.TransformerDecoder(layer, 2), nn.Linear(512, 9)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.head(self.decoder(target, source))


def _sequences() -> dict[str, Any]:
    memory, target = torch.randn(2, 5, 512), torch.randn(2, 4, 512)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    head = nn.Linear(512, 9)
    nn.init.constant_(head.bias[2:3], 9.0)  # END comes soon
    return {
        "memory": memory, "memory_key_padding_mask": padding, "x": torch.randn(8, 3, 512),
        "parents": torch.tensor([1, 0, 2, 2, 4, 7, 5, 5]), "embed": nn.Embedding(9, 512),
        "head": head, "position": saccade.nn.SinusoidalPosition(512, batch_first=True),
        "source": memory, "target": target, "truth": torch.randint(9, (2, 4)),
        "target_lengths": torch.tensor([4, 2]), "source_lengths": torch.tensor([5, 3]),
        "model": Translator(),
    }  # fmt: skip


def _speech() -> dict[str, Any]:
    pieces = [torch.randn(1, n, 256) for n in (3, 1, 20)]
    return {"x": torch.randn(2, 40, 256), "microphone": pieces, "use": lambda y: None}


def _transformer() -> dict[str, Any]:
    return {"x": torch.randn(2, 5, 512), "padding": torch.arange(5) >= torch.tensor([[5], [3]])}


PAGES = {
    "README.md": _function, "docs/graphs.md": _graphs, "docs/masks.md": _masks,
    "docs/positions.md": _positions, "docs/sequence_to_sequence.md": _sequences, "docs/speech.md": _speech,
    "docs/transformer.md": _transformer,
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run_as_they_stand(page: str) -> None:
    names: dict[str, Any] = {"saccade": saccade, "torch": torch, "F": F, **PAGES[page]()}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)
