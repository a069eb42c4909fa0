"""Axes on the command line become points, and each point the config that Hydra would compose."""

from __future__ import annotations

import re

import pytest
from hydra.types import HydraContext, RunMode

from experiments import schema, typos
from experiments.identity import run_id
from hydra_plugins.relora_sweeps import plugins
from hydra_plugins.relora_sweeps._axes import expand
from hydra_plugins.relora_sweeps._compose import Composer
from hydra_plugins.relora_sweeps.plugins import GridSweeper, LocalLauncher
from relora_core.config import ConfigError, validate
from sweeps.local.slots import ROOT
from sweeps.planning.plan import make_plan
from tests import warm


@pytest.fixture(scope="module")
def master(loader):
    return loader.load_configuration("config", ["seed=3"], run_mode=RunMode.MULTIRUN)


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("relora.r=4,8", ["4", "8"]),
        ("relora.r=choice(4,8)", ["4", "8"]),
        ("seed=range(0,3)", ["0", "1", "2"]),
        ("model=glob(*)", typos.options("model")),
        ("train.lr=1e-3", ["0.001"]),
        # The points of a range are decimals as they are written; its end is not one of them.
        ("relora.dropout=range(0.1,0.4,0.1)", ["0.1", "0.2", "0.3"]),
        ("relora.dropout=float(range(0,0.4,0.1))", ["0.0", "0.1", "0.2", "0.3"]),
        ("relora.dropout=range(0.3,0,-0.1)", ["0.3", "0.2", "0.1"]),
        ("relora.dropout=tag(a,range(0.7,1.0,0.1))", ["0.7", "0.8", "0.9"]),
        ("train.lr=range(1e-3,4e-3,1e-3)", ["0.001", "0.002", "0.003"]),
        ("train.batch_size=sort(range(2,9,4),reverse=true)", ["6", "2"]),
        ("train.batch_size=sort(range(9,2,-4))", ["5", "9"]),
        ("train.batch_size=sort(shuffle(range(2,9,4)))", ["2", "6"]),
        ("relora.dropout=sort(range(0,1,0.3),reverse=true)", ["0.9", "0.6", "0.3", "0.0"]),
    ],
)
def test_axes_follow_hydras_grammar(loader, axis, values):
    key = axis.split("=")[0]
    assert expand([axis], loader=loader) == [[f"{key}={value}"] for value in values]


def test_the_product_varies_the_last_axis_fastest_and_later_words_win(loader):
    cells = expand(["model=tiny", "seed=0,1", "relora.r=4,8", "model=nano"], loader=loader)
    assert cells[:2] == [
        ["model=nano", "seed=0", "relora.r=4"],
        ["model=nano", "seed=0", "relora.r=8"],
    ]
    assert len(cells) == 4


def test_a_grid_may_have_as_many_points_as_it_lists(loader):
    axes = ["seed=range(400)", "relora.r=range(1,251)"]
    assert len(expand([*axes, "seed=range(2)"], loader=loader)) == 500
    assert len(expand([*axes, *axes[:1], "seed=range(3)"], loader=loader)) == 750


def test_a_shuffled_range_holds_the_same_points(loader):
    cells = expand(["relora.dropout=shuffle(range(0.1,0.4,0.1))"], loader=loader)
    assert sorted(text for [text] in cells) == [f"relora.dropout=0.{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    "words",
    [
        ("relora.dropout=range(0.1,0.4,0.1)", "relora.dropout=0.1,0.2,0.3"),
        ("train.lr=1e-3", "train.lr=0.001", "train.lr=1.0e-03", "train.lr=.001", "train.lr='1e-3'"),
        ("relora.alpha=1", "relora.alpha=1.0", "relora.alpha='1'"),
        ("relora.dropout=0", "relora.dropout=0.0", "relora.dropout=-0.0"),
        ("relora.joint_mask=true", "relora.joint_mask=True", "relora.joint_mask='on'"),
        ("train.batch_size=8", "train.batch_size='8'", "train.batch_size=008"),
        ("train.grad_clip=null", "train.grad_clip=NULL"),
        ("relora.target_modules=[attention]", 'relora.target_modules=[ "attention" ]'),
    ],
)
def test_a_value_has_one_spelling_in_names_and_ids(loader, master, words):
    spelled = []
    for word in words:
        cells = expand([word, "seed=1"], loader=loader)
        plan = make_plan([({}, one) for one in Composer(loader, master).all(cells)])
        spelled.append([(cell.run_id, cell.name) for cell in plan.cells])
    assert all(ids == spelled[0] for ids in spelled)


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("train.steps=8.0", "train.steps must be an integer, got '8.0'; nearest valid: 8"),
        ("train.steps=1e3", "got '1000.0'; nearest valid: 1000"),
        ("train.grad_clip=None", "a number or null, got 'None'; nearest valid: null"),
    ],
)
def test_another_type_is_refused_with_the_right_spelling(loader, master, word, nearest):
    with pytest.raises(ConfigError, match=re.escape(nearest)):
        Composer(loader, master).all([["seed=0"], [word]])


@pytest.mark.parametrize(
    ("launcher", "line"),
    [
        (plugins.SlurmLauncher(gres="x"), "hydra.launcher.gres is not a known key. "
         "+hydra.launcher.extra.gres=... hands any option to sbatch."),
        (plugins.SlurmLauncher(partitoin="x"), "is not a known key. Did you mean 'partition'?"),
        (LocalLauncher(gres="x"), "hydra.launcher.gres is not a known key."),
        (LocalLauncher(max_paralel=2), "Did you mean 'max_parallel'?"),
    ],
)  # fmt: skip
def test_a_key_added_to_a_launcher_is_one_line(launcher, line):
    with pytest.raises(ConfigError, match=re.escape(line)):
        launcher.make()


@pytest.mark.parametrize("axis", ["relora.r=range(5,1)", "model=glob(zz*)", "relora.r=range(4,4)"])
def test_an_empty_axis_is_named(loader, axis):
    with pytest.raises(ConfigError, match=r"^\S+ must have at least one value, got '"):
        expand([axis, "seed=0,1"], loader=loader)


@pytest.mark.parametrize("axis", ["train.lr=interval(0,1)", "seed=range(0,"])
def test_what_is_no_finite_list_is_refused_in_one_line(loader, axis):
    with pytest.raises(ConfigError) as caught:
        expand([axis], loader=loader)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "cell",
    [
        ["model=small", "relora.r=7", "train.lr=0.01"],
        ["method=full_rank", "seed=2"],
        ["experiment=paper", "train.steps=11", "train.precision=fp32"],
        ["relora.target_modules=[attention]"],
        ["relora={r: 3, alpha: 5.0}", "relora.r=5"],
        ["relora.alpha=${relora.r}", "relora.r=6"],
        ["train.grad_clip=null", "eval=none"],
        ["sweep.name='a b'"],
    ],
)
def test_values_on_a_copy_give_the_config_that_hydra_composes(loader, master, cell):
    slow = schema.to_run_config(loader.load_sweep_config(master, cell))
    composer = Composer(loader, master)
    assert composer.all([["model=nano", "seed=1"], cell, cell])[1:] == [slow, slow]


SCALED = ["relora.scale=2"]


@pytest.mark.slow
def test_a_fixed_scale_is_an_alpha_that_follows_the_rank(loader, master):
    """And its runs have the run_ids that those alphas have."""
    ranks, alphas = ["relora.r=8", "relora.r=16"], ["relora.alpha=16", "relora.alpha=32.0"]
    given = [[rank, alpha] for rank, alpha in zip(ranks, alphas, strict=True)]
    for base in (["model=nano"], ["model=nano", "relora=as_coded"], ["relora={dropout: 0.5}"]):
        made = Composer(loader, master).all([[*base, rank, *SCALED] for rank in ranks])
        assert [config.relora.alpha for config in made] == [16.0, 32.0]
        usual = Composer(loader, master).all([[*base, *cell] for cell in given])
        assert list(map(run_id, made)) == list(map(run_id, usual))
    composer = Composer(loader, master)  # and with both given, where they agree
    assert composer.all([[*cell, *SCALED] for cell in given]) == composer.all(
        [[rank, *SCALED] for rank in ranks]
    )
    assert schema.compose(["relora.r=3", "relora.scale=0.1"]).relora.alpha == 0.3
    swept = Composer(loader, master).all([["relora.scale=1", "relora.r=4"], ["relora.scale=0.5"]])
    assert [config.relora.alpha for config in swept] == [4.0, 8.0]
    assert schema.compose(["method=full_rank", *SCALED]).relora.scale == 2


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (
            ["relora.r=8", "relora.alpha=8"],
            "relora.alpha must be 16 with relora.scale=2 and relora.r=8, got 8; leave one of",
        ),
        (["relora.r=16", "relora.alpha=16"], "relora.alpha must be 32 with relora.scale=2"),
        (["relora={r: 4, alpha: 5.0}"], "relora.alpha must be 8 with relora.scale=2"),
        (["relora.scaling=trainable"], "relora.scale must be null with relora.scaling=trainable"),
        (["relora.scaling=rslora"], "relora.scale must be null with relora.scaling=rslora"),
        (["relora={r: 8, alpha: 16.0, scale: 1}"], "relora.alpha must be 8 with relora.scale=1"),
        (["relora.scale=-1"], "relora.scale must be > 0, got -1.0"),
        (["relora.scale=null", "relora.r=0"], "relora.r must be >= 1 with method=relora, got 0"),
    ],
)
def test_a_scale_at_odds_with_another_knob_is_refused(loader, master, cell, expected):
    words = ["model=nano", *SCALED[: "scale" not in str(cell[0]) or "scaling" in cell[0]], *cell]
    for compose in (
        lambda: Composer(loader, master).all([words])[0],
        lambda: schema.compose(words),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(expected)}"):
            validate(compose())


def test_files_are_composed_once_per_choice(loader, master, monkeypatch):
    composer = Composer(loader, master)
    read, load = [], composer._load
    monkeypatch.setattr(composer, "_load", lambda texts: read.append(texts) or load(texts))
    cells = [[f"model={model}", f"seed={seed}"] for seed in (1, 2) for model in ("nano", "tiny")]
    made = composer.all(cells)
    assert [(config.model.name, config.seed) for config in made] == [
        ("nano", 1), ("tiny", 1), ("nano", 2), ("tiny", 2)
    ]  # fmt: skip
    assert read == [["model=nano"], ["model=tiny"]]


def test_configs_of_one_grid_share_no_part(loader, master):
    key = "relora.target_modules"
    cells = [["seed=1"], ["seed=2"], [f"{key}=[attention]"], [f"{key}=[attention]", "seed=2"]]
    made = Composer(loader, master).all(cells)
    for config in made:
        config.relora.target_modules.append("x")
        config.train.steps += 1
    assert [len(config.relora.target_modules) for config in made] == [
        len(config.relora.target_modules) + 1 for config in Composer(loader, master).all(cells)
    ]
    assert len({config.train.steps for config in made}) == 1


@pytest.mark.parametrize(
    "text", ["model=tny", "relora.rr=8", "relora.r=eight", "modle=tiny", "relora.r=[1]"]
)
def test_a_bad_override_is_one_line_that_names_it(loader, master, text):
    with pytest.raises(ConfigError) as caught:
        Composer(loader, master).all([["seed=0"], [text]])
    assert text.split("=")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sweep_hands_over_all_points_at_once_and_its_exit_code(loader, monkeypatch):
    calls = []

    def run_sweep(points, **options):
        calls.append((points, options))
        return 1

    monkeypatch.setattr("sweeps.launch.run_sweep", run_sweep)
    config = loader.load_configuration(
        "config",
        ["relora.r=4,8", "+hydra.sweeper.params.seed='0,1'", "hydra.launcher.max_parallel=3"],
        run_mode=RunMode.MULTIRUN,
    )
    from hydra.core.plugins import Plugins

    sweeper = Plugins.instance().instantiate_sweeper(
        config=config,
        hydra_context=HydraContext(config_loader=loader, callbacks=None),  # type: ignore[arg-type]
        task_function=lambda config: None,
    )
    assert type(sweeper).__name__ == GridSweeper.__name__
    with pytest.raises(SystemExit) as ended:
        sweeper.sweep(["relora.r=4,8"])
    assert ended.value.code == 1
    [(points, options)] = calls
    assert [point for point, _ in points] == [
        {"seed": s, "relora.r": r} for s in "01" for r in "48"
    ]
    assert [(c.seed, c.relora.r) for _, c in points] == [(0, 4), (0, 8), (1, 4), (1, 8)]
    assert options["launcher"].max_parallel == 3
    assert not options["plan_only"]


def test_both_plugins_are_where_hydra_looks_for_them():
    for cls in (GridSweeper, LocalLauncher):
        assert cls.__module__ == plugins.__name__ == "hydra_plugins.relora_sweeps.plugins"


def command(*arguments, cwd):
    """A sweep with its real workers."""
    return warm.run([ROOT / "run.py", "-m", *arguments], cwd=cwd, figures=False)


@pytest.mark.slow
def test_a_real_sweep_from_any_folder_then_again_then_wider(tmp_path):
    words = ["model=nano", "train.steps=4", "train.batch_size=2", "tracking=none", "eval=none"]
    words += [
        "schedule.warmup_steps=1",
        "relora.restart_warmup_steps=1",
        "relora.reset_frequency=2",
    ]
    done = command(*words, "method=full_rank,relora", "relora.r=2,4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 points -> 3 runs: relora.r does not apply to method=full_rank" in done.stdout
    assert "3 finished" in done.stdout
    again = command(*words, "method=full_rank,relora", "relora.r=2,4", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "nothing to run: all 3 runs are done" in again.stdout
    wider = command(*words, "method=full_rank,relora", "relora.r=2,4,8", cwd=tmp_path)
    assert wider.returncode == 0, wider.stderr
    assert wider.stdout.count("\nstart ") == 1
    assert len(list((tmp_path / "outputs" / "runs").glob("*/result.json"))) == 4
