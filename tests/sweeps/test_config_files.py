"""What a config file says under `hydra`, or overrides: done, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import porch

SLURM = "defaults: [demo, override /hydra/launcher: slurm]\n"
FILES = {
    "experiment/a": f"{SLURM}hydra: {{launcher: {{partition: gpu}}}}",
    "experiment/b": f"{SLURM}seed: 5\nhydra: {{launcher: {{partition: gpu}}}}",
    "experiment/other": f"{SLURM}seed: 6\nhydra: {{launcher: {{partition: cpu}}}}",
    "experiment/heir": "defaults: [a, override /hydra/launcher: slurm_cpu]",
    "experiment/partition": "defaults: [demo]\nhydra: {launcher: {partition: gpu}}",
    "experiment/parallel": "defaults: [demo]\nhydra: {launcher: {max_parallel: 3}}",
    "experiment/params": "defaults: [demo]\nhydra: {sweeper: {params: {seed: '0,1'}}}",
    "experiment/folder": "defaults: [demo]\nhydra: {run: {dir: elsewhere}}",
    "experiment/subfolder": "defaults: [demo]\nhydra: {sweep: {subdir: elsewhere}}",
    "experiment/environment": "defaults: [demo]\nhydra: {job: {env_set: {X: 1}}}",
    "experiment/chdir": "defaults: [demo]\nhydra: {job: {chdir: true}}",
    "experiment/logs": "defaults: [demo, override /hydra/job_logging: default]",
    "experiment/many": "defaults: [demo]\nhydra: {mode: MULTIRUN}",
    "experiment/search": (
        "defaults: [demo, override /hydra/sweeper: search, override /search: lr_and_rank]"
    ),
    "sweep/s1": "hydra: {sweeper: {params: {seed: '0,1,2,3'}}}",
    "sweep/s2": "hydra: {sweeper: {params: {seed: '4,5,6,7'}}}",
    "sweep/slurm": (
        "defaults: [override /hydra/launcher: slurm]\n"
        "hydra: {launcher: {partition: p}, sweeper: {params: {seed: '0,1'}}}"
    ),
    "sweep/names_one": "hydra: {sweeper: {params: {experiment: a, seed: '0,1'}}}",
}
BARE = {"experiment/bare": "seed: 4", "sweep/bare": "hydra: {sweeper: {params: {seed: '0,1'}}}"}
SLURM_Q = ("hydra/launcher=slurm", "hydra.launcher.partition=q")
SEARCH = ("hydra/sweeper=search", "search=lr_and_rank", "model=nano")


pytestmark = pytest.mark.slow  # each composes as the command does, a second


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for name, text in (FILES | BARE).items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        head = "" if name in BARE else "# @package _global_\n"
        path.write_text(f"{head}{text}\n")
    return folder


@pytest.fixture
def answer(own, tmp_path, monkeypatch):
    """What the command line does: its answer, and the points and launcher that it came to."""
    launched = []

    def run_sweep(points, *, launcher, **options):
        launched.append((points, launcher))
        return 0

    def run_search(search, *, bases, launcher, **options):
        launched.append((bases, launcher))
        return 0

    monkeypatch.setattr("sweeps.launch.run_sweep", run_sweep)
    monkeypatch.setattr("sweeps.search.launch.run_search", run_search)

    def ask(*words):
        told = porch.run_py(["--config-dir", str(own), *words], cwd=tmp_path)
        assert porch.faults(told) == []
        assert list(Path(tmp_path).iterdir()) == []
        return told, launched

    return ask


@pytest.mark.parametrize(
    ("words", "points", "partition"),
    [
        (("--plan", "experiment=a"), 1, "gpu"),
        (("--plan", "experiment=a,b"), 2, "gpu"),
        (("-m", "sweep=slurm"), 2, "p"),
        (("-m", "sweep=names_one"), 2, "gpu"),
        (("-m", "experiment=a,other", *SLURM_Q), 2, "q"),
        (("--plan", *SEARCH, "experiment=a,b"), 2, "gpu"),
    ],
)  # fmt: skip
def test_a_launcher_that_all_points_agree_on_is_taken(answer, words, points, partition):
    told, [(planned, launcher)] = answer(*words)
    assert told.code == 0
    assert (launcher.kind, launcher.options.partition) == ("slurm", partition)
    assert len(planned) == points


def test_an_experiment_may_choose_more_than_its_ancestor(answer):
    told, [(_, launcher)] = answer("--plan", "experiment=heir")
    assert (told.code, launcher.kind, launcher.options.gpus_per_node) == (0, "slurm", 0)


def test_an_option_of_the_chosen_launcher_is_taken_from_a_file(answer):
    _, [(_, launcher)] = answer("-m", "experiment=parallel")
    assert (launcher.kind, launcher.max_parallel) == ("local", 3)


@pytest.mark.parametrize("words", [("experiment=many",), ("--plan", "experiment=params")])
def test_a_sweep_that_an_experiment_asks_for_is_one(answer, words):
    told, [(points, launcher)] = answer(*words)
    assert (told.code, launcher.kind) == (0, "local")
    assert len(points) == (2 if "--plan" in words else 1)


def test_a_file_may_choose_the_search(answer):
    told, [(bases, _)] = answer("--plan", "experiment=search")
    assert (told.code, len(bases)) == (0, 1)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--plan", "sweep=s1,s2"), "hydra.sweeper.params must come from a file that the command"),
        (("-m", "experiment=demo,params"), "with experiment=params: points are made before"),
        (("-m", "experiment=demo,search"), "hydra/sweeper must come from a file that the command"),
        (
            ("-m", "experiment=a,other"),
            "hydra.launcher.partition must be the same for all runs of a command, got gpu with "
            "experiment=a and cpu with experiment=other",
        ),
        (("-m", "experiment=demo,a"), "got LocalLauncher with experiment=demo and SlurmLauncher"),
        (("-m", "experiment=a", "sweep=slurm"), None),
        (("-m", "experiment=heir", "sweep=slurm"), "hydra/launcher must be chosen by one file"),
        (("experiment=logs",), "hydra/job_logging must be chosen by one file, got none in config"),
        (("experiment=a",), "hydra/launcher must be local for one run, got 'slurm': add -m"),
        (("experiment=params",), "add -m"),
        (("experiment=folder",), "hydra.run.dir must be left alone by a config file"),
        (("-m", "experiment=demo,subfolder"), "hydra.sweep.subdir must be left alone"),
        (("experiment=environment",), "hydra.job.env_set must be left alone by a config file"),
        (("experiment=chdir",), "hydra.job.chdir must be left alone by a config file, got True"),
        (
            ("-m", "experiment=partition"),
            "hydra.launcher.partition needs hydra/launcher=slurm (in experiment/partition",
        ),
        (("-m", "hydra.launcher.time=3"), "hydra.launcher.time needs hydra/launcher=slurm"),
        (("experiment=bare",), "experiment/bare must begin with '# @package _global_'"),
        (("-m", "sweep=bare"), "sweep/bare must begin with '# @package _global_'"),
        (("-m", *SEARCH[:1], "search=lr_and_rank,pareto"), "search must be one option"),
        (("-m", *SEARCH, "experiment=a,other"), "hydra.launcher.partition must be the same"),
        (("-m", *SEARCH, "sweep=s1"), "hydra.sweeper.params needs hydra/sweeper=relora_grid (in s"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_have_is_refused_in_one_line(answer, words, line):
    told, launched = answer(*words)
    if line is None:  # both say slurm: nothing is at odds, and the later file has its partition
        [(points, launcher)] = launched
        assert (told.code, launcher.options.partition, len(points)) == (0, "p", 2)
        return
    assert (told.code, launched) == (2, [])
    assert line in told.err
    assert told.err.count("\n") == 1
