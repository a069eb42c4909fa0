"""Evaluations apart from training give training's numbers, never touch the run, and resume."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from experiments.disk.evaluations import all_metrics, evaluations
from experiments.disk.run_dir import RunDir
from experiments.environment import ROOT
from experiments.run import evaluate as module
from experiments.run.evaluate import (
    Request,
    check,
    complete_eval,
    evaluate,
    main,
    missing,
    write_request,
)
from experiments.run.runner import run_experiment
from relora_core.config import BlimpConfig, ConfigError, EvalConfig, PalomaConfig
from relora_core.data.grammar import VOCAB_SIZE
from tests import warm

FEW = {
    "paloma": PalomaConfig(enabled=True, max_documents=2, every_steps=4),
    "blimp": BlimpConfig(enabled=True, max_pairs=2, every_steps=4),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains each setting once; tests work on copies."""
    from tests.conftest import nano_config

    runs = {}

    def train(key="plain", **changes):
        if key not in runs:
            folder = tmp_path_factory.mktemp(key)
            sections = {
                "model": {"vocab_size": VOCAB_SIZE},
                "relora": {"reset_frequency": 5},  # so that checkpoints hold adapters at work
                "eval": dict(FEW),
            }
            checkpoint = {"every_steps": 4, "keep_last": 9}
            config = nano_config(**{**sections, "checkpoint": checkpoint, **changes})
            config.output_dir = str(folder)
            run_dir = RunDir(folder / "runs" / "a")
            run_experiment(config, run_dir)
            runs[key] = run_dir
        return runs[key]

    return train


@pytest.fixture
def run(trained, tmp_path):
    """A finished run of 12 steps with checkpoints and evals at 4, 8 and 12."""

    def copy(key="plain", **changes):
        source = trained(key, **changes)
        return RunDir(shutil.copytree(source.path, tmp_path / key / "runs" / "a"))

    return copy


def request_of(run_dir, *, steps="last", name="eval", **sections):
    chosen = EvalConfig(**(sections or FEW))
    eval = complete_eval(run_dir.config(), eval=chosen)
    return Request(name=name, eval=eval, steps=steps)


def in_training(run_dir):
    by_step = {}
    for event in run_dir.events():
        if event["kind"] == "eval":
            by_step.setdefault(event["step"], {}).update(event["metrics"])
    by_step.pop(0)
    return by_step


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("plain", {}),
        ("full_rank", {"method": "full_rank"}),
        (
            "odd",
            {
                "relora": {
                    "reset_frequency": 4,
                    "scaling": "trainable",
                    "dropout": 0.1,
                    "rank_schedule": [[4, 2]],
                    "nested_rank": True,
                }
            },
        ),
    ],
)
def test_numbers_are_those_of_training_at_every_checkpoint(run, key, changes):
    """Adapters count as they are, in `odd` just drawn by a restart and of another rank."""
    run_dir = run(key, **changes)
    evaluate(run_dir, request=request_of(run_dir, steps="all"), say=lambda _: None)
    assert evaluations(run_dir) == in_training(run_dir)
    assert list(evaluations(run_dir)) == [4, 8, 12]


def test_the_run_itself_and_this_process_are_left_as_they_were(run):
    run_dir = run()
    before = {p: p.read_bytes() for p in run_dir.path.rglob("*") if p.is_file()}
    generator, threads = torch.get_rng_state(), torch.get_num_threads()
    evaluate(run_dir, request=request_of(run_dir), say=lambda _: None)
    after = {p: p.read_bytes() for p in run_dir.path.rglob("*") if p.is_file()}
    new = set(after) - set(before)
    assert all(p.is_relative_to(run_dir.evals) for p in new)
    assert {p: after[p] for p in before} == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.get_num_threads() == threads


def test_a_rerun_does_what_is_missing_and_nothing_else(run):
    run_dir = run()
    blimp = request_of(run_dir, blimp=FEW["blimp"])
    evaluate(run_dir, request=blimp, say=lambda _: None)
    files = {p: p.stat().st_mtime_ns for p in run_dir.evals.rglob("step-*.json")}
    assert [p.name for p in files] == ["step-00000012-blimp.json"]
    both = request_of(run_dir, steps="all")
    assert missing(run_dir, request=both) == [4, 8, 12]
    (run_dir.checkpoints / "step-00000008").rename(run_dir.path / "aside")
    evaluate(run_dir, request=both, say=lambda _: None)
    assert list(evaluations(run_dir)) == [4, 12]
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in files.items())
    (run_dir.path / "aside").rename(run_dir.checkpoints / "step-00000008")
    assert missing(run_dir, request=both) == [8]


def test_a_checkpoint_that_vanishes_meanwhile_is_left_out_with_a_line(run, monkeypatch):
    run_dir, lines = run(), []
    load = module._load

    def rotating(config, checkpoint):
        if checkpoint.name == "step-00000004":  # as a rotation does, in no particular order
            (checkpoint / "model.safetensors").unlink()
        return load(config, checkpoint)

    monkeypatch.setattr(module, "_load", rotating)
    evaluate(run_dir, request=request_of(run_dir, steps="all"), say=lines.append)
    assert list(evaluations(run_dir)) == [8, 12]
    assert "a step 4: the checkpoint was removed: left out" in lines


def test_steps_without_a_checkpoint_are_said(run):
    run_dir, lines = run(), []
    evaluate(run_dir, request=request_of(run_dir, steps=[5, 8]), say=lines.append)
    assert lines[0] == "a has no checkpoint of step 5: left out"
    assert list(evaluations(run_dir)) == [8]


def test_other_settings_need_another_name_and_keep_their_metrics_apart(run):
    run_dir = run()
    other = BlimpConfig(enabled=True, max_pairs=1)
    request = request_of(run_dir, blimp=other)
    with pytest.raises(ConfigError, match=r"--as must .*run's own eval\.blimp"):
        evaluate(run_dir, request=request)
    assert not run_dir.evals.exists()
    named = dataclasses.replace(request, name="short")
    evaluate(run_dir, request=named, say=lambda _: None)
    assert all(name.startswith("short/blimp/") for name in evaluations(run_dir)[12])
    again = request_of(run_dir, blimp=BlimpConfig(enabled=True, max_pairs=2), name="short")
    with pytest.raises(ConfigError, match="must be a new name"):
        check(run_dir, request=again)


def test_an_eval_that_the_run_did_not_have_takes_its_plain_name(run):
    run_dir = run("trained_without", eval={})
    evaluate(run_dir, request=request_of(run_dir, blimp=FEW["blimp"]), say=lambda _: None)
    assert "eval/blimp/no_bos/accuracy" in all_metrics(run_dir)
    assert "train/loss" in all_metrics(run_dir)


def test_an_earlier_checkpoints_numbers_are_not_the_runs(run):
    run_dir = run("trained_without", eval={})
    assert run_dir.ended() == "finished"
    evaluate(run_dir, request=request_of(run_dir, steps=[8]), say=lambda _: None)
    assert all_metrics(run_dir) == run_dir.result()["metrics"]
    run_dir.result_path.unlink()
    assert all_metrics(run_dir) == evaluations(run_dir)[8]


@pytest.mark.parametrize("name", ["train", "a/b", "", "..", "x y"])
def test_a_name_that_cannot_stand_before_metrics_is_refused(run, name):
    run_dir = run()
    with pytest.raises(ConfigError, match="--as must be a name"):
        check(run_dir, request=request_of(run_dir, name=name))


def test_bad_eval_settings_are_refused_before_anything_is_written(run, tmp_path):
    config = run().config()
    with pytest.raises(ConfigError, match="at least one eval must be on"):
        complete_eval(config, eval=EvalConfig())
    with pytest.raises(ConfigError, match=r"eval\.blimp\.path"):
        complete_eval(
            config, eval=EvalConfig(blimp=BlimpConfig(enabled=True, path=str(tmp_path / "no")))
        )
    with pytest.raises(ConfigError, match=r"eval\.blimp\.max_pairs must be"):
        complete_eval(config, eval=EvalConfig(blimp=BlimpConfig(enabled=True, max_pairs=0)))


@pytest.mark.slow
def test_a_request_is_one_file_and_a_job(run):
    run_dir = run()
    request = request_of(run_dir)
    path = write_request(run_dir, request=request)
    assert write_request(run_dir, request=request) == path
    assert write_request(run_dir, request=request_of(run_dir, steps="all")) != path
    done = warm.run(["-m", "experiments.run.evaluate", path], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert evaluations(run_dir)[12] == in_training(run_dir)[12]
    stored = json.loads((run_dir.evals / "eval" / "step-00000012-paloma.json").read_text())
    assert stored["tables"]["paloma_domains"]
    assert stored["code_hash"]


def test_a_bad_request_is_one_line_and_exit_code_1(run, tmp_path, capsys):
    run_dir = run()
    path = write_request(run_dir, request=request_of(run_dir))
    raw = json.loads(path.read_text())
    raw["eval"]["blimp"]["max_pears"] = 1
    path.write_text(json.dumps(raw))
    for bad in (path, tmp_path / "none.json"):
        assert main([str(bad)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: REQUEST must be")
        assert error.count("\n") == 1
    shutil.rmtree(run_dir.checkpoints)
    assert run_dir.checkpoint_steps() == []
    assert main([str(write_request(run_dir, request=request_of(run_dir, steps="all")))]) == 1
    assert "must have a checkpoint" in capsys.readouterr().err
