"""Results of 32 MB and more on the CPU: their memory is kept when they are freed, for the system to take."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import saccade
import torch
from saccade import Graph
from torch import Tensor

NODES, HEADS, DIM = 70_000, 2, 64  # results of 36 MB
_MAPS = Path("/proc/self/smaps")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc's affair elsewhere")


def ring() -> Graph:
    """Every node attends to the next."""
    nodes = torch.arange(NODES)
    return Graph.from_edge_index(torch.stack([nodes, nodes.roll(1)]), NODES)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return ring()


def inputs() -> list[Tensor]:
    """As layers for graphs hold them: the heads of a node side by side."""
    return [torch.randn(1, NODES, HEADS, DIM).transpose(1, 2) for _ in range(3)]


def one_key(v: Tensor) -> Tensor:
    """What the ring gives: a row's one key takes all the weight."""
    return v.roll(-1, 2)


def lazily_free(address: int) -> int:
    """Kilobytes that the system may take, of the mapping with this address; -1: it is not mapped."""
    inside = False
    for line in _MAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("LazyFree:"):
            return int(line.split()[1])
    return -1


def _tells_lazily_free() -> bool:
    return _MAPS.exists() and "LazyFree:" in _MAPS.read_text()


KEPT = """
out = saccade.attention(q, k, v, graph)
at = out.data_ptr()
assert out.untyped_storage().nbytes() == out.numel() * 4 >= 32 << 20
assert lazily_free(at) == 0
del out
assert lazily_free(at) > 30 << 10
again = saccade.attention(q, k, v, graph)
assert again.data_ptr() == at and torch.equal(again, one_key(v))
# Written again, so the system may no longer take it (but what rounding to large pages adds).
assert 0 <= lazily_free(at) <= 2 << 10
"""
GIVEN_BACK = """
out = saccade.attention(q, k, v, graph)
assert torch.equal(out, one_key(v))
at = out.data_ptr()
del out
assert lazily_free(at) == -1
"""
BEFORE = """
import resource, saccade, torch
from test_large_results import inputs, lazily_free, one_key, ring
graph, (q, k, v) = ring(), inputs()
"""
# After it: nothing is kept where addresses are scarce.
SCARCE = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))"


@pytest.mark.skipif(not _tells_lazily_free(), reason="this kernel does not say what it may take")
@pytest.mark.parametrize(
    ("asked", "program"),
    [("1", BEFORE + KEPT), ("0", BEFORE + GIVEN_BACK), ("1", SCARCE + BEFORE + GIVEN_BACK)],
    ids=["kept", "not_asked_for", "scarce"],
)
def test_memory_is_kept_and_may_be_taken(asked: str, program: str) -> None:
    environment = os.environ | {"SACCADE_KEEP_MEMORY": asked, "PYTHONPATH": str(Path(__file__).parent)}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_results_that_live_share_nothing(graph: Graph) -> None:
    q, k, v = inputs()
    first = saccade.attention(q, k, v, graph)
    part = first[0, 1, 5:9]  # a view keeps all of it
    expected = part.clone()
    del first
    second = saccade.attention(q, k, -v, graph)
    third = saccade.attention(q, k, 2 * v, graph)
    assert torch.equal(part, expected)
    assert torch.equal(second, one_key(-v)) and torch.equal(third, one_key(2 * v))


def test_gradients_too(graph: Graph) -> None:
    qkv = [x.requires_grad_() for x in inputs()]
    dout = torch.randn(1, HEADS, NODES, DIM)
    places = set()
    for _ in range(2):
        dq, dk, dv = torch.autograd.grad(saccade.attention(*qkv, graph), qkv, dout)
        assert torch.equal(dv, dout.roll(1, 2)) and not dq.any() and not dk.any()
        places |= {x.data_ptr() for x in (dq, dk, dv)}
        del dq, dk, dv
    assert len(places) <= 4


def test_they_are_tensors_as_others_are(graph: Graph) -> None:
    q, k, v = inputs()
    out = saccade.attention(q, k, v, graph)
    expected = one_key(v)
    copied = copy.deepcopy(out)
    assert torch.equal(torch.from_numpy(out.numpy()), expected)
    out.mul_(2)
    assert torch.equal(copied, expected) and torch.equal(out, 2 * expected)
    assert out.clone().resize_(3, 5).shape == out.detach().resize_(3, 5).shape
    assert out.share_memory_().is_shared() and torch.equal(out, 2 * expected)


def test_their_storage_keeps_its_size(graph: Graph) -> None:
    out = saccade.attention(*inputs(), graph)
    with pytest.raises(RuntimeError, match="not resizable"):
        out.untyped_storage().resize_(0)
    assert out.untyped_storage().nbytes() == out.numel() * 4


def test_threads_take_and_give_back_at_once(graph: Graph) -> None:
    q, k, v = inputs()

    def work(n: int) -> bool:
        mine = (v[..., :1] * n).expand_as(v)
        return all(torch.equal(saccade.attention(q, k, mine, graph), one_key(mine)) for _ in range(4))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, (1, 2, 3)))


# One work item holds them: where rows are cut stays the same when more are added.
NEAR, EDGES = 150, 700


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_past_the_caches_change_no_bit(dtype: torch.dtype, vector_isa: str) -> None:
    """Results that no cache holds are written past them: rows that one step makes, and no others."""
    few = torch.randint(NEAR, (2, EDGES))
    few[1, :100] = 7  # a row of many steps
    few[0, 100:200] = 9  # a key of many
    large = [x.to(dtype).requires_grad_() for x in inputs()]
    small = [x.detach()[:, :, :NEAR].clone().requires_grad_() for x in large]
    found = []
    for tensors, nodes in ((large, NODES), (small, NEAR)):
        out = saccade.attention(*tensors, Graph.from_edge_index(few, nodes))
        found.append([out, *torch.autograd.grad(out.sin().sum(), tensors)])
    for place, (a, b) in enumerate(zip(*found, strict=True)):
        assert torch.equal(a[:, :, :NEAR], b), place
        assert not a[:, :, NEAR:].any(), place
