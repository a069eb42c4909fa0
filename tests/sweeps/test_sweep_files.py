"""conf/sweep: what each file plans, and that its arms differ in what their names say alone."""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode

from experiments import schema, typos
from experiments.identity import arm_id, scientific
from experiments.report import registered
from hydra_plugins.relora_sweeps import plugins
from relora_core import schedule
from relora_core.config import ConfigError, get
from sweeps.planning.grid import points_from
from sweeps.planning.plan import make_plan

FILES = [name for name in typos.options("sweep") if name != "none"]
LOCAL = ["data=grammar", "output_dir=x"]


@pytest.fixture(scope="module")
def planned(loader):
    """A command line's words after `-m` -> the cells and the plan, made once."""

    class Kept(plugins.OurLauncher):
        """Takes the cells and runs nothing."""

        def launch(self, job_overrides, initial_job_idx):
            self.cells = job_overrides
            return []

    @functools.cache
    def plan(*words):
        master = loader.load_configuration("config", list(words), run_mode=RunMode.MULTIRUN)
        sweeper = Plugins.instance().instantiate_sweeper(
            config=master,
            hydra_context=HydraContext(config_loader=loader, callbacks=None),  # type: ignore[arg-type]
            task_function=lambda config: None,
        )
        sweeper.launcher = Kept()
        sweeper.sweep(list(words))
        cells = sweeper.launcher.cells
        configs = plugins.Composer(loader, master).all(cells)
        return cells, make_plan(list(zip(points_from(cells), configs, strict=True)))

    return plan


@pytest.fixture(scope="module")
def arms(planned):
    """Name of a sweep file -> arm -> its config at the first point."""

    def read(file, *words):
        _, plan = planned(f"sweep={file}", *LOCAL, "seed=0", *words)
        found = {}
        for cell in plan.cells:
            found.setdefault(cell.config.sweep.arm, cell.config)
        return found

    return read


def differing(one, two):
    left, right = scientific(one), scientific(two)
    return {key for key in {*left, *right} if left.get(key) != right.get(key)}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_sweep_file_plans_arms_that_all_differ(planned, file):
    _, plan = planned(f"sweep={file}", *LOCAL)
    assert plan.name == file
    assert len({cell.name for cell in plan.cells}) == len(plan.cells) > 1
    assert all(f"arm={cell.config.sweep.arm}" in cell.name.split() for cell in plan.cells)
    names = {}
    for cell in plan.cells:
        names.setdefault(arm_id(cell.config), set()).add(cell.config.sweep.arm)
    assert all(len(found) == 1 for found in names.values())


@pytest.mark.parametrize("file", FILES)
def test_every_sweep_says_question_command_and_cost(file):
    text = (typos.CONF / "sweep" / f"{file}.yaml").read_text()
    for word in ("Question:", "Command:", "Cost:"):
        assert f"# {word}" in text


# paper ------------------------------------------------------------------------------------------
def test_the_paper_is_four_runs_with_its_tables_numbers(planned):
    cells, plan = planned("sweep=paper", *LOCAL, "data.seq_len=2048")
    found = {(c.config.sweep.arm, c.config.model.name): c.config for c in plan.cells}
    assert set(found) == {(a, m) for a in ("decoder", "relora") for m in ("tiny", "small")}
    assert {"data=grammar", "experiment=paper"} <= set(cells[0])
    for (arm, model), config in found.items():
        train, width = config.train, {"tiny": (96, 384), "small": (384, 1536)}[model]
        assert (config.model.d_model, config.model.d_ff) == width
        assert (config.model.n_layers, config.model.n_heads, config.model.n_kv_heads) == (12, 12, 4)
        assert (train.steps, train.batch_size, train.lr) == (20_000, 1024, 3e-4)
        assert (train.weight_decay, train.beta1, train.beta2) == (0.01, 0.9, 0.999)
        assert (train.eps, train.grad_clip, train.precision) == (1e-8, None, "bf16")
        assert train.steps * train.batch_size * config.data.seq_len == 41_943_040_000
        assert (config.seed, config.method) == (42, {"decoder": "full_rank"}.get(arm, "relora"))


def test_the_papers_schedules_are_those_recovered_from_its_code(arms):
    """0-based update -> factor, as its own trainer computes them (N = 200,000)."""
    found = arms("paper", "model=tiny", "sweep.arm=decoder,relora,relora_as_described")
    expected = {
        "decoder": {0: 0, 1: 0.0004, 1999: 0.7996, 4000: 0.992405, 19999: 0.911397},
        "relora": {1000: 0.5, 2000: 0, 2050: 0.5, 3999: 0.999774, 4100: 0.999750, 19999: 0.981774},
        "relora_as_described": {2050: 0.499966, 3999: 0.972889, 4100: 0.970111, 19999: 0.1},
    }
    for arm, factors in expected.items():
        for step, factor in factors.items():
            assert schedule.lr_factor(step, config=found[arm]) == pytest.approx(factor, abs=1e-6)
    restarts = {arm: schedule.restart_steps(config) for arm, config in found.items()}
    assert restarts["relora"] == list(range(2001, 20_000, 2000))
    assert restarts["decoder"] == []
    relora = found["relora"].relora
    assert (relora.r, relora.alpha, relora.dropout, relora.prune_ratio) == (16, 32, 0.1, 0.999)
    assert sorted(relora.target_modules) == ["attention", "swiglu"]


def test_as_described_the_papers_arms_differ_in_relora_alone(arms):
    found = arms("paper", "model=tiny", "sweep.arm=decoder_as_described,relora_as_described")
    keys = differing(*found.values())
    assert {key for key in keys if not key.startswith("relora.")} == {"method"}


# audit ------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_audits_path_changes_one_knob_a_step_through_all_four_procedures(arms, loader):
    found = arms("audit")
    path = [found[name] for name in found if name[0].isdigit()]
    knobs = [differing(*pair) for pair in pairwise(path)]
    assert all(len(keys) == 1 for keys in knobs)
    assert len(set().union(*knobs)) == len(knobs) == len(differing(path[0], path[-1]))
    same = [
        "experiment=audit_cpu_curves",
        "model=micro",
        "dynamics=paper",
        "schedule.total_steps=null",
    ]
    modes = {0: "as_executed", 2: "as_coded", 6: "as_described", 8: "corrected"}
    for index, mode in modes.items():
        words = [*same, f"relora={mode}"]
        alone = loader.load_configuration("config", words, run_mode=RunMode.RUN)
        assert arm_id(schema.to_run_config(alone)) == arm_id(path[index])


@pytest.mark.parametrize("file", ["audit", "audit_knobs", "beyond", "audit_10m", "audit_paper"])
def test_an_audits_evals_make_curves(arms, file):
    words = ["model=tiny", "data.seq_len=2048"] if file == "audit_paper" else []
    config = next(iter(arms(file, *words).values()))
    for one in (config.eval.paloma, config.eval.blimp):
        assert one.every_steps
        assert config.train.steps // one.every_steps >= 9  # a point for each cycle


def test_the_curves_experiment_adds_evals_and_changes_nothing_else(loader):
    plain, curves = (
        schema.to_run_config(
            loader.load_configuration("config", [f"experiment={name}"], run_mode=RunMode.RUN)
        )
        for name in ("audit_cpu", "audit_cpu_curves")
    )
    assert differing(plain, curves) == {"eval.paloma.every_steps", "eval.blimp.every_steps"}


def test_the_audits_arms_are_compared_alike(arms):
    """Whatever is not the method or a knob of its restarts is the same in all."""
    found = arms("audit")
    for name, config in found.items():
        keys = differing(found["full_rank"], config) - {"method"}
        rest = {key for key in keys if not key.startswith("relora.")}
        assert rest == ({"schedule.total_steps"} if "published_horizon" in name else set())
    assert len(schedule.restart_steps(found["8_corrected"])) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("experiment=paper",), ("train.steps=300",)])
def test_the_audit_keeps_equal_horizons_at_any_budget(arms, words):
    some = "full_rank,full_rank_published_horizon,as_executed_published_horizon,2_float32_base"
    found = arms("audit", *words, f"sweep.arm={some},8_corrected")
    horizons = {n: c.schedule.total_steps for n, c in found.items()}
    assert {h for n, h in horizons.items() if "published_horizon" not in n} == {None}


def test_each_knob_is_repaired_alone_and_broken_alone(arms):
    found = arms("audit_knobs")
    whole = differing(found["as_executed"], found["corrected"])
    only = [differing(found["as_executed"], c) for n, c in found.items() if n.startswith("only_")]
    but = [differing(found["corrected"], c) for n, c in found.items() if n.startswith("all_but_")]
    for changes in (only, but):
        assert all(len(keys) == 1 for keys in changes)
        assert set().union(*changes) == whole
        assert len(changes) == len(whole)


def test_the_two_audits_share_what_they_have_in_common(arms):
    path, knobs = arms("audit"), arms("audit_knobs")
    for one, two in (
        ("0_as_executed", "as_executed"),
        ("1_reinit", "only_reinit"),
        ("7_joint_mask", "all_but_adam_step"),
        ("8_corrected", "corrected"),
    ):
        assert arm_id(path[one]) == arm_id(knobs[two])


def test_the_larger_audits_arms_are_compared_alike(arms):
    """All is the same but the method, the knobs of its restarts, a named horizon and the rate."""
    for name, config in (found := arms("audit_10m")).items():
        keys = differing(found["full_rank"], config) - {"method"}
        rest = {key for key in keys if not key.startswith("relora.")}
        assert rest == ({"schedule.total_steps"} if "published_horizon" in name else set())
    assert schedule.restart_steps(found["corrected"]) == list(range(500, 5000, 500))
    assert found["corrected"].relora.restart_warmup_steps == 25
    train = found["corrected"].train
    assert train.lr / (25 * train.eps) == pytest.approx(3e-4 / (100 * 1e-8))


def test_the_larger_audits_rates_are_those_of_a_search(loader):
    """An arm that no search tunes borrows from one that it does; `*_common` from full rank."""
    audit, search = (
        loader.load_configuration("config", words, run_mode=RunMode.MULTIRUN)
        for words in (["sweep=audit_10m"], ["search=audit_lr"])
    )
    tuned = set(search.search.arms)
    for name, words in audit.hydra.sweeper.arms.items():
        source = dict(word.split("=", 1) for word in words).get("sweep.tuned_as", name)
        assert source in tuned, name
        assert (source == "full_rank") == (name == "full_rank" or name.endswith("_common")), name


def test_what_the_larger_audit_tests_are_arms_of_it(loader):
    audit = loader.load_configuration("config", ["sweep=audit_10m"], run_mode=RunMode.MULTIRUN)
    named = registered.read(typos.CONF.parent / "docs" / "audit" / "comparisons.yaml")
    assert {name for one in named for name in (one.arm, one.reference)} <= set(
        audit.hydra.sweeper.arms
    )
    assert len({(one.arm, one.reference, one.metric_title) for one in named}) == len(named) > 0


def test_the_papers_audit_has_ten_cycles(arms):
    found = arms("audit_paper", "model=tiny", "data.seq_len=2048")
    for name, config in found.items():
        assert config.train.steps * config.train.batch_size * 2048 == pytest.approx(10e9, rel=1e-3)
        restarts = {"corrected_cycle_2000": 2, "corrected_warm_start": 8}.get(name, 9)
        assert len(schedule.restart_steps(config)) == (restarts if config.method == "relora" else 0)


# beyond -----------------------------------------------------------------------------------------
def test_beyond_spans_its_axes_at_one_step_size(planned):
    _, plan = planned("sweep=beyond", *LOCAL, "seed=0")
    tried = [cell.config for cell in plan.cells if cell.config.method == "relora"]
    keys = ("relora.r", "relora.reset_frequency", "relora.prune_ratio", "relora.warm_start_steps")
    axes = [{get(config, key) for config in tried} for key in keys]
    assert len(tried) == len(axes[0]) * len(axes[1]) * len(axes[2]) * len(axes[3])
    assert all(len(values) > 1 for values in axes)
    assert {config.relora.alpha / config.relora.r for config in tried} == {2.0}
    assert len(plan.cells) == len(tried) + 1
    assert all(schedule.restart_steps(config) for config in tried)


# methods ----------------------------------------------------------------------------------------
def test_the_short_study_has_the_arms_of_the_long_one(loader):
    """Its arms differ in nothing but whose rate they take, and that search tunes it."""
    long, short = (
        loader.load_configuration("config", [f"sweep={name}"], run_mode=RunMode.MULTIRUN)
        for name in ("methods", "methods_short")
    )
    search = loader.load_configuration(
        "config", ["search=method_lr_short"], run_mode=RunMode.MULTIRUN
    )
    assert short.hydra.sweeper.params == long.hydra.sweeper.params
    assert list(short.hydra.sweeper.arms) == list(long.hydra.sweeper.arms)
    for name, words in short.hydra.sweeper.arms.items():
        own = [word for word in words if not word.startswith("sweep.tuned_as=")]
        assert own == list(long.hydra.sweeper.arms[name])
        source = dict(word.split("=", 1) for word in words).get("sweep.tuned_as", name)
        assert source in search.search.arms


# how arms are taken -----------------------------------------------------------------------------
def test_the_command_line_wins_over_an_arm_and_an_arm_over_the_files_axes(loader):
    cells = plugins.expand_arms(
        ["relora.r=1,2", "relora.alpha=1", "train.lr=0.1"],
        arms={"a": ["relora.r=3", "train.lr=0.3"]},
        arguments=["train.lr=0.5"],
        loader=loader,
    )
    assert [dict(t.split("=") for t in cell) for cell in cells] == [
        {"relora.r": "3", "relora.alpha": "1", "train.lr": "0.5", "sweep.arm": "a"}
    ]


def test_all_arms_come_once_before_any_comes_twice(loader):
    arms = {"a": [], "b": ["relora.r=4"], "c": ["relora.r=8,16"]}
    cells = plugins.expand_arms(["seed=0,1"], arms=arms, arguments=[], loader=loader)
    assert len(cells) == 2 + 2 + 4
    assert [cell[-1][-1] for cell in cells[:3]] == ["a", "b", "c"]
    assert ["seed=0" in cell for cell in cells[:2]] == [True, True]


@pytest.mark.parametrize(
    ("params", "arguments", "taken"),
    [
        ([], [], ["a", "b", "c"]),
        (["sweep.arm=a,b"], [], ["a", "b"]),
        (["sweep.arm=a,b"], ["sweep.arm=c"], ["c"]),
        ([], ["sweep.arm=choice(c,a)"], ["c", "a"]),
    ],
)
def test_arms_are_taken_by_name(loader, params, arguments, taken):
    arms = {"a": [], "b": ["relora.r=4"], "c": ["relora.r=8"]}
    cells = plugins.expand_arms(params, arms=arms, arguments=arguments, loader=loader)
    assert [dict(t.split("=") for t in cell)["sweep.arm"] for cell in cells] == taken
    assert [len(cell) for cell in cells] == [1 + len(arms[name]) for name in taken]


def test_an_unknown_arm_names_the_nearest(loader):
    with pytest.raises(ConfigError, match=r"sweep.arm must be one of full_rank, lora, got 'fullr"):
        plugins.expand_arms(
            [],
            arms={"full_rank": [], "lora": []},
            arguments=["sweep.arm=fullrank"],
            loader=loader,
        )


def test_a_sweep_file_without_m_is_refused(loader):
    master = loader.load_configuration("config", ["sweep=audit"], run_mode=RunMode.RUN)
    with pytest.raises(ConfigError, match="add -m"):
        schema.refuse_sweep(master.hydra)
    plain = loader.load_configuration("config", [], run_mode=RunMode.RUN)
    schema.refuse_sweep(plain.hydra)
