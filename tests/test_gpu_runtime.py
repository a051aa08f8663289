"""What only a running GPU can show of every backend that serves it: streams, captured graphs, other devices,
compiled calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import saccade
import torch
from test_gpu import DEVICE, both, edges, inputs, on_backends  # skips this file too where there is no GPU
from torch import Tensor

Run = Callable[..., Tensor]


def calls(backend: str) -> dict[str, tuple[Run, list[Tensor]]]:
    """One call for every body, with its tensors. Sums of dQ are in a fixed order when asked for."""
    lengths = torch.tensor([190, 77], device=DEVICE)
    graph = edges(190, 3000)
    ends = torch.tensor([0, 100, 190], device=DEVICE)
    q, k, v = inputs(64)
    packed = [x[0].detach().transpose(0, 1).contiguous().requires_grad_() for x in (q, k, v)]

    def attend(mask: Any, **options: Any) -> Run:
        return lambda *x: saccade.attention(*x, mask, backend=backend, deterministic=True, **options)

    return {
        "causal": (attend(saccade.Causal()), inputs(64)),
        "wide": (attend(saccade.Window(40, 10)), inputs(256)),
        "lengths": (attend(saccade.KeyPadding(lengths)), inputs(128)),
        "dropout": (attend(None, dropout_p=0.2, seed=3), inputs(64)),
        "graph": (attend(graph), inputs(64)),
        "packed": (
            lambda *x: saccade.attention_varlen(
                *x, ends, ends, 100, 100, backend=backend, deterministic=True
            ),
            packed,
        ),
    }


NAMES = ["causal", "wide", "lengths", "dropout", "graph", "packed"]
named = pytest.mark.parametrize("name", NAMES)


def capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """After a warm-up on a stream of its own, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@on_backends
@named
def test_training_steps_are_captured(backend: str, name: str) -> None:
    run, tensors = calls(backend)[name]
    want = both(run, tensors)
    graph, got = capture(lambda: both(run, tensors))
    for x in got:
        x.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    # What is replayed reads the tensors as they are then.
    with torch.no_grad():
        for x in tensors:
            x.mul_(0.5)
    want = both(run, tensors)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@on_backends
def test_a_captured_dropout_draws_anew(backend: str) -> None:
    q, k, v = (x.detach() for x in inputs(64))
    graph, got = capture(lambda: saccade.attention(q, k, v, dropout_p=0.5, backend=backend))
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(got.clone())
    assert not torch.equal(*seen)


@on_backends
def test_a_captured_decode_sees_its_cache_grow(backend: str) -> None:
    q = torch.randn(2, 8, 1, 128, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(2, 2, 700, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    lengths = torch.tensor([300, 5], device=DEVICE)
    graph, got = capture(lambda: saccade.attention_decode(q, k, v, lengths, backend=backend))
    for step in (0, 1, 300):
        lengths += step
        graph.replay()
        assert torch.equal(got, saccade.attention_decode(q, k, v, lengths, backend=backend))


@on_backends
@named
def test_streams_are_respected(backend: str, name: str) -> None:
    run, tensors = calls(backend)[name]
    doubled = [x.detach() * 2 for x in tensors]
    want = both(run, [x.requires_grad_() for x in doubled])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # who does not wait for this stream reads too early
        late = [(x.detach() * 2).requires_grad_() for x in tensors]
        got = both(run, late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@on_backends
@named
def test_another_device_than_the_current_one(backend: str, name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    run, tensors = calls(backend)[name]
    want = both(run, tensors)
    with torch.cuda.device(1):
        got = both(run, tensors)
        assert torch.cuda.current_device() == 1
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@on_backends
@named
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_calls(backend: str, name: str, mode: str) -> None:
    torch._dynamo.reset()
    run, tensors = calls(backend)[name]
    compiled = torch.compile(run, fullgraph=True, mode=mode)
    want = both(run, tensors)
    for _ in range(3):  # the third replays a graph
        got = [x.clone() for x in both(compiled, tensors)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@on_backends
def test_a_refusal_leaves_the_next_call_alone(backend: str) -> None:
    q, k, v = (x.detach() for x in inputs(64))
    want = saccade.attention(q, k, v, backend=backend)
    with pytest.raises(NotImplementedError):
        saccade.attention(q, k, v, backend="cpu")
    assert torch.equal(saccade.attention(q, k, v, backend=backend), want)
