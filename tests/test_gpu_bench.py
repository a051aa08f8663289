"""The benchmarks for GPUs, as far as a CPU can show: what they measure, and that they end well."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from saccade.benchmarks import cli, gpu_cases, peers, suites
from saccade.benchmarks.attention import AttentionWork
from saccade.benchmarks.cases import BACKWARD, FORWARD, TRAIN, Case
from saccade.benchmarks.graph import GraphWork
from saccade.benchmarks.measure import Budget, Clock, interleaved
from saccade.benchmarks.peers import Inputs

SMALL = Case("small", heads=4, heads_k=2, seqlen_q=29, seqlen_k=37, head_dim=8, head_dim_v=12)


def test_the_backward_pass_alone() -> None:
    case = replace(SMALL, seqlen_k=29, causal=True, directions=(FORWARD, BACKWARD))
    assert case.flops(FORWARD) + case.flops(BACKWARD) == case.flops(TRAIN)
    work = AttentionWork(case, "cpu", frozenset({"flex"}))
    for name, offer in work.offers(BACKWARD).items():
        if name in ("saccade", "sdpa"):
            assert callable(offer)
            offer()  # the pass runs again and again
            assert work.fault(name, BACKWARD, offer) == ""
    trained = peers.ours(Inputs.of(case, "cpu"), TRAIN)
    alone = peers.ours(Inputs.of(case, "cpu"), BACKWARD)
    assert callable(trained) and callable(alone)
    assert all(torch.equal(a, b) for a, b in zip(trained(), alone(), strict=True))


def test_kernels_for_gpus_say_so() -> None:
    offers = AttentionWork(SMALL, "cpu").offers(FORWARD)
    assert [offers[f"sdpa-{name}"] for name in ("flash", "cudnn", "efficient")] == ["for CUDA devices"] * 3


def test_every_bar_has_its_cases() -> None:
    cases = {case.name: case for group in gpu_cases.tiled() for case in group.cases}
    for dim in (64, 128, 256):
        for n in (512, 8192, 16384, 32768):
            for kind in ("causal", "full"):
                case = cases[f"d{dim}-{kind}-n{n}"]
                assert case.directions == (FORWARD, BACKWARD) and case.heads * dim == 2048
                assert case.batch * n == max(n, 16384) and case.dtype == "bf16"
    window = cases["window1024-n32768"]
    full = 32768 * 1024 - 1023 * 1024 // 2  # the first rows have fewer keys
    assert window.pairs() == 32 * full
    assert "decode-b64-n8192" in cases and "gqa-causal-n16384" in cases


def test_large_graphs_keep_their_edges() -> None:
    case = gpu_cases.LargeGraphCase("x", "power-law", 20_000, 1, 16, "fp32", (FORWARD,), 900)
    graph = case.graph()
    assert graph.num_queries == 900 and not graph.has_repeats
    assert 0.9 * 20_000 < graph.num_edges <= 20_000
    assert int(graph.indptr.diff().max()) > 100
    work = GraphWork(case, "cpu")
    for name in ("saccade", "gather-scatter"):
        offer = work.offers(FORWARD)[name]
        assert callable(offer) and work.fault(name, FORWARD, offer) == ""


class OnGpu(Clock):
    """A clock that says it times a GPU."""

    def __init__(self, device: str) -> None:
        super().__init__("cpu")
        self.cuda = True
        self.asked: list[int] = []

    def seconds(self, call: Any, repeats: int = 1) -> float:
        call()
        self.asked.append(repeats)
        self.host = 2e-5
        return 1e-5


def test_a_gpus_caches_are_cold_and_the_host_is_told_apart() -> None:
    clock = OnGpu("cpu")
    timing = interleaved({"a": lambda: None}, clock, Budget(0.0, 3, 3))["a"]
    assert timing.median == 1e-5 and timing.host == 2e-5 and set(clock.asked) == {1}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite of two small groups on what says that it is a GPU."""

    def groups() -> list[Any]:
        case = replace(SMALL, seqlen_k=29, directions=(FORWARD,))
        one = replace(gpu_cases.tiled()[0], cases=(case,))
        return [one, replace(one, name="second", cases=(replace(case, name="other"),))]

    part = suites.Part(AttentionWork, groups)
    monkeypatch.setitem(suites.SUITES, "gpu", suites.Suite("", (part,), Budget(0.0, 2, 2)))
    monkeypatch.setattr(cli, "Clock", OnGpu)
    monkeypatch.setattr("saccade.benchmarks.measure._GEMM_CUDA", 16)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = cli.main(["--suite", "gpu", "--no-flex", "--out", str(folder), *arguments])
    (found,) = folder.glob("*.json")
    return status, json.loads(found.read_text())


def test_what_a_gpu_said_before_it_failed_is_kept(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = AttentionWork.fault

    def fail(work: AttentionWork, *arguments: Any) -> str:
        if work.case.name == "other":
            torch.cuda.empty_cache = _broken
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return fault(work, *arguments)

    monkeypatch.setattr(AttentionWork, "fault", fail)
    status, content = run(tmp_path)
    assert status == 1
    assert {r["case"] for r in content["rows"]} == {"small"}
    mine = next(r for r in content["rows"] if r["provider"] == "saccade")
    assert mine["ms"] == pytest.approx(1e-2) and mine["host_ms"] == pytest.approx(2e-2)
    printed = capsys.readouterr().out
    assert "stopped at second: other: RuntimeError: CUDA error" in printed and "673 / 579" in printed


def _broken() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_time_is_over(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, content = run(tmp_path, "--seconds", "1e-9")
    assert status == 0 and content["rows"] == [] and "left out: second: other" in capsys.readouterr().out
