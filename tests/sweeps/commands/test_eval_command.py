"""Which evaluations a command line asks for, and that nothing is written for a wrong one."""

from __future__ import annotations

import argparse
import functools
import shutil

import pytest

from experiments import typos
from experiments.disk.evaluations import evaluations
from experiments.disk.run_dir import RunDir
from experiments.identity import run_id
from experiments.run.evaluate import read_request
from experiments.run.runner import run_experiment
from relora_core.config import BlimpConfig, ConfigError, EvalConfig, PalomaConfig
from relora_core.data.grammar import VOCAB_SIZE
from sweeps.__main__ import main
from sweeps.commands import eval as command
from sweeps.planning.plan import make_plan, store
from tests.conftest import nano_config


def trained(folder):
    """A sweep of three runs: two trained with checkpoints at 2 and 4, one not begun."""
    points = []
    for seed in range(3):
        config = nano_config(
            seed=seed,
            model={"vocab_size": VOCAB_SIZE},
            train={"steps": 4},
            checkpoint={"every_steps": 2},
            eval={"blimp": BlimpConfig(enabled=True, max_pairs=2)},
        )
        config.output_dir = str(folder)
        points.append(({"seed": str(seed)}, config))
    plan = store(make_plan(points, name="s"), output_dir=folder)
    for cell in plan.cells[:2]:
        run_experiment(cell.config, RunDir(folder / "runs" / cell.run_id))
    return folder


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """(Where it was trained, a copy of how that was then.)"""
    folder = tmp_path_factory.mktemp("trained")
    kept = shutil.copytree(trained(folder / "out"), folder / "kept")
    return folder / "out", kept


@pytest.fixture
def out(once):
    shutil.rmtree(once[0])
    return shutil.copytree(once[1], once[0])


@pytest.fixture(scope="module")
def untouched(once):
    """For those that must write nothing."""
    return once[0]


@pytest.fixture
def runs(out):
    return sorted(out.glob("runs/*"), key=lambda p: p.name.split("-s")[-1])


def run_command(out, *words):
    parser = argparse.ArgumentParser()
    command.configure(parser)
    args = parser.parse_args(words)
    args.output_dir = str(out)
    return command.run(args)


@pytest.fixture
def call(out):
    return functools.partial(run_command, out)


def files(out):
    return sorted(out.rglob("*"))


def test_a_sweep_is_evaluated_with_its_own_evals_and_shown(out, runs, call, capsys):
    assert call("s", "--steps", "all") == 0
    for path in runs:
        assert list(evaluations(RunDir(path))) == [2, 4]
        final = RunDir(path).result()["metrics"]
        assert evaluations(RunDir(path))[4].items() <= final.items()
    told = capsys.readouterr()
    assert "seed=2: no such checkpoint: left out" in told.err
    assert "eval/blimp/no_bos/accuracy" in told.out
    assert told.out.count("seed=") == 4


def test_repeating_does_nothing_and_shows_the_same(out, call, capsys):
    assert call("s") == 0
    before, shown = files(out), capsys.readouterr().out
    stamps = [p.stat().st_mtime_ns for p in before]
    assert call("s") == 0
    assert files(out) == before
    assert [p.stat().st_mtime_ns for p in before] == stamps
    again = capsys.readouterr()
    assert again.out == shown
    assert "[1/" not in again.err


def test_an_override_adds_the_eval_it_names_and_no_other(runs, call):
    assert call(runs[0].name, "eval.paloma.max_documents=2", "--steps", "2") == 0
    found = evaluations(RunDir(runs[0]))
    assert list(found) == [2]
    assert "eval/paloma/perplexity" in found[2]
    assert not any("/blimp/" in name for name in found[2])
    assert evaluations(RunDir(runs[1])) == {}


def test_settings_other_than_the_runs_own_need_a_name(out, runs, call):
    before = files(out)
    with pytest.raises(ConfigError, match=r"--as must .*run's own eval\.blimp"):
        call("s", "eval.blimp.max_pairs=1")
    assert files(out) == before
    assert call("s", "eval.blimp.max_pairs=1", "--as", "short") == 0
    assert "short/blimp/no_bos/accuracy" in evaluations(RunDir(runs[0]))[4]


def test_an_override_keeps_the_runs_other_values(nano):
    own = PalomaConfig(enabled=True, path="/p", split="test")
    config = nano(eval={"paloma": own})
    changed = command.eval_settings(["eval.paloma.max_documents=3"])(config)
    assert changed.paloma == PalomaConfig(enabled=True, path="/p", split="test", max_documents=3)
    assert not changed.blimp.enabled
    changed = command.eval_settings(["eval=paloma_blimp", "eval.blimp.max_pairs=1"])(config)
    assert changed == EvalConfig(paloma=own, blimp=BlimpConfig(enabled=True, max_pairs=1))
    assert command.eval_settings([])(config) == config.eval
    changed = command.eval_settings(["eval.paloma.path=/q"])(config)
    assert changed.paloma == PalomaConfig(enabled=True, path="/q")


def test_an_option_gives_all_that_it_sets(nano, tmp_path, monkeypatch):
    """And the default experiment nothing: its limits are its own."""
    conf = tmp_path / "conf"
    shutil.copytree(typos.CONF, conf)
    (conf / "eval" / "real.yaml").write_text("blimp: {enabled: true, path: /b, max_pairs: 7}\n")
    monkeypatch.setattr(typos, "CONF", conf)
    config = nano(eval={"blimp": BlimpConfig(enabled=True, path="/own", max_pairs=3)})
    changed = command.eval_settings(["eval=real"])(config)
    assert changed == EvalConfig(blimp=BlimpConfig(enabled=True, path="/b", max_pairs=7))
    changed = command.eval_settings(["eval=paloma_blimp"])(config)
    assert changed.blimp == config.eval.blimp
    assert changed.paloma.max_documents is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["s", "eval.blmp.path=x"], "Did you mean 'eval.blimp.path'?"),
        (["s", "eval.blimp.pth=x"], "Did you mean 'eval.blimp.path'?"),
        (["s", "eval=paloma_blim"], "Did you mean 'paloma_blimp'?"),
        (["s", "blimp.path=x"], "Did you mean 'eval.blimp.path'?"),
        (["s", "relora.r=4"], "relora.r must be eval or a key below it"),
        (["s", "eval.blimp.max_pairs=0"], "eval.blimp.max_pairs must be"),
        (["s", "eval.blimp.max_pairs=1,2"], "several values"),
        (["s", "eval.blimp.path=/no/such"], "eval.blimp.path must be"),
        (["s", "eval=none"], "at least one eval must be on"),
        (["s", "--steps", "lst"], "Did you mean 'last'?"),
        (["s", "--steps", "3"], "must name runs with a checkpoint"),
        (["s", "--as", "train"], "--as must be a name"),
        (["s", "--after"], "--after needs --slurm"),
        (["t"], "got 't'"),
        (["eval=paloma_blimp"], "SWEEP|RUN must name"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(untouched, words, line):
    before = files(untouched)
    with pytest.raises(ConfigError) as error:
        run_command(untouched, *words)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert files(untouched) == before


def test_one_bad_checkpoint_does_not_stop_the_others(runs, call, capsys):
    (runs[0] / "checkpoints" / "step-00000004" / "model.safetensors").write_bytes(b"x" * 50)
    assert call("s") == 1
    assert "must be safetensors" in capsys.readouterr().err
    assert list(evaluations(RunDir(runs[1]))) == [4]


# SLURM --------------------------------------------------------------------------------------------
@pytest.fixture
def submitted(monkeypatch):
    """Keeps what sweeps.slurm.evals would submit."""
    calls = []

    def submit_evals(requests, *, sweep, launcher, output_dir, after):
        calls.append(([read_request(path) for path in requests], sweep, after))

    monkeypatch.setattr("sweeps.slurm.evals.submit_evals", submit_evals)
    return calls


def test_jobs_get_what_is_missing(runs, call, submitted):
    assert call(runs[0].name) == 0
    assert call("s", "--slurm") == 0
    ((requests, sweep, after),) = submitted
    assert [run.run_id for run, _ in requests] == [runs[1].name]
    assert (sweep, after) == ("s", False)
    assert requests[0][1].eval.blimp == BlimpConfig(enabled=True, max_pairs=2)


def test_after_takes_runs_that_have_no_checkpoint_yet(out, call, submitted, monkeypatch):
    from sweeps.planning.plan import load
    from sweeps.slurm import cluster

    cell = load(out / "sweeps" / "s" / "plan.json").cells[2]
    third = RunDir(out / "runs" / run_id(cell.config))
    third.create(cell.config)
    third.update_status(state="queued", job_id="7")
    job = cluster.Job(job_id="7", state="PENDING", reason="", name="", node="", source="squeue")
    monkeypatch.setattr(cluster, "available", lambda: True)
    monkeypatch.setattr(cluster, "jobs", lambda ids: {"7": job})
    assert call("s", "--slurm", "--after") == 0
    assert third.run_id in [run.run_id for run, _ in submitted[0][0]]
    third.update_status(state="running", job_id=None, host="elsewhere")
    with pytest.raises(ConfigError, match="--after must name runs of SLURM jobs"):
        call("s", "--slurm", "--after")


def test_a_run_of_no_sweep_has_no_launcher(out, runs, call, submitted):
    (out / "sweeps" / "s" / "plan.json").unlink()
    with pytest.raises(ConfigError, match="--slurm needs runs of a sweep"):
        call(runs[0].name, "--slurm")
    assert not (runs[0] / "evals").exists()


def test_settings_may_stand_after_options(untouched, capsys, monkeypatch):
    given = []
    monkeypatch.setattr(command, "run", lambda args: given.append((args.words, args.name)) or 0)
    words = ["eval", "s", "--as", "short", "eval.blimp.max_pairs=1"]
    assert main(["--output-dir", str(untouched), *words]) == 0
    assert main([*words[:1], "--as", "short", "s", "--steps", "all", words[-1]]) == 0
    assert given == [(["s", "eval.blimp.max_pairs=1"], "short")] * 2
    with pytest.raises(SystemExit):
        main([*words, "--stepz", "all"])
    assert "unrecognized arguments: --stepz" in capsys.readouterr().err
