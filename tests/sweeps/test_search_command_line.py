"""A search on the command line: values become a space, groups configs, mistakes one line."""

from __future__ import annotations

import optuna
import pytest
import yaml
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode

from experiments import schema, typos
from experiments.environment import ROOT
from experiments.identity import run_id
from experiments.run.complete import complete
from hydra_plugins.relora_sweeps._axes import dimension, parse
from relora_core.config import ConfigError
from sweeps.search import samplers
from sweeps.search.launch import _plan_part
from sweeps.search.space import Choice, Float, Int, check_space, with_values
from sweeps.search.spec import Spec
from sweeps.search.trial import config_at
from tests import warm

pytestmark = pytest.mark.slow

BASE = ["hydra/sweeper=search", "search=lr_and_rank", "model=nano"]
SMALL = ["relora.r=4,8", "search.enqueue=[]"]


@pytest.fixture
def drafts_of(loader, monkeypatch):
    """What run_search is given for these words: its drafts, and the other arguments."""

    def go(*words):
        given = []

        def run_search(drafts, **options):
            given.extend([drafts, options])
            return 0

        monkeypatch.setattr("sweeps.search.launch.run_search", run_search)
        config = loader.load_configuration("config", [*words], run_mode=RunMode.MULTIRUN)
        sweeper = Plugins.instance().instantiate_sweeper(
            config=config,
            hydra_context=HydraContext(config_loader=loader, callbacks=None),  # type: ignore[arg-type]
            task_function=lambda config: None,
        )
        sweeper.sweep([w for w in words if not w.startswith("hydra")])
        return given

    return go


@pytest.fixture
def searched(drafts_of):
    """What run_search is given for these overrides of BASE, a search without arms."""

    def go(*words):
        [draft], options = drafts_of(*BASE, *words)
        return {"search": draft.search, "space": draft.space, "bases": draft.bases, **options}

    return go


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tag(log, interval(1e-4, 1e-2))", Float(low=1e-4, high=1e-2, log=True)),
        ("interval(0, 1)", Float(low=0.0, high=1.0)),
        ("int(interval(4, 64))", Int(low=4, high=64)),
        ("tag(log, int(interval(1, 64)))", Int(low=1, high=64, log=True)),
        ("range(8, 64, 8)", Int(low=8, high=56, step=8)),
        ("float(range(8, 64, 8))", Float(low=8.0, high=56.0, step=8.0)),
        ("range(9, 0, -3)", Int(low=3, high=9, step=3)),
        ("range(0, 1, 0.25)", Float(low=0.0, high=0.75, step=0.25)),
        ("range(0.1, 0.4, 0.1)", Float(low=0.1, high=0.3, step=0.1)),
        ("choice(4, 8, 16)", Choice(values=[4, 8, 16])),
        ("4,8", Choice(values=[4, 8])),
        ("'a b',true,null,1.5", Choice(values=["a b", True, None, 1.5])),
    ],
)
def test_hydras_grammar_becomes_a_dimension(loader, text, expected):
    [override] = parse([f"x.y={text}"], loader=loader)
    assert dimension(override) == expected


def test_a_range_holds_the_values_that_a_grid_would_run(loader):
    for text in ("range(3,20,4)", "range(0,1,0.3)", "range(5)", "range(0.1,0.4,0.1)"):
        [override] = parse([f"x={text}"], loader=loader)
        values = [float(v) for v in override.sweep_string_iterator()]
        assert dimension(override).finite() == values
        [again] = parse([f"x={dimension(override).text()}"], loader=loader)
        assert dimension(again) == dimension(override)


def test_a_searched_point_is_the_run_of_the_grid_that_meets_it(loader, make):
    [override] = parse(["relora.dropout=range(0.1,0.5,0.1)"], loader=loader)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = {samplers.suggest(study.ask(), "x", dimension(override)) for _ in range(60)}
    assert drawn == {0.1, 0.2, 0.3, 0.4}
    zero = with_values(make(), {"relora.dropout": -0.0})
    assert run_id(zero) == run_id(with_values(make(), {"relora.dropout": 0}))


def test_the_command_line_widens_replaces_and_fixes_the_files_space(searched):
    given = searched("train.lr=1e-3", "relora.r=4,8", "relora.alpha=interval(1,32)")
    assert given["space"] == {
        "relora.r": Choice(values=[4, 8]),
        "relora.alpha": Float(low=1.0, high=32.0),
    }
    [(choices, config)] = given["bases"]
    assert choices == {}
    assert config.train.lr == 1e-3
    assert given["search"].enqueue == [{"relora.r": 16}]  # what is fixed is not tried otherwise
    assert given["name"] == "lr_and_rank"


def test_every_combination_of_searched_groups_is_composed(searched):
    given = searched(*SMALL, "model=nano,tiny", "method=choice(lora,relora)")
    configs = {(c["model"], c["method"]): config for c, config in given["bases"]}
    assert set(configs) == {(m, k) for m in ("nano", "tiny") for k in ("lora", "relora")}
    for (model, method), config in configs.items():
        assert config == schema.compose([f"model={model}", f"method={method}"])


def test_options_of_samplers_are_given_without_a_plus(searched):
    given = searched(*SMALL, "search.sampler.name=random", "search.pruner.n_startup_trials=2")
    assert given["search"].sampler == {"name": "random"}
    assert given["search"].pruner == {"name": "median", "n_startup_trials": 2}


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("[a,b]", ["a", "b"]),
        ("'a=1,b'", ["a=1,b"]),
        ("a,b,a", ["a", "b"]),
        ("[]", []),
    ],
)
def test_sweeps_to_learn_from_are_a_list_however_they_are_given(searched, word, names):
    assert searched(*SMALL, f"search.learn_from={word}")["search"].learn_from == names


def command(*words, cwd):
    return warm.run([ROOT / "run.py", *words], cwd=cwd)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["search.n_trail=3"], "Did you mean 'search.n_trials'?"),
        (["relora.r=4,4096"], "relora.r must be in [1, 16]"),
        (["relora.rr=4,8"], "Did you mean 'relora.r'?"),
        (["train.lr=interval(1,-1)"], "search.space.train.lr"),
        (["search.enqueue=[{relora.r: 16}]"], "got 16; search.enqueue=[] tries nothing first"),
        (["search=lr_nd_rank"], "Did you mean 'lr_and_rank'?"),
        (["search.sampler.name=tpee"], "tpe"),
        (["search.objectives=[cost/trainabl]"], "cost/trainable"),
        (["sweep.max_gpu_hours=1"], "sweep.max_gpu_hours"),
        (["search.learn_from=gone"], "search.learn_from must be sweeps in outputs (none yet)"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(words, says, tmp_path):
    done = command("-m", *BASE, *SMALL, *words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["search=pareto"], ["-m", "search=pareto", "seed=0,1"]])
def test_a_search_without_the_sweeper_that_searches_is_refused(words, tmp_path):
    done = command(*words, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "hydra/sweeper=search" in done.stderr


@pytest.mark.parametrize("option", [o for o in typos.options("search") if o != "none"])
def test_every_search_of_the_project_can_be_planned(option, tmp_path):
    done = command("--plan", "hydra/sweeper=search", f"search={option}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "left" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_in_a_search_alpha_follows_the_rank_at_a_fixed_or_searched_scale(searched):
    given = searched(*SMALL, "relora.scale=2")
    ((_, base),) = given["bases"]
    assert [with_values(base, {"relora.r": r}).relora.alpha for r in (4, 8)] == [8.0, 16.0]
    given = searched("relora.r=8", "relora.scale=interval(0.5,4)", "search.enqueue=[]")
    ((_, base),) = given["bases"]
    check_space(given["space"], groups=[], when={}, config=base)
    one = with_values(base, {"relora.scale": 0.5})
    assert (one.relora.alpha, one.relora.scale) == (4.0, 0.5)  # a study is read from its runs
    for words in (["relora.alpha=4,8"], ["relora.alpha=16"]):
        with pytest.raises(ConfigError, match=r"^relora.alpha must be left out"):
            searched(*SMALL, "relora.scale=2", *words)


def test_what_refers_to_a_searched_key_or_the_seed_follows_it(drafts_of, tmp_path):
    """Also in a process that reads the study; each trial is the run of a grid with its values."""
    words = [
        "model=nano",
        "train.eps='${divide:${train.lr},1000}'",
        "schedule.warmup_steps='${seed}'",
    ]
    words += ["relora.alpha='${relora.r}'", "relora.dropout='${oc.env:DROPOUT_OF_THIS_TEST,0.2}'"]
    [draft], _ = drafts_of(*BASE, *words[1:], "relora.r=4,8", "search.enqueue=[]")
    points = [(choices, complete(config)) for choices, config in draft.bases]
    path = tmp_path / "out" / "sweeps" / "s" / "study" / "study.json"
    path.parent.mkdir(parents=True)
    _plan_part(draft, points, folder=path.parent, command="", notes=[]).spec.write(path)
    spec = Spec.read(path)
    assert set(spec.follows[""]) == {"train.eps", "schedule.warmup_steps", "relora.alpha"}
    for lr, r, seed in ((1e-3, 4, 0), (1e-2, 8, 3)):
        config = config_at(spec, {"train.lr": lr, "relora.r": r}, seed=seed)
        grid = [*words, f"train.lr={lr}", f"relora.r={r}", f"seed={seed}"]
        assert run_id(config) == run_id(complete(schema.compose(grid)))
        relora, warmup = config.relora, config.schedule.warmup_steps
        assert (config.train.eps, warmup, relora.alpha) == (lr / 1000, seed, r)


# arms -------------------------------------------------------------------------------------------
ARMS = {
    "full": ["method=full_rank"],
    "lora": ["method=lora", "relora.r=choice(2,4)"],
    "fast": ["method=lora", "train.lr=tag(log,interval(1e-2,1e-1))"],
}


@pytest.fixture
def arms_of(drafts_of):
    """Arm -> what run_search is given of it, with ARMS and these words."""

    def go(*words):
        lists = (f"{name}: [{','.join(map(repr, texts))}]" for name, texts in ARMS.items())
        drafts, _ = drafts_of(
            "hydra/sweeper=search",
            "model=nano",
            f"search.arms={{{', '.join(lists)}}}",
            "search.space={train.lr: 'tag(log,interval(1e-3,1e-2))'}",
            "search.objectives=[train/loss]",
            *words,
        )
        return {draft.arm: draft for draft in drafts}

    return go


def test_an_arm_is_its_overrides_and_what_it_searches(arms_of):
    made = arms_of()
    assert list(made) == ["full", "lora", "fast"]
    file, fast = Float(low=1e-3, high=1e-2, log=True), Float(low=1e-2, high=1e-1, log=True)
    assert made["full"].space == {"train.lr": file}
    assert made["lora"].space == {"train.lr": file, "relora.r": Choice(values=[2, 4])}
    assert made["fast"].space == {"train.lr": fast}
    for name, one in made.items():
        ((_, base),) = one.bases
        assert base.sweep.arm == name
        assert base.method == ("full_rank" if name == "full" else "lora")
        assert one.search.arms == {}


def test_the_command_line_wins_over_an_arm_and_an_arm_over_the_file(arms_of):
    made = arms_of("relora.r=8", "train.lr=1e-2,2e-2")
    assert made["lora"].space == made["fast"].space == {"train.lr": Choice(values=[1e-2, 2e-2])}
    ((_, base),) = made["lora"].bases
    assert base.relora.r == 8


def test_some_arms_can_be_taken(arms_of):
    assert list(arms_of("sweep.arm=fast,full")) == ["fast", "full"]
    assert list(arms_of("sweep.arm=lora")) == ["lora"]
    with pytest.raises(ConfigError, match=r"^sweep.arm must be one of full, lora, fast, got 'lor"):
        arms_of("sweep.arm=lor")


def test_what_is_tried_first_is_tried_in_arms_that_search_it(arms_of):
    made = arms_of("search.enqueue=[{train.lr: 0.01, relora.r: 4}]")
    assert made["lora"].search.enqueue == [{"train.lr": 0.01, "relora.r": 4}]
    assert made["full"].search.enqueue == [{"train.lr": 0.01}]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["search.arms.lora=['method=lor']"], "arm lora:"),
        (["search.arms.x=['search.seeds=3']"], "search.arms.x must set what runs do"),
        (["search.arms.x='method=lora'"], "search.arms.x must be overrides"),
        (["sweep.arm=nothing"], "sweep.arm must be one of full_rank, "),
        (["search.learn_from=x"], "search.learn_from must be empty with search.arms"),
        (["search.objectives=[train/loss,cost/trainable]"], "search.objectives must be one"),
        (["search.arms.relora=['relora.r=choice(4,4096)']"], "arm relora: search.space must hold"),
    ],
)
def test_a_mistake_in_an_arm_is_one_line_and_leaves_nothing(words, says, tmp_path):
    given = ["-m", "hydra/sweeper=search", "search=method_lr", "model=nano", *words]
    done = command(*given, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_all_runs_have_in_common_gives_way_to_arms_and_the_command_line(arms_of, searched):
    common = "search.common={train.batch_size: 16, relora.r: 3, train.eps: 0.001}"
    made = arms_of(common, "train.eps=1e-4")
    for name, r in [("full", 3), ("fast", 3), ("lora", 2)]:
        ((_, base),) = made[name].bases
        assert (base.train.batch_size, base.train.eps, base.relora.r) == (16, 1e-4, r)
    assert made["lora"].space["relora.r"] == Choice(values=[2, 4])
    given = searched(*SMALL, "search.common={train.batch_size: 16}")
    ((_, base),) = given["bases"]
    assert base.train.batch_size == 16
    assert given["search"].common == {}  # they are in the bases
    with pytest.raises(ConfigError, match=r"^search.common must set what runs do"):
        arms_of("search.common={sweep.name: x}")


def test_references_among_what_arms_have_in_common_are_those_of_their_runs(arms_of, monkeypatch):
    monkeypatch.setenv("STEPS_OF_THIS_TEST", "7")
    text = '"${divide:${train.lr},300}"'
    made = arms_of(
        f"search.common={{train.eps: {text}, train.steps: '${{oc.env:STEPS_OF_THIS_TEST}}'}}"
    )
    ((_, base),) = made["lora"].bases
    assert base.train.steps == 7
    assert made["lora"].follows == [{"train.eps": "${divide:${train.lr},300}"}]


def test_where_a_choice_is_not_drawn_it_is_the_configs_own(arms_of):
    space = "search.space={relora.r: 'choice(8,16)', relora.dropout: 'choice(0.3,0.4)'}"
    made = arms_of(space, "search.when={relora.dropout: 'relora.r=16'}", "relora.r=8,16")
    ((_, base),) = made["lora"].bases
    assert base.relora.r == 8
    assert base.relora.dropout == schema.compose(["model=nano", "method=lora"]).relora.dropout


def test_seeds_begin_at_that_of_the_runs(arms_of):
    made = arms_of("search.common={seed: 100}", "search.seeds=2")
    assert made["lora"].search.seeds == [100, 101]


def test_what_is_read_once_for_all_trials_is_not_searched(tmp_path):
    for words in (["data.text_field=a,b"], ["data.path='t${seed}'"]):
        done = command("-m", *BASE, *SMALL, "data=text", *words, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "must be the same in all trials of a search" in done.stderr or "data" in done.stderr


def test_the_study_of_methods_tunes_every_arm_that_it_compares():
    """An arm in one file alone, or set otherwise there, would be compared untuned."""
    search, sweep = (
        yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text())
        for group, name in [("search", "method_lr"), ("sweep", "methods")]
    )
    compared = sweep["hydra"]["sweeper"]
    assert list(search["arms"]) == list(compared["arms"])
    assert search["common"].items() <= compared["params"].items()
    for name, lines in search["arms"].items():
        fixed = {line for line in lines if "choice(" not in line and "interval(" not in line}
        tuned = {line.split("=")[0] for line in lines} - {line.split("=")[0] for line in fixed}
        there = {line for line in compared["arms"][name] if line.split("=")[0] not in tuned}
        assert fixed == there, name
