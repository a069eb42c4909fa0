"""Whatever became of a file of a run or a sweep, each command ends with success or one clear line.

Every file that the commands read is cut, flipped, emptied, re-encoded and changed value by value;
nothing outside the output folder is touched, and what only looks changes nothing in it either.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest

from experiments.__main__ import main as experiments_main
from experiments.disk.output_dir import jobs_folder
from experiments.disk.run_dir import RunDir
from sweeps.__main__ import main as sweeps_main
from sweeps.slurm.submission import Submission
from tests.experiments import synthetic
from tests.fuzz import command_line
from tests.fuzz.damage import damaged

LOOKS = (
    *(["status"], ["status", "--json"], ["status", "mine", "--runs"], ["plan", "mine"]),
    *(["logs", "{run}"], ["logs", "{run}", "--slurm"], ["diff", "{run}", "{other}"]),
    *(["diff", "{run}", "{other}", "--json"], ["gc"], ["gc", "--keep-best", "1", "--snapshots"]),
    *(["eval", "mine"], ["watch", "--once"]),
)
REPORTS = 6
SHOWS = (["show", "{run}"], ["show", "{run}", "--json"])


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Two sweeps: finished, running, failed and never-begun runs, with all that they leave."""
    out = tmp_path_factory.mktemp("sample") / "out"
    configs = synthetic.arms(4, seeds=(0, 1))
    runs = synthetic.a_sweep(out, configs)
    synthetic.a_sweep(out, configs[:2], name="yours")
    for run in runs[:3]:
        synthetic.record(run)
    first = runs[0]
    first.log_path(1).write_text("begun\n")
    step = first.checkpoints / "step-00000040"
    step.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "rng.pt", "progress.json"):
        (step / name).write_text("{}")
    (first.path / "trial.json").write_text(json.dumps({"study": "s", "number": 3}))
    (first.path / "mlflow.json").write_text(json.dumps({"a": {"run": "b"}}))
    (first.path / "lock").write_text(
        json.dumps({"host": "elsewhere", "pid": 5, "started": 1.5, "job_id": "7"})
    )
    evaluation = {"name": "test", "section": "paloma", "step": 40, "digest": "d", "tables": {}}
    evaluation |= {"metrics": {"test/paloma/perplexity": 3.0}}
    (first.evals / "test").mkdir(parents=True)
    (first.evals / "test" / "step-00000040-paloma.json").write_text(json.dumps(evaluation))
    sweep = out / "sweeps" / "mine"
    (sweep / "launcher.json").write_text(json.dumps({"kind": "local", "options": {}}))
    (sweep / "code.json").write_text(json.dumps({"commit": "c", "code_hash": "c0de"}))
    (sweep / "code.diff").write_text("diff --git a/x b/x\n+y\n")
    submission = Submission(submission="ab", name="mine-ab", job_id="7", tasks=[[first.run_id]])
    submission.write(jobs_folder(out, name="mine") / "ab")
    return out


def files(out: Path) -> list[Path]:
    return sorted(p for p in out.rglob("*") if p.is_file() and p.suffix != ".tmp")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def a_case(sample: Path, folder: Path, *, seed: int) -> tuple[Path, str]:
    """A copy with one damaged file, and which that is."""
    shutil.copytree(sample, folder / "out")
    return folder / "out", damage_one(folder, seed=seed)


def damage_one(folder: Path, *, seed: int) -> str:
    path = random.Random(seed).choice(files(folder / "out"))
    path.write_bytes(damaged(path.read_bytes(), seed=seed))
    return str(path.relative_to(folder))


def looked(out: Path, words: list[str], *, seed: int) -> command_line.Answer:
    names = sorted(p.name for p in (out / "runs").iterdir())
    words = [w.format(run=names[seed % 4], other=names[(seed + 1) % 4]) for w in words]
    main = experiments_main if words[0] == "show" else sweeps_main
    return command_line.answer(lambda: main([*words, "--output-dir", str(out)]))


def faults_in(answer: command_line.Answer) -> list[str]:
    """A command about many runs may have a line to say of one and still succeed."""
    if (
        answer.code == 1 and answer.out and not answer.err
    ):  # `watch` says with it that runs have failed
        return []
    return command_line.faults(answer) if answer.code or answer.trace else []


def look(sample: Path, folder: Path, *, seeds: range) -> None:
    """At one file after the other: a look changes nothing, so each can be put back."""
    shutil.copytree(sample, folder / "out")
    sound = tree(folder)
    for seed in seeds:
        what = damage_one(folder, seed=seed)
        harmed = (folder / what).read_bytes()
        words = [*LOOKS, *SHOWS][seed % 14]
        answer = looked(folder / "out", words, seed=seed)
        assert faults_in(answer) == [], (seed, what, words, answer)
        assert tree(folder) == sound | {what: harmed}, (seed, what, words)
        (folder / what).write_bytes(sound[what])


def test_a_look_at_damaged_records(sample, tmp_path):
    look(sample, tmp_path / "x", seeds=range(24))


@pytest.mark.slow
def test_280_looks_at_damaged_records(sample, tmp_path):
    look(sample, tmp_path / "x", seeds=range(1000, 1280))


@pytest.mark.slow
def test_gc_of_damaged_records_removes_nothing_elsewhere(sample, tmp_path):
    for seed in range(60):
        folder = tmp_path / "x"
        (folder / "x" / "checkpoints" / "step-00000001").mkdir(parents=True)
        shutil.copytree(sample / "runs", folder / "runs")
        out, what = a_case(sample, folder, seed=seed)
        outside = tree(folder).keys() - {f"out/{name}" for name in tree(out)}
        answer = looked(out, ["gc", "--yes"], seed=seed)
        assert faults_in(answer) == [], (seed, what, answer)
        assert outside <= tree(folder).keys(), (seed, what)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_tidy_data_of_damaged_records(sample, tmp_path):
    from experiments.report import gather

    for seed in range(120):
        folder = tmp_path / "x"
        folder.mkdir()
        out, what = a_case(sample, folder, seed=seed)
        answer = command_line.answer(lambda out=out: _gather(gather, out))
        assert faults_in(answer) == [], (seed, what, answer)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_reports_of_damaged_records(sample, tmp_path):
    """Written below the sweep alone; a report says what it lacks, or one line why there is none."""
    for seed in range(REPORTS):
        folder = tmp_path / "x"
        folder.mkdir()
        out, what = a_case(sample, folder, seed=7000 + seed)
        before = tree(out / "runs")
        answer = looked(
            out, [["report", "mine"], ["compare", "mine", "yours"]][seed % 2], seed=seed
        )
        assert faults_in(answer) == [], (seed, what, answer)
        assert tree(out / "runs") == before, (seed, what)
        shutil.rmtree(folder)


def _gather(tidy, out: Path) -> int:
    from experiments.errors import reporting

    with reporting():
        for run in tidy.gather(out, "mine").runs:
            dataclasses.asdict(run)
    return 0


# named: what fuzzing found ----------------------------------------------------------------------
def test_a_damaged_status_is_a_failed_run_that_the_same_command_goes_on_with(sample, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(sample, out)
    run = RunDir(sorted((out / "runs").iterdir())[0])
    for content in ("{", "[]", '{"state": 5}', '{"state": "odd"}', '{"steps": "x"}', "\udcff"):
        run.status_path.write_text(content, errors="surrogateescape")
        status = run.status()
        assert status.state == "failed"
        assert "status.json" in (status.error or "")
        assert status.attempts == len(run.attempt_records())


def test_a_damaged_result_is_no_result(sample, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(sample, out)
    runs = [RunDir(path) for path in sorted((out / "runs").iterdir())]
    run = next(run for run in runs if run.result() is not None)
    (run.path / "lock").unlink(missing_ok=True)
    for content in ("{", "[]", '{"metrics": 5}', '{"metrics": {"a": "b"}}', '{"step": "x"}'):
        run.result_path.write_text(content)
        assert run.ended() is None
        answer = looked(out, ["status", "--json"], seed=0)
        [state] = [r for r in json.loads(answer.out)["runs"] if r["run_id"] == run.run_id]
        assert state["state"] == "failed"
        assert "result.json is damaged" in state["reason"]
