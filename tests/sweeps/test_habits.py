"""What users of the stock plugins for submitit and Optuna type does what our own names do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments.identity import run_id
from hydra_plugins.relora_sweeps._axes import dimension
from hydra_plugins.relora_sweeps._habits import translate
from relora_core.config import ConfigError
from tests.fuzz import command_line

ROOT = Path(__file__).resolve().parents[2]
SLURM = "hydra/launcher=submitit_slurm"
LOCAL = "hydra/launcher=submitit_local"
OPTUNA = ["hydra/sweeper=optuna", "search=lr_and_rank"]
GOAL = 'search.objectives=["eval/paloma/perplexity {} last"]'


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """run_ids, launcher, studies and recorded command of what a command line would start."""
    taken = []

    def run_sweep(points, *, launcher, command, **options):
        taken.append(([run_id(config) for _, config in points], repr(launcher), command))
        return 0

    def run_search(drafts, *, name, launcher, command, **options):
        bases = [[(groups, run_id(config)) for groups, config in d.bases] for d in drafts]
        studies = [(d.search, d.space) for d in drafts]
        taken.append((bases, studies, name, repr(launcher), command))
        return 0

    monkeypatch.setattr("sweeps.launch.run_sweep", run_sweep)
    monkeypatch.setattr("sweeps.search.launch.run_search", run_search)

    def run(*words):
        answer = command_line.run_py(["-m", *words], cwd=tmp_path)
        assert command_line.faults(answer) == []
        assert len(taken) == 1, answer.err
        return taken.pop(), answer.out

    return run


@pytest.mark.parametrize(
    ("stock", "ours"),
    [
        (
            [SLURM, "hydra.launcher.timeout_min=240", "hydra.launcher.array_parallelism=8",
             "+hydra.launcher.additional_parameters.mail-type=END", "hydra.launcher.gres=gpu:1",
             "hydra.launcher.partition=p", "hydra.launcher.mem_gb=64", "+experiment=paper",
             "hydra.launcher.name=x"],
            ["hydra/launcher=slurm", "hydra.launcher.time=240", "hydra.launcher.max_parallel=8",
             "hydra.launcher.mail_type=END", "++hydra.launcher.extra.gres=gpu:1",
             "hydra.launcher.partition=p", "hydra.launcher.mem_gb=64", "experiment=paper"],
        ),
        (
            [LOCAL, "hydra.launcher.timeout_min=5", "hydra.launcher.array_parallelism=2"],
            ["hydra/launcher=local", "hydra.launcher.max_parallel=2"],
        ),
        (
            [*OPTUNA, "hydra.sweeper.n_trials=5", "hydra.sweeper.n_jobs=2",
             "hydra.sweeper.direction=maximize", "hydra.sweeper.study_name=mine",
             "hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=3",
             "hydra.sweeper.storage=null",
             "hydra.sweeper.params={train.lr:'tag(log,interval(1e-3,1e-2))'}"],
            ["hydra/sweeper=search", "search=lr_and_rank", "search.n_trials=5",
             "hydra.launcher.max_parallel=2", GOAL.format("maximize"), "sweep.name=mine",
             "search.sampler.name=random", "search.seed=3",
             "train.lr=tag(log,interval(1e-3,1e-2))"],
        ),
    ],
)  # fmt: skip
def test_stock_names_start_what_our_names_start(asked, stock, ours):
    (one, printed), (two, nothing) = asked(*stock, "seed=1"), asked(*ours, "seed=1")
    assert one == two
    changed = [word for word in stock if word not in ours]
    assert [line.partition(" is ")[0].partition(" has ")[0] for line in printed.splitlines()] == (
        changed
    )
    assert nothing == ""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([SLURM, "hydra.launcher.timeout_min=240"],
         "hydra.launcher.timeout_min=240 is hydra.launcher.time=240"),
        ([SLURM, "hydra.launcher.additional_parameters={mail-type:END,nice:5}"],
         "is hydra.launcher.mail_type=END ++hydra.launcher.extra.nice=5"),
        ([SLURM, "+hydra.launcher.additional_parameters={time:8,mem:64G,ntasks-per-node:2}"],
         "is hydra.launcher.time=8 hydra.launcher.mem_gb=64 hydra.launcher.tasks_per_node=2"),
        (["hydra/launcher=slurm", "+hydra.launcher.extra.cpus-per-task=8"],
         "+hydra.launcher.extra.cpus-per-task=8 is hydra.launcher.cpus_per_task=8"),
        ([SLURM, "hydra.launcher.max_num_timeout=3"], "has no effect: jobs resume until hydra"),
        ([LOCAL, "hydra.launcher.nodes=1"], "has no effect: that is so without it"),
        ([*OPTUNA, "hydra.sweeper.direction=minimize"], f"is {GOAL.format('minimize')}"),
        ([*OPTUNA, "hydra.sweeper.direction=MAX"], f"is {GOAL.format('maximize')}"),
        ([*OPTUNA, "+hydra.sweeper.sampler={seed:3}"], "is search.seed=3"),
        ([*OPTUNA, "+hydra.sweeper.sampler={seed:3,n_startup_trials:5}"],
         "is search.seed=3 ++search.sampler.n_startup_trials=5"),
        (["hydra/sweeper=search", "hydra/sweeper/sampler=gp"], "is search.sampler.name=gp"),
        (["+experiment=paper"], "+experiment=paper is experiment=paper"),
    ],
)  # fmt: skip
def test_each_translation_is_one_line(words, line):
    notes = translate(words)[1]
    assert line in notes[-1]
    assert "\n" not in "".join(notes)


@pytest.mark.parametrize(
    "value",
    ["choice(4,8)", "choice('a b',c,null,1.5)", "range(1,9,2)", "interval(0.001,0.01)",
     "tag(log,int(interval(1,64)))", "tag(a,b,choice(true,2))", "shuffle(range(0,5))"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["params", "search_space"])
def test_values_that_lost_their_quotes_to_a_shell_are_read_by_hydras_grammar(name, value):
    made = translate([*OPTUNA, f"hydra.sweeper.{name}={{relora.r:{value},seed:1}}"])[0]
    read = OverridesParser.create().parse_override
    assert dimension(read(made[-2])) == dimension(read(f"relora.r={value}"))
    assert made[-1] == "seed=1"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([*OPTUNA, "hydra.sweeper.search_space={train.lr:{type:float,low:1e-4,high:1e-2}}"],
         "hydra.sweeper.search_space: train.lr must be values in Hydra's grammar, got {type:float,"
         "low:0.0001,high:0.01}; as in search.space it is train.lr='tag(log,interval(LOW,HIGH))'"),
        ([SLURM, "+hydra.launcher.additional_parameters={a:{b:c}}"],
         "hydra.launcher.additional_parameters: a must be one value, got {b:c}"),
        ([SLURM, "hydra.launcher.timeout_min=240", "hydra.launcher.time=5:00:00"],
         "hydra.launcher.timeout_min=240 and hydra.launcher.time=5:00:00 disagree"),
        ([SLURM, "hydra.launcher.gres=gpu:1", "+hydra.launcher.extra.gres=gpu:2"],
         "hydra.launcher.gres=gpu:1 and +hydra.launcher.extra.gres=gpu:2 disagree"),
        ([SLURM, "hydra.launcher.time=60", "+hydra.launcher.additional_parameters.time=61"],
         "hydra.launcher.time=60 and +hydra.launcher.additional_parameters.time=61 disagree"),
        (["hydra/launcher=slurm", "hydra.launcher.nodes=1", "+hydra.launcher.extra.nodes=2"],
         "hydra.launcher.nodes=1 and +hydra.launcher.extra.nodes=2 disagree"),
        ([*OPTUNA, "hydra.sweeper.n_trials=5", "search.n_trials=6"],
         "hydra.sweeper.n_trials=5 and search.n_trials=6 disagree"),
        ([*OPTUNA, "hydra.sweeper.direction=minimize", GOAL.format("max")],
         "hydra.sweeper.direction=minimize and search.objectives="),
        ([*OPTUNA, "hydra.sweeper.direction=[minimize,maximize]"], "a metric for each direction"),
        ([*OPTUNA, "+hydra.sweeper.custom_search_space=a.b"], "cannot be had: it is code"),
        ([*OPTUNA, "hydra.sweeper.max_failure_rate=1"], "cannot be had: it is a share"),
        ([*OPTUNA, "hydra/sweeper/sampler=motpe"], "hydra/sweeper/sampler must be one of tpe"),
        (["hydra/sweeper/sampler=tpe"], "hydra/sweeper/sampler=tpe needs hydra/sweeper=optuna, or "
         "it is search.sampler.name=tpe with search"),
        ([*OPTUNA, "hydra.sweeper.sampler._target_=optuna.samplers.TPESampler"],
         "cannot be had: configs call no code; hydra/sweeper/sampler=NAME chooses"),
        ([*OPTUNA, "+hydra.sweeper.sampler={_target_:a.b}"],
         "hydra.sweeper.sampler._target_=\"a.b\" cannot be had: configs call no code"),
        ([*OPTUNA, "hydra.sweeper.direction=Minimize", GOAL.format("MAX")],
         "hydra.sweeper.direction=Minimize and search.objectives="),
        ([LOCAL, "hydra.launcher.nodes=2"], "need hydra/launcher=slurm"),
    ],
)  # fmt: skip
def test_names_that_disagree_and_what_cannot_be_had_are_one_line(words, line):
    with pytest.raises(ConfigError) as refused:
        translate(words)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_two_names_that_agree_are_one():
    words = [SLURM, "hydra.launcher.timeout_min=240", "hydra.launcher.time=4:00:00"]
    assert translate(words)[0] == ["hydra/launcher=slurm", "hydra.launcher.time=240"]


def test_our_own_words_stay_as_they_are():
    words = ["-m", "--config-dir", "x", "relora.r=4,8", "hydra/launcher=slurm", "seed=1", "seed=2"]
    words += ["+hydra.launcher.extra.gres=a", "hydra.sweeper.params=1", "~x", "a='"]
    assert translate(words) == (words, [])


STOCK = """
from dataclasses import dataclass
from hydra.core.config_store import ConfigStore
from hydra.plugins.{kind} import {base}

class Stock{base}({base}):
    def setup(self, **given): raise AssertionError("the stock plugin was asked")
    def launch(self, *given): raise AssertionError
    def sweep(self, arguments): raise AssertionError

@dataclass
class Conf:
    _target_: str = "hydra_plugins.{package}.stock.Stock{base}"

ConfigStore.instance().store(
    group="hydra/{kind}", name="{name}", node=Conf, provider="{package}"
)
ConfigStore.instance().store(
    group="hydra/{kind}/sampler", name="tpe", node=Conf, provider="{package}"
)
"""


@pytest.mark.slow
def test_stock_plugins_installed_beside_ours_do_not_clash(tmp_path):
    for package, kind, name in (
        ("hydra_submitit_launcher", "launcher", "submitit_local"),
        ("hydra_optuna_sweeper", "sweeper", "optuna"),
    ):
        folder = tmp_path / "site/hydra_plugins" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        text = STOCK.format(package=package, kind=kind, base=kind.title(), name=name)
        (folder / "stock.py").write_text(text)

    def plan(*words):
        return subprocess.run(
            [sys.executable, ROOT / "run.py", "--plan", *words, "relora.r=4,16"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"},
            capture_output=True,
            text=True,
            check=False,
        )

    for words in ([LOCAL, *OPTUNA, "hydra/sweeper/sampler=tpe"], []):
        done = plan(*words)
        assert done.returncode == 0, done.stderr
        assert "relora.r" in done.stdout
    done = plan(*OPTUNA, "hydra.sweeper.mine=3")  # explained by what all plugins have
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


@pytest.mark.parametrize("by", ["--config-dir={}", "hydra.searchpath=[file://{}]"])
def test_configs_outside_the_checkout_are_options_like_ours(asked, tmp_path_factory, by):
    """The example of docs/recipes.md, "Keep your own configs"."""
    own = tmp_path_factory.mktemp("own")
    page = (ROOT / "docs/recipes.md").read_text().partition("## Keep your own configs")[2]
    for block in page.partition("\n## ")[0].split("```yaml ")[1:]:
        name, _, rest = block.partition("\n")
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_text(rest.partition("```")[0])
    words = [by.format(own), "experiment=mine", "sweep=mine"]
    (ids, _, _), _ = asked(*words)
    assert len(ids) == len(set(ids)) == 4
    assert all(name.startswith("wide-relora-") for name in ids)
    same = [
        "experiment=demo",
        "model.name=wide",
        "model.d_model=48",
        "model.d_ff=96",
        "train.steps=50",
    ]
    assert sorted(asked("relora.r=4,8", "seed=0,1", *same)[0][0]) == sorted(ids)


def test_a_password_in_an_address_is_not_repeated():
    address = "hydra.sweeper.storage=postgresql://me:hush@host/db"
    arguments, lines = translate(["hydra/sweeper=optuna", address])
    assert arguments[-1] == "search.storage=postgresql://me:hush@host/db"  # and is refused there
    assert "me:***@host" in lines[-1]
    assert "hush" not in "".join(lines)
