"""The benchmarks: what they count, what they refuse to print, what they leave behind."""

from __future__ import annotations

import csv
import json
import os
import platform
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import saccade
import torch
from saccade.benchmarks import cases, cli, machine, memory, peers, suites
from saccade.benchmarks.apart import apart
from saccade.benchmarks.attention import AttentionWork
from saccade.benchmarks.cases import FORWARD, TRAIN, Case, Group, ModuleCase, square
from saccade.benchmarks.check import Oracle, of_inputs
from saccade.benchmarks.measure import Budget, Clock, Peak, interleaved, summary
from saccade.benchmarks.modules import ModuleWork
from saccade.benchmarks.peers import SEED, Inputs
from saccade.benchmarks.runner import Plan, add_ratios, measure_case, summarise

SMALL = Case("small", batch=2, heads=4, heads_k=2, seqlen_q=29, seqlen_k=37, head_dim=8, head_dim_v=12)
VARIANTS = [
    SMALL,
    replace(SMALL, causal=True),
    replace(SMALL, seqlen_q=37, seqlen_k=29, causal=True),
    replace(SMALL, window=(5, 3)),
    replace(SMALL, window=(9, 0), causal=True, lengths=(37, 11)),
    replace(SMALL, window=(2, 50), causal=True, seqlen_q=50),
    replace(SMALL, lengths=(0, 20)),
    replace(SMALL, batch=1, bias=True),
    replace(SMALL, dropout_p=0.25, causal=True),
]


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_pairs_and_flops(case: Case) -> None:
    mask = case.mask()
    full = torch.ones(case.batch, case.seqlen_q, case.seqlen_k, dtype=torch.bool)
    dense = full if mask is None else full & mask.materialize(case.seqlen_q, case.seqlen_k)
    assert case.pairs() == int(dense.sum()) * case.heads
    d, dv = case.head_dim, case.head_dim_v
    assert case.flops(FORWARD) == 2 * case.pairs() * (d + dv)
    assert case.flops(TRAIN) - case.flops(FORWARD) == 2 * case.pairs() * (3 * d + 2 * dv)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_the_check_computes_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "saccade.benchmarks.check._BLOCK_ENTRIES", 7 * case.seqlen_k
    )  # several blocks of rows
    inputs = Inputs.of(case, "cpu")
    b, hk, group = case.batch - 1, 1, 2
    wide = [x.detach().double().requires_grad_() for x in inputs.leaves()]
    q, k, v, *bias = wide
    options = {"dropout_p": case.dropout_p, "seed": SEED} if case.dropout_p else {}
    out = saccade.reference.attention(q, k, v, inputs.mask, bias=bias[0] if bias else None, **options)
    dq, dk, dv, *dbias = torch.autograd.grad(out, wide, inputs.dout.double())
    heads = slice(hk * group, hk * group + group)
    expected = [out[b, heads].detach(), dq[b, heads], dk[b, hk], dv[b, hk], *(x[0, heads] for x in dbias)]
    for mine, theirs in zip(of_inputs(inputs, (b, hk), torch.float64, True), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("result", range(5))
def test_a_wrong_result_is_noticed(result: int) -> None:
    inputs = Inputs.of(replace(SMALL, batch=1, bias=True), "cpu")
    call = peers.ours(inputs, TRAIN)
    assert callable(call)
    oracle, got = Oracle(inputs), call()
    assert oracle.fault(got) == ""
    got[result] = got[result] * 1.001
    assert oracle.fault(got)
    got[result] = torch.full_like(got[result], float("nan"))
    assert oracle.fault(got)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
@pytest.mark.parametrize("direction", [FORWARD, TRAIN])
def test_providers_are_right_or_say_why_not(case: Case, direction: str) -> None:
    work = AttentionWork(case, "cpu", frozenset({"flex"}))
    offers = work.offers(direction)
    assert callable(offers["saccade"])
    for name, offer in offers.items():
        assert (isinstance(offer, str) and offer) or work.fault(name, direction, offer) == ""
    if case.window or case.bias or case.lengths:
        assert isinstance(offers["sdpa"], str) and callable(offers["sdpa-mask"])


def test_flex_is_asked_only_where_it_can() -> None:
    inputs = Inputs.of(SMALL, "cpu")
    assert "not asked" in str(peers.flex(inputs, FORWARD))
    assert "backward" in str(peers.flex(replace(inputs, case=replace(SMALL, flex=True)), TRAIN))


@pytest.mark.parametrize("flags", [{}, {"causal": True}, {"padding": True}, {"need_weights": True}])
@pytest.mark.parametrize("training", [True, False])
def test_modules(flags: dict[str, bool], training: bool) -> None:
    case = ModuleCase("tiny", 13, 2, embed_dim=32, num_heads=4, training=training, **flags)
    before = torch.random.get_rng_state()
    work = ModuleWork(case, "cpu")
    assert torch.equal(before, torch.random.get_rng_state())
    assert isinstance(work._saccade, saccade.nn.MultiheadAttention)
    (direction,) = work.directions
    offers = work.offers(direction)
    if case.need_weights:
        assert offers.pop("linear") == "the weights are asked for"
    for name, offer in offers.items():
        assert callable(offer) and work.fault(name, direction, offer) == ""
    offer = offers["saccade"]
    assert callable(offer)
    assert work.fault("saccade", direction, lambda: [1.01 * x for x in offer()])


def test_timing_is_interleaved_and_robust() -> None:
    order: list[str] = []

    class Fake(Clock):
        def seconds(self, call, repeats=1):  # type: ignore[no-untyped-def]
            call()
            return 1.0

    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = interleaved(calls, Fake("cpu"), Budget(0.0, 3, 3))
    # One call each to see how long it takes, then rounds: a call that is not timed before those that are.
    assert "".join(order) == "ab" + "aabb" + "bbaa" + "aabb"
    assert timings["a"].runs == 3
    values = [1.0, 1.1, 1.2, 9.0, 1.05]
    assert summary(values).median == statistics.median(values)
    assert summary([2.0]).low == summary([2.0]).high == 2.0


def test_ratios_and_means() -> None:
    group = Group("g", (), "sdpa", {FORWARD: 1.5}, 1.0, {"flex": {FORWARD: 3.0}})
    base = {"group": "g", "direction": FORWARD, "dtype": "fp32"}
    speeds = {
        ("x", "saccade"): 4.0,
        ("x", "sdpa"): 2.0,
        ("y", "saccade"): 4.0,
        ("y", "sdpa"): 8.0,
        ("z", "saccade"): 1.0,
    }
    rows = [base | {"case": case, "provider": name, "gflops": rate} for (case, name), rate in speeds.items()]
    rows.append(base | {"case": "z", "provider": "sdpa", "error": "wrong"})

    class Peak:
        def rate(self, dtype: torch.dtype) -> float:
            return 16e9

    add_ratios(rows, [group], Peak(), cases.DTYPES)  # type: ignore[arg-type]
    assert rows[0]["peak_fraction"] == 0.25
    rows.append(base | {"case": "x", "provider": "flex", "gflops": 1.0})
    line, other = summarise(rows, [group])
    assert line["limit"] == pytest.approx(4.0)  # saccade at a quarter of the matrix product's rate
    assert (other["peer"], other["mean"], other["goal"], other["cases"]) == ("flex", 4.0, 3.0, 1)
    assert line["cases"] == 2 and line["mean"] == pytest.approx(1.0) and line["least"] == 0.5
    assert (line["least_case"], line["goal"], line["floor"]) == ("y", 1.5, 1.0)


def run(folder: Path, *arguments: str) -> tuple[int, dict, list[dict[str, str]]]:
    status = cli.main([*arguments, "--quick", "--no-flex", "--out", str(folder)])
    (as_json,), (as_csv,) = folder.glob("*.json"), folder.glob("*.csv")
    with as_csv.open() as file:
        return status, json.loads(as_json.read_text()), list(csv.DictReader(file))


def test_the_processor_is_told_from_others_of_its_name(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    core = "vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n"
    info.write_text(f"processor\t: 0\n{core}\nprocessor\t: 1\n{core}")
    assert machine.processor(info) == "AMD EPYC (family 26, model 2)"
    info.write_text("processor\t: 0\nCPU implementer\t: 0x41\n")
    assert machine.processor(info) == platform.machine()
    assert machine.processor(tmp_path / "none")


def test_a_run_leaves_rows_machine_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, content, rows = run(tmp_path, "--only", "molecules")
    assert status == 0
    timed = {(r["provider"], r["direction"]) for r in content["rows"] if "ms" in r}
    assert timed == {(name, d) for name in ("saccade", "sdpa") for d in (FORWARD, TRAIN)}
    for row in content["rows"]:
        if "ms" in row:
            assert row["ms_low"] <= row["ms"] <= row["ms_high"] and row["gflops"] > 0
    assert (
        content["machine"]["torch"] == torch.__version__ and content["machine"]["gemm_gflops"]["float32"] > 0
    )
    assert len(rows) == len(content["rows"]) and rows[0]["cpu"] == content["machine"]["cpu"]
    printed = capsys.readouterr().out
    assert "molecules-23" in printed and "geometric mean per group" in printed
    pytest.importorskip("matplotlib")
    assert next(tmp_path.glob("*.png")).stat().st_size > 1000


def test_no_number_without_a_right_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(inputs: Inputs, direction: str) -> peers.Call | str:
        right = peers.ours(inputs, direction)
        assert callable(right)
        return lambda: [1.01 * x for x in right()]

    monkeypatch.setitem(peers.PROVIDERS, "saccade", peers.Provider(wrong))
    monkeypatch.setattr(cli, "APART", False)
    status, content, _ = run(tmp_path, "--only", "molecules")
    assert status == 1
    mine = [r for r in content["rows"] if r["provider"] == "saccade"]
    assert mine and all(r["error"] and "ms" not in r for r in mine)
    assert "WRONG" in capsys.readouterr().out and content["summary"] == []


def test_memory_is_measured_in_a_child() -> None:
    case = square("w", 4096, heads=2, heads_k=2, window=(16, 16))
    row = memory.measure(case, TRAIN, "saccade", 1, "cpu")
    assert not row.get("error"), row
    assert row["inputs_mib"] == pytest.approx(2 * 4 * 2 * 4096 * 64 * 4 / 2**20)
    assert (
        row["inputs_mib"] / 4 < row["peak_mib"] < 40 * row["inputs_mib"]
    )  # far below the 4096^2 weights' 128 MiB
    assert memory.measure(case, TRAIN, "sdpa", 1, "cpu")["absent"]
    assert "KeyError" in memory.measure(case, TRAIN, "nobody", 1, "cpu")["error"]


def test_every_suite_names_its_cases_once(capsys: pytest.CaptureFixture[str]) -> None:
    for name, suite in suites.SUITES.items():
        plan = Plan(name, "cpu", suite.budget)
        found = [(group.name, case.name) for _, group, wanted in plan.selected(suite) for case in wanted]
        assert found and len(found) == len(set(found))
        assert cli.main(["--suite", name, "--list"]) == 0
    assert "fp32-causal-d64-n128" in capsys.readouterr().out
    with pytest.raises(ValueError, match="registered already"):
        suites.register("cpu", suites.SUITES["cpu"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--only nothing-like-it", "no case of suite 'attention' has 'nothing-like-it' in its name"),
        ("--only nothing-like-it --list", "no case of suite"),
        ("--only molecules --memory", "no memory case has 'molecules'"),
        ("--threads -3", "--threads: expected at least 0, got -3"),
        ("--threads few", "--threads: invalid int value: 'few'"),
        ("--seconds -1", "--seconds: expected at least 0, got -1"),
        ("--seconds nan", "--seconds: expected at least 0, got nan"),
        ("--device bogus", "--device: expected cpu or cuda, got bogus"),
        ("--device meta", "--device: expected cpu or cuda, got meta"),
        ("--device cuda:99", "--device: torch sees"),
        ("--suite gpu", "--suite gpu: its tensors are a GPU's"),
        ("--suite gpu-graph", "--suite gpu-graph: its tensors are a GPU's"),
    ],
)
def test_bad_options(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(options.split())
    assert ended.value.code == 2 and message in capsys.readouterr().err


def never(*_: object) -> None:
    raise AssertionError("something was measured")


def test_a_folder_that_cannot_be_written_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "measure_case", never)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        cli.main(["--only", "molecules", "--out", str(tmp_path / "file" / "folder")])
    assert ended.value.code == 2 and "--out: " in capsys.readouterr().err


def test_help_tells_the_folder_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("saccade.benchmarks.report.default_folder", lambda: Path("100%/of-it"))
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "(default: 100%/of-it)" in " ".join(capsys.readouterr().out.split())


def test_what_was_measured_before_an_interrupt_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(work: AttentionWork, *arguments: Any) -> list[dict[str, Any]]:
        if work.case.name != "molecules-23":
            raise KeyboardInterrupt
        return list(measure_case(work, *arguments))

    tiny = Group("tiny", (replace(SMALL, name="molecules-23"), replace(SMALL, name="other")), "sdpa")
    suite = suites.Suite("", (suites.Part(AttentionWork, lambda: [tiny]),), Budget(0.0, 2, 2), memory=True)
    monkeypatch.setitem(suites.SUITES, "attention", suite)
    monkeypatch.setattr(cli, "APART", False)
    monkeypatch.setattr(cli, "measure_case", measure)
    monkeypatch.setattr(memory, "measure", never)
    status, content, rows = run(tmp_path)
    assert status == 130 and content["stopped"] == "interrupted"
    assert {row["case"] for row in rows} == {"molecules-23"} and any("ms" in r for r in content["rows"])
    assert "interrupted" in capsys.readouterr().out


def test_memory_cases_follow_only_and_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {case.name for case, _, _ in memory.tasks("dropout")} == {"dropout-n2048"}
    assert len(memory.tasks("memory")) == len(memory.tasks()) == 8
    monkeypatch.setattr(memory, "measure", never)
    status, content, _ = run(tmp_path, "--only", "dropout-n2048", "--memory", "--seconds", "1e-9")
    assert status == 0 and content["memory"] == []
    assert "left out: memory: dropout-n2048, sdpa" in capsys.readouterr().out


def test_no_memory_case_runs_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACCADE_OPS_LIBRARY", "/nonexistent")
    row = memory.measure(square("w", 512, heads=1, heads_k=1, window=(9, 9)), TRAIN, "saccade", 1, "cpu")
    assert "only the reference backend" in row["absent"], row


def test_each_case_has_a_process_of_its_own() -> None:
    first, second = apart(os.getpid), apart(os.getpid)
    assert len({first, second, os.getpid()}) == 3
    with pytest.raises(ZeroDivisionError):
        apart(divmod, 1, 0)


def test_the_best_matrix_product_is_kept() -> None:
    peak = Peak(Clock("cpu"), "cpu")
    peak.join({torch.float32: 3e9, torch.bfloat16: 5e9})
    peak.join({torch.float32: 2e9})
    assert peak.rate(torch.float32) == 3e9 and peak.rates() == {"float32": 3.0, "bfloat16": 5.0}
