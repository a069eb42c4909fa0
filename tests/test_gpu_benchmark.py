"""`benchmarks/gpu.py`, which few machines can run: each of its paths at a shape of no interest.

On fake CUDA tensors: `relora_core/test_gpu_path_benchmark.py`.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from benchmarks import gpu, gpu_table
from benchmarks.gpu_table import DEVICE, Row, Target, find_peaks, markdown, targets
from benchmarks.gpu_work import explain
from benchmarks.llama import SimpleDecoder
from relora_core.config import ModelConfig
from relora_core.devices import Device
from relora_core.model import Decoder
from tests import warm

ROOT = Path(__file__).resolve().parents[1]
PLACE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_without_a_gpu_it_is_one_line() -> None:
    command = [sys.executable, "benchmarks/gpu.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | PLACE, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "no GPU" in done.stderr


# every path, on a CPU ----------------------------------------------------------------------------
@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Words -> gpu.json; its processes are forks of one that has imported torch."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(warm.PRELOAD)
    monkeypatch.setattr(gpu, "START", "forkserver")
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)

    def call(*words: str) -> dict[str, Any]:
        command = ["benchmarks/gpu.py", "--device", "cpu", "--into", str(tmp_path), *words]
        monkeypatch.setattr(sys, "argv", command)
        for name in ("TRANSFORMERS_OFFLINE", "TORCHINDUCTOR_CACHE_DIR"):
            monkeypatch.setenv(name, "")  # put back afterwards
        assert gpu.main() == 0
        assert capsys.readouterr().out.strip() == (tmp_path / "gpu.md").read_text().strip()
        return json.loads((tmp_path / "gpu.json").read_text())

    return call


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu.NAMES)
def test_every_variant_of_a_part_takes_its_turns(
    run: Any, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = Device(bf16=1e12, tf32=None, fp32=None, memory=1e11)
    monkeypatch.setattr(gpu_table, "find_device", lambda _: peaks)
    rows = run("--only", part)["rows"]
    beside = () if part == "eval" else DEVICE
    own = [name for name in gpu.NAMES[part] if name != "head, cce"]
    assert [row["variant"] for row in rows] == [*own, *beside]
    for row in rows:
        assert (row["note"], len(row["rates"])) == ("", 2)
        assert min(row["rates"]) > 0
        if part in ("train", "small batches", "head") and row["part"] == part:
            assert row["loss"] == pytest.approx(math.log(304), rel=0.1)
            assert row["roof"] > max(row["rates"])
        if part == "train" and row["part"] == part:
            rate = sum(row["rates"]) / 2
            assert row["mfu_executed"] == pytest.approx(_flops(row) * rate / 1e12)
            assert row["mfu_6n"] == pytest.approx(_flops_6n() * rate / 1e12)


def _sizes() -> tuple[int, int, int]:
    """Entries of the head and of the linears, and FLOPs of a token's scores in a pass forward, of
    the nano model at length 16; counted by hand."""
    return 32 * 304, 2 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 64), 4 * 16 * 32 * 2


def _flops(row: dict[str, Any]) -> float:
    """Of a token."""
    head, linears, attention = _sizes()
    if "relora" not in row["variant"]:
        return 6 * (head + linears) + 3 * attention
    adapters = 2 * 16 * (2 * (32 + 32) + 2 * (16 + 32) + 3 * (32 + 64))
    return 6 * (head + adapters) + 4 * linears + 3 * attention


def _flops_6n() -> float:
    head, linears, attention = _sizes()
    return 6 * (head + linears + 5 * 32) + 3 * attention


@pytest.mark.slow
def test_runs_are_packed(run: Any) -> None:
    rows = run("--only", "packed", "--turns", "1")["rows"]
    assert [row["variant"] for row in rows] == ["1 runs", "2 runs"]
    assert rows[0]["note"].endswith(": 1.00x")
    assert all(row["rates"][0] > 0 for row in rows)


@pytest.mark.slow
def test_rows_of_an_earlier_run_are_kept(run: Any, tmp_path: Path) -> None:
    first = run("--only", "head, ours", "--turns", "1")["rows"]
    (tmp_path / "gpu.json").rename(tmp_path / "first.json")
    again = run("--only", "eval, fp32", "--add", str(tmp_path / "first.json"))["rows"]
    assert again[:3] == first
    assert [row["variant"] for row in again[3:]] == ["eval, fp32"]


# what does not fit, and what breaks ---------------------------------------------------------------
class Scripted(gpu.Process):
    """Answers as a list says; keeps what it was asked."""

    asked: ClassVar[list[tuple[str, Any]]] = []
    answers: ClassVar[dict[str, list[dict[str, Any]]]] = {}

    def __init__(self, variant: Any) -> None:
        self.variant, self.batch = variant, variant.config.train.batch_size
        self.row = Row(part="train", model="tiny", variant=variant.name, batch=self.batch)
        self.made, self.too_large = False, []

    def ask(self, *question: Any) -> None:
        self.asked.append((self.variant.name, question))

    def hear(self) -> dict[str, Any]:
        answers = self.answers.get(self.variant.name, [])
        return answers.pop(0) if answers else MADE | {"rate": 5.0}

    def close(self) -> None:
        pass


MADE = {"ok": True, "loss": 10.8, "peak_mb": 1.0, "compile_s": 2.0}
NO_MEMORY = {"ok": False, "memory": True, "error": "OutOfMemoryError: CUDA out of memory"}
BROKEN = {"ok": False, "memory": False, "error": "ValueError: no"}


def script(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[dict[str, Any]]]
) -> tuple[dict[str, Row], list[tuple[str, Any]]]:
    """Rows of the variants, and what they were asked, in order."""
    monkeypatch.setattr(Scripted, "asked", [])
    monkeypatch.setattr(Scripted, "answers", answers)
    monkeypatch.setattr(gpu, "Process", Scripted)
    args = gpu.parse([])
    names = ("full rank, eager", "llama, compiled", "simple, compiled")
    variants = [gpu.make_variant("train", name, model="tiny", args=args) for name in names]
    rows = gpu.compare(variants, turns=3, seconds=1.0, gpu="NVIDIA A100-SXM4-80GB")
    return {row.variant: row for row in rows}, Scripted.asked


def test_variants_take_turns_and_what_compiles_does_so_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, asked = script(monkeypatch, {})
    names = ["full rank, eager", "llama, compiled", "simple, compiled"]
    turn = [(name, ("turn", 1.0)) for name in names]
    assert asked == [(name, ("make", 32)) for name in names] + 3 * turn
    assert all(row.rates == [5.0, 5.0, 5.0] for row in rows.values())


def test_what_does_not_fit_is_tried_alone_then_with_half_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = {
        "llama, compiled": [NO_MEMORY],
        "simple, compiled": [NO_MEMORY, NO_MEMORY, NO_MEMORY],
        "full rank, eager": [NO_MEMORY] * 6,
    }
    rows, _ = script(monkeypatch, answers)
    llama, simple, ours = (rows[name] for name in answers)
    assert (llama.batch, llama.note, len(llama.rates)) == (32, "", 3)
    assert (simple.batch, len(simple.rates)) == (8, 3)
    assert simple.note == "out of memory at batch 32, 16"
    assert (ours.rates, ours.note) == ([], "out of memory at batch 32, 16, 8, 4, 2, 1")


def test_what_breaks_is_a_row_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "llama, compiled": [BROKEN],
        "simple, compiled": [MADE, MADE | {"rate": 5.0}, NO_MEMORY],
    }
    rows, _ = script(monkeypatch, answers)
    llama, simple = (rows[name] for name in answers)
    assert (llama.rates, llama.note) == ([], "ValueError: no")
    assert (simple.rates, simple.note) == ([5.0], "out of memory beside the others")
    assert len(rows["full rank, eager"].rates) == 3


@pytest.mark.slow
def test_a_process_that_dies_or_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(warm.PRELOAD)
    monkeypatch.setattr(gpu, "START", "forkserver")
    args = gpu.parse(["--device", "cpu"])
    bad = gpu.make_variant("head", "head, ours", model="nano", args=args)
    bad.config.train.precision = "none"
    bad.config.model.vocab_size = None
    failing, dying = gpu.Process(bad), gpu.Process(bad)
    dying.process.kill()
    for process in (failing, dying):
        process.fit()
        assert not process.made
        process.close()
    assert failing.row.note.startswith("AssertionError")
    assert dying.row.note == "its process ended with -9"


def test_too_little_memory_is_seen_in_what_torch_says() -> None:
    assert explain(torch.OutOfMemoryError("CUDA out of memory. Tried"))["memory"]
    assert explain(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"))["memory"]
    assert explain(ValueError("bad\nworse")) == {"memory": False, "error": "ValueError: bad"}


# what is read from the rows -----------------------------------------------------------------------
def row(variant: str, *rates: float, part: str = "train", model: str = "tiny", **more: Any) -> Row:
    return Row(part=part, model=model, variant=variant, batch=1, rates=list(rates), **more)


def verdicts(rows: list[Row], *, gpu: str) -> dict[str, str]:
    return {target.text.partition(":")[0]: target.verdict for target in targets(rows, gpu=gpu)}


def test_a_target_is_met_missed_or_not_for_this_gpu() -> None:
    rows = [
        row("full rank, blocks", 390e3, 410e3, 400e3),
        row("relora, blocks", 401e3, 405e3, 399e3),
        row("llama, compiled", 300e3, 300e3, 300e3),
        row("simple, compiled", 320e3, 320e3, 320e3),
        row("head, ours", 1e6, part="head", roof=2.1e6),
        row("head, ours", 1e6, part="head", model="small", roof=1.9e6),
    ]
    on_a100 = verdicts(rows, gpu="NVIDIA A100-SXM4-80GB")
    tiny = "tiny at full rank, tokens/s, on a GPU of the {} class"
    assert on_a100[tiny.format("A100")] == "met"
    assert on_a100[tiny.format("H100")] == "not applicable"
    assert on_a100["small at full rank, tokens/s, on a GPU of the A100 class"] == "not measured"
    assert on_a100["tiny against the best compiled Llama"] == "missed"  # 1.25 of the simple one
    assert on_a100["tiny, ReLoRA against full rank"] == "missed"  # in the middle turn 0.998
    assert on_a100["tiny, the head's speed of its roof's"] == "missed"
    assert on_a100["small, the head's speed of its roof's"] == "met"
    on_h200 = verdicts(rows, gpu="NVIDIA H200")
    assert on_h200[tiny.format("H100")] == "missed"
    assert "met" not in [verdicts(rows, gpu="NVIDIA L4")[tiny.format(c)] for c in ("A100", "H100")]


def test_a_target_that_is_reached_exactly_is_met() -> None:
    made = [Target("", value, 1.0).verdict for value in (1.0, 0.99, None)]
    assert made == ["met", "missed", "not measured"]


def test_peaks_are_measured_where_no_data_sheet_is_known() -> None:
    product, copy = DEVICE
    rows = [row(product, 1, 3, 8, part="device"), row(copy, 5, 4, 6, part="device")]
    assert find_peaks("NVIDIA Something", rows) == (3, 5, "measured here")
    assert find_peaks("NVIDIA Something", rows[:1]) is None
    assert find_peaks("NVIDIA A100-SXM4-80GB", [])[:2] == (312e12, 2039e9)  # type: ignore[index]


def test_the_report_has_a_line_for_each_row_and_names_the_gpu() -> None:
    rows = [
        row("llama, compiled", note="a | b"),
        row("relora, blocks", 90.0, 100.0, 130.0, mfu_executed=0.1234, roof=400.0, roof_by="bytes"),
    ]
    lines = markdown(rows, about={"gpu": "NVIDIA X", "driver": "1.2"}).splitlines()
    assert lines[0] == "# NVIDIA X"
    assert "- driver: 1.2" in lines
    [llama] = [line for line in lines if "llama, compiled" in line]
    assert "a / b" in llama
    [relora] = [line for line in lines if "relora, blocks" in line]
    assert "| 100 | 40.0% | 12.3% | - | 25.0% | 400 (bytes) |" in relora


def test_parts_and_variants_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(*words: str) -> set[str]:
        groups = gpu.groups(gpu.parse(words))
        return {v.name for group in groups for v in group if v.part != "device"}

    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: None)
    everything = {name for part in gpu.NAMES.values() for name in part} - {"head, cce"}
    assert names() == everything
    chosen = {"head, ours", "head, compiled", "llama, eager", "llama, compiled"}
    assert names("--only", "head;llama") == chosen
    assert names("--only", "packed") == set()
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: True)
    assert names("--only", "head") == {"head, ours", "head, compiled", "head, cce"}
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: None)
    quick = names("--quick")
    assert set(gpu.QUICK) < quick < everything
    models = {v.model for group in gpu.groups(gpu.parse(["--quick"])) for v in group}
    assert models == {"tiny"}
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "tail"])


# the decoder that others would write --------------------------------------------------------------
def test_the_simple_decoder_computes_what_ours_does() -> None:
    """With the same weights, where queries and keys are in the order of halves, not of pairs."""
    torch.manual_seed(0)
    sizes = ModelConfig(d_model=32, d_ff=48, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=97)
    ours, simple = Decoder(sizes), SimpleDecoder(sizes)
    assert sum(p.numel() for p in simple.parameters()) == sum(p.numel() for p in ours.parameters())

    def halves(weight: torch.Tensor) -> torch.Tensor:
        heads = weight.unflatten(0, (-1, 4, 2))  # 8 columns of a head
        return heads.transpose(1, 2).flatten(0, 2)

    with torch.no_grad():
        for block, its in zip(ours.layers, simple.blocks, strict=True):
            a, m, mine = block.attention, block.swiglu, its  # type: ignore[union-attr]
            q, k = halves(a.q_proj.weight), halves(a.k_proj.weight)  # type: ignore[union-attr]
            mine.qkv.weight.copy_(torch.cat((q, k, a.v_proj.weight)))  # type: ignore[union-attr]
            mine.out.weight.copy_(a.o_proj.weight)  # type: ignore[union-attr]
            mine.up.weight.copy_(torch.cat((m.w_0.weight, m.w_1.weight)))  # type: ignore[union-attr]
            mine.down.weight.copy_(m.w_2.weight)  # type: ignore[union-attr]
        simple.embedding.weight.copy_(ours.embedding_proj.weight)
        simple.head.weight.copy_(ours.de_embedding_proj.weight)
    ids = torch.randint(0, 97, (3, 12))
    torch.testing.assert_close(simple(ids[:, :-1], ids[:, 1:]), ours(ids[:, :-1], ids[:, 1:]))
