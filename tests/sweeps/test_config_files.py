"""What a config file sets under `hydra`, or overrides: it is done, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import typos
from tests.fuzz import command_line

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
    "experiment/one": "defaults: [demo]\nhydra: {mode: RUN}",
    "experiment/by_sweep": "defaults: [demo, '/extra@_global_': '${sweep}']",
    "extra/none": "seed: 9",
    "experiment/search": (
        "defaults: [demo, override /hydra/sweeper: search, override /search: lr_and_rank]"
    ),
    "sweep/s1": "hydra: {sweeper: {params: {seed: '0,1,2,3'}}}",
    "sweep/s2": "hydra: {sweeper: {params: {seed: '4,5,6,7'}}}",
    "sweep/slurm": (
        "defaults: [override /hydra/launcher: slurm]\n"
        "hydra: {launcher: {partition: p}, sweeper: {params: {seed: '0,1'}}}"
    ),
    "experiment/typo": "defaults: [demo, override /model: tny]",
    "experiment/key": "defaults: [demo]\ntrain: {stepz: 5}",
    "experiment/unset": "defaults: [demo]\ntrain: {steps: '${train.stepz}'}",
    "experiment/float": "defaults: [demo]\ntrain: {steps: 1.5}",
    "experiment/trials": "defaults: [demo]\nhydra: {sweeper: {n_trials: 3}}",
    "sweep/follows": (
        "hydra: {sweeper: {params: {train.lr: '0.01,0.02', relora.alpha: '${relora.r}', "
        "train.eps: '${divide:${train.lr},300}', seed: '${oc.env:SEEDS_OF_THIS_TEST}'}}}"
    ),
    "sweep/follows_in_arms": (
        "hydra: {sweeper: {params: {seed: '${oc.env:SEEDS_OF_THIS_TEST}'}, "
        "arms: {a: [train.lr=0.01, &e 'train.eps=\"${divide:${train.lr},300}\"', "
        "&s 'relora.alpha=${relora.r}'], b: [train.lr=0.02, relora.r=4, *e, *s]}}}"
    ),
    "sweep/timeout": (
        "defaults: [override /hydra/launcher: slurm]\nhydra: {launcher: {timeout_min: 60}}"
    ),
    "sweep/partitoin": (
        "defaults: [override /hydra/launcher: slurm]\nhydra: {launcher: {partitoin: p}}"
    ),
    "sweep/gres": (
        "defaults: [override /hydra/launcher: slurm]\nhydra: {launcher: {gres: 'gpu:1'}}"
    ),
    "sweep/list": "hydra: {sweeper: {params: {relora.r: [4, 8]}}}",
    "sweep/nested": "hydra: {sweeper: {params: {relora: {r: '4,8'}}}}",
    "sweep/nested_list": "hydra: {sweeper: {params: {relora: {r: [4, 8]}}}}",
    "sweep/body": "relora: {r: [4, 8]}",
    "sweep/arm": "hydra: {sweeper: {arms: {a: ['relora.r=[4,8]']}}}",
    "experiment/resources": "defaults: [demo]\nseed: 010\nresources: {time: 1:30:00}",
    "sweep/names_one": "hydra: {sweeper: {params: {experiment: a, seed: '0,1'}}}",
}
MARKED = {"experiment/marked": "\ufeff# @package _global_\ndefaults: [demo]\nseed: 7\n"}
MINE = {
    "model/mine": "d_model: 48\nd_ff: 96\n",
    "hydra/launcher/mine": "defaults: [slurm, _self_]\ntime: 12:00:00\naccount: 0123\n",
}
BARE = {"experiment/bare": "seed: 4", "sweep/bare": "hydra: {sweeper: {params: {seed: '0,1'}}}"}
SLURM_Q = ("hydra/launcher=slurm", "hydra.launcher.partition=q")
MODELS = ", ".join(sorted([*typos.options("model"), "mine"]))
SEARCH = ("hydra/sweeper=search", "search=lr_and_rank", "model=nano")


pytestmark = pytest.mark.slow  # each composes as the command does


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for name, text in (FILES | BARE).items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        head = "" if name in BARE else "# @package _global_\n"
        path.write_text(f"{head}{text}\n")
    for name, text in (MARKED | MINE).items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    return folder


@pytest.fixture
def ask(own, tmp_path, monkeypatch):
    """The command's answer, and the points and launchers that it would have started."""
    launched = []

    def run_sweep(points, *, launcher, **options):
        launched.append((points, launcher))
        return 0

    def run_search(drafts, *, launcher, **options):
        [draft] = drafts
        launched.append((draft.bases, launcher))
        return 0

    monkeypatch.setattr("sweeps.launch.run_sweep", run_sweep)
    monkeypatch.setattr("sweeps.search.launch.run_search", run_search)

    def run(*words):
        answer = command_line.run_py(["--config-dir", str(own), *words], cwd=tmp_path)
        assert command_line.faults(answer) == []
        assert list(Path(tmp_path).iterdir()) == []
        return answer, launched

    return run


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
def test_a_launcher_that_all_points_agree_on_is_taken(ask, words, points, partition):
    answer, [(planned, launcher)] = ask(*words)
    assert answer.code == 0
    assert (launcher.kind, launcher.options.partition) == ("slurm", partition)
    assert len(planned) == points


def test_references_in_axes_and_arms_are_those_of_each_point(ask, monkeypatch):
    """But what refers to no key of a run, which may be an axis, is read at once."""
    monkeypatch.setenv("SEEDS_OF_THIS_TEST", "4,5")
    for name in ("follows", "follows_in_arms"):
        answer, launched = ask("--plan", f"sweep={name}")
        points, _ = launched.pop()
        configs = [config for _, config in points]
        assert answer.code == 0
        assert {config.seed for config in configs} == {4, 5}
        assert {config.train.lr for config in configs} == {0.01, 0.02}
        assert all(config.train.eps == config.train.lr / 300 for config in configs)
        assert all(config.relora.alpha == config.relora.r for config in configs)


def test_an_experiment_may_choose_more_than_its_ancestor(ask):
    answer, [(_, launcher)] = ask("--plan", "experiment=heir")
    assert (answer.code, launcher.kind, launcher.options.gpus_per_node) == (0, "slurm", 0)


def test_an_option_of_the_chosen_launcher_is_taken_from_a_file(ask):
    _, [(_, launcher)] = ask("-m", "experiment=parallel")
    assert (launcher.kind, launcher.max_parallel) == ("local", 3)


@pytest.mark.parametrize("words", [("experiment=many",), ("--plan", "experiment=params")])
def test_a_sweep_that_an_experiment_asks_for_is_one(ask, words):
    answer, [(points, launcher)] = ask(*words)
    assert (answer.code, launcher.kind) == (0, "local")
    assert len(points) == (2 if "--plan" in words else 1)


def test_the_flag_for_a_sweep_counts_for_more_than_a_files_mode(ask):
    answer, [(points, _)] = ask("-m", "experiment=one", "seed=0,1")
    assert (answer.code, len(points)) == (0, 2)


def test_a_list_of_defaults_may_name_what_another_chooses(ask):
    answer, [(points, _)] = ask("-m", "experiment=by_sweep")
    assert (answer.code, [config.seed for _, config in points]) == (0, [9])


def test_a_byte_order_mark_changes_nothing(ask):
    answer, [(points, _)] = ask("-m", "experiment=marked")
    assert (answer.code, [config.seed for _, config in points]) == (0, [7])


def test_a_launcher_of_ones_own_is_one(ask):
    answer, [(_, launcher)] = ask("-m", "hydra/launcher=mine", "model=mine,nano")
    assert (answer.code, launcher.kind) == (0, "slurm")


def test_numbers_of_files_are_read_as_those_of_the_command_line(ask):
    """YAML 1.1 has 12:00:00 as 43,200, which SLURM would take for minutes, and 010 as 8."""
    words = ("resources.time=1:30:00", "seed=010")
    for given in (("experiment=resources",), words):
        _, [*_, (points, launcher)] = ask("-m", "hydra/launcher=mine", *given)
        [(_, config)] = points
        assert (config.seed, config.resources.time) == (10, "1:30:00")
        assert (launcher.options.time, launcher.options.account) == ("12:00:00", "0123")


def test_null_is_a_value_of_an_axis_like_others(ask):
    answer, [(points, _)] = ask("-m", "train.grad_clip=choice(null,1.0)")
    assert (answer.code, [config.train.grad_clip for _, config in points]) == (0, [None, 1.0])


def test_the_folder_of_options_may_stand_among_overrides(own, tmp_path):
    words = ["--plan", "model=nano", "--config-dir", str(own), "experiment=float", "-m", "seed=1"]
    answer = command_line.run_py(words, cwd=tmp_path)
    assert answer.err == (
        "error: train.steps must be an integer, got '1.5' (in experiment/float)\n"
    )


def test_hydras_own_help_is_shown(ask):
    answer, _ = ask("--hydra-help")
    assert answer.code == 0
    assert "hydra/launcher: " in answer.out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model/tiny", ()),
        ("model/tiny", ("-m", "model=nano,tiny")),
        ("experiment/demo", ()),
        ("config", ("model=nano",)),
    ],
)
def test_an_option_of_ones_own_that_ours_would_shadow_is_refused(tmp_path, name, words):
    path = tmp_path / "own" / f"{name}.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\nseed: 3\n")
    words = ["--config-dir", str(tmp_path / "own"), *words]
    answer = command_line.run_py(words, cwd=tmp_path)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert (
        f"{name} must be one file, got {typos.CONF / name}.yaml and {path}: give your" in answer.err
    )
    path.write_bytes((typos.CONF / f"{name}.yaml").read_bytes())
    assert command_line.run_py([*words, "model=nano"], cwd=tmp_path).started


def test_a_file_may_choose_the_search(ask):
    answer, [(bases, _)] = ask("--plan", "experiment=search")
    assert (answer.code, len(bases)) == (0, 1)


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
        # With options of one's own, mistakes elsewhere are named as before.
        (("experiment=a", "model=tny"), f"model must be one of {MODELS}, got"),
        (("experiment=aa",), "got 'aa'. Did you mean 'a'?"),
        (("model=mine", "relora.rr=8"), "Did you mean 'relora.r'?"),
        (("model=mine", "relora.r=8,16"), "relora.r=8,16 gives several values: expected one"),
        (("-m", "model=mine,nano", "eval=nine"), "eval must be one of none, paloma_blimp, got"),
        (("-m", "hydra/launcher=mime"), "Did you mean 'mine'?"),
        (("experiment=typo",), f"model must be one of {MODELS}, got 'tny'"),
        (("experiment=float",), "train.steps must be an integer, got '1.5' (in experiment/float)"),
        (("experiment=key",), "train.stepz is not a known key (in experiment/key). Did you mean"),
        (
            ("-m", "sweep=timeout"),
            "hydra.launcher.timeout_min is not a known key (in sweep/timeout). Did you mean "
            "'hydra.launcher.time'?",
        ),
        (("-m", "sweep=partitoin"), "(in sweep/partitoin). Did you mean 'hydra.launcher.part"),
        (("-m", "sweep=gres"), "(in sweep/gres). Did you mean 'hydra.launcher.extra.gres'?"),
        (("experiment=unset",), "train.steps: ${train.stepz} is none, since there is no such key."),
        (("relora.r=${relora.rr}",), "relora.r: ${relora.rr} is none, since there is no such key."),
        (
            ("-m", *SLURM_Q, "hydra.launcher.setup=['export X=${HOME}']"),
            "hydra.launcher.setup: ${HOME} is none, since there is no such key. A variable of the",
        ),
        (
            ("-m", *SLURM_Q[:1], "hydra.launcher.partition=a,b"),
            "must be the same for all runs of a command, got 'a,b'; a text with commas is quoted: "
            "'hydra.launcher.partition=\"a,b\"'",
        ),
        # Several values stand without brackets.
        (("-m", "relora.r=[4,8]"), "'[4, 8]'; values of an axis go without brackets, relora.r=4,8"),
        (("-m", "sweep=list"), "'[4, 8]'; values of an axis go without brackets, relora.r=4,8"),
        (("-m", "sweep=arm"), "'[4, 8]'; values of an axis go without brackets, relora.r=4,8"),
        (("-m", "sweep=body"), "go without brackets, relora.r=4,8 (in sweep/body)"),
        (("-m", "sweep=nested"), "must be values, got a section; write relora.r: 4,8"),
        (("-m", "sweep=nested_list"), "must be values, got a section; write relora.r: 4,8"),
        (("-m", *SEARCH, "relora.r=[4,8]"), "go without brackets, relora.r=4,8"),
        (("-m", *SEARCH, "search.space.relora.r=[4,8]"), "a section; write relora.r: 4,8"),
        # Keys of other sweepers and launchers.
        (("-m", *SEARCH, "hydra.sweeper.n_trials=3"), "Did you mean 'search.n_trials' with hydra"),
        (("-m", "+hydra.sweeper.n_trials=3"), "Did you mean 'search.n_trials' with hydra"),
        (("-m", "hydra.sweeper.direction=min"), "Did you mean 'search.objectives' with"),
        (("-m", "hydra.sweeper.n_jobs=2"), "Did you mean 'hydra.launcher.max_parallel'?"),
        (("experiment=trials",), "(in experiment/trials). Did you mean 'search.n_trials' with"),
        (("-m", "hydra/sweeper=ax"), "Did you mean 'search'?"),
        (("-m", "hydra/launcher=joblib"), "Did you mean 'local'?"),
        (("-m", "train.grad_clip=sort(null,1)"), "sort(null,1)' cannot be evaluated: "),
        (
            ("-m", "train.grad_clip=float(choice(null,1))"),
            "float() takes no null; nearest valid: train.grad_clip=choice(null,1)",
        ),
        (("-m", *SEARCH, 'search.storage="sqlite:///~/x.db"'), "; nearest valid: sqlite:////"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_have_is_refused_in_one_line(ask, words, line):
    answer, launched = ask(*words)
    if line is None:  # both choose slurm, so nothing conflicts; the later file sets the partition
        [(points, launcher)] = launched
        assert (answer.code, launcher.options.partition, len(points)) == (0, "p", 2)
        return
    assert (answer.code, launched) == (2, [])
    assert line in answer.err
    assert answer.err.count("\n") == 1
