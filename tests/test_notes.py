"""What is known of the data and matters to the user is said, and stands in the record."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from experiments import tidy
from experiments.__main__ import describe, show
from experiments.report import _cautions
from experiments.run_dir import RunDir, runs_folder
from experiments.runner import run_here
from relora_core.config import RunConfig
from sweeps.launch import run_sweep
from sweeps.local import LocalLauncher
from tests.conftest import nano_config

CUT = "each stored row of 17 ids gives 3 sequences of data.seq_len=5; its last 1 ids are not used"


@pytest.fixture
def cut(tmp_path: Path) -> RunConfig:
    """10 stored rows of 17 ids, of which 5 + 5 + 5 + 1 are read, and 24 sequences asked for."""
    rows = np.random.default_rng(0).integers(0, 97, (10, 17)).tolist()
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "rows" / "train-0.parquet")
    data = {"kind": "pretokenized", "path": str(tmp_path / "rows"), "seq_len": 5, "vocab_size": 97}
    config = nano_config(data=data, output_dir=str(tmp_path / "out"))
    config.train.steps = 9
    config.checkpoint.every_steps = 9
    config.eval.blimp.enabled = config.eval.paloma.enabled = False
    return config


def test_a_single_run_says_it_once_and_its_record_keeps_it(
    cut: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(cut) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    many = "36 sequences are trained on: 1.2 passes over the 30 sequences of data.path="
    assert said == [f"note: data: {CUT}", f"note: data: {many}{cut.data.path}"]
    (path,) = runs_folder(cut.output_dir).iterdir()
    assert show(RunDir(path))["notes"] == [CUT]
    run = tidy.RunData(run_id="", arm_id="", name="", seed=0, config=cut)
    tidy._read_record(run, RunDir(path))
    assert run.notes == [CUT]


def test_describe_says_it(cut: RunConfig) -> None:
    assert f"data: {CUT}" in describe(cut, at_steps=[])["notes"]


def test_describe_says_what_cannot_learn(cut: RunConfig) -> None:
    cut.relora.init_a, cut.relora.reset_frequency = "zero", 10
    assert any("14 of 14 adapters learn nothing" in n for n in describe(cut, at_steps=[])["notes"])


def test_a_plan_says_it_once_for_all_its_runs(cut: RunConfig) -> None:
    out = io.StringIO()
    points = [({"seed": str(k)}, dataclasses.replace(cut, seed=k)) for k in (0, 1)]
    assert (
        run_sweep(
            points,
            launcher=LocalLauncher(),
            plan_only=True,
            console=Console(file=out, width=100),
        )
        == 0
    )
    assert out.getvalue().count(f"note: data: {CUT}\n") == 1


def test_a_report_says_it() -> None:
    run = SimpleNamespace(notes=[CUT], state="finished", config=nano_config(), code=[], changed=[])
    arm = SimpleNamespace(finished=[run, run], runs=[run, run], name="a")
    lines = _cautions(SimpleNamespace(runs=[run, run], arms=[arm], varies={}))  # type: ignore[arg-type]
    assert lines == [f"Data: {CUT}."]
