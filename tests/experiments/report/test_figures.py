"""Figures of sweeps that are complete, odd, empty or crowded: synthetic data, real files."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas
from matplotlib.text import Text

from experiments import stats
from experiments.colours import OKABE_ITO, STYLES
from experiments.report import comparisons
from experiments.report.data import Arm, Point, RunData, Sweep
from experiments.report.figures import canvas, published
from experiments.report.figures import catalogue as figures
from experiments.report.figures import paper as figures_paper
from experiments.report.figures.canvas import Figure
from experiments.report.figures.curves import Panel, Progress, curve
from relora_core.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    ReLoRAConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

STEPS = 240
STEP = Progress(key="step", label="optimizer step", factor=1.0)
KINDS = ("w_2", "vo")
WHATS = ("weight", "base", "gradient", "update_proxy")
NAMES = {
    "fronts",
    *("learning_curves", "arms", "differences", "blimp_phenomena", "schedules", "restarts"),
    *("weights_rank", "updates_rank", "weights_condition", "updates_condition"),
}
TWINS = {"weights_condition", "updates_rank"}
"""Drawn by the code of `weights_rank` and `updates_condition`."""


def config_of(method: str, *, seed: int, r: int = 4, steps: int = STEPS) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            name="nano", d_model=32, d_ff=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=301
        ),
        data=DataConfig(kind="grammar", seq_len=64),
        method=method,
        seed=seed,
        train=TrainConfig(steps=steps, batch_size=8),
        schedule=ScheduleConfig(warmup_steps=6, min_ratio=0.1),
        relora=ReLoRAConfig(r=r, reset_frequency=60, restart_warmup_steps=3),
    )


def points(values: Mapping[int, float]) -> list[Point]:
    return [Point(step=s, tokens=s * 512, gpu_hours=s / 900, value=v) for s, v in values.items()]


def run_of(
    method: str, *, seed: int, level: float = 0.0, state: str = "finished", steps: int = STEPS
) -> RunData:
    """A run whose curves fall as curves do, `level` above others, with noise of its seed."""
    noise = random.Random(f"{method}{seed}")

    def falling(high: float, low: float, every: int = 20) -> dict[int, float]:
        def at(step: int) -> float:
            return low + (high - low) * math.exp(-step / 80) + level + noise.gauss(0, 0.03)

        return {s: at(s) for s in range(0, steps + 1, every)}

    curves = {
        "train/loss": points(falling(6, 4)),
        "train/lr": points(falling(3e-3, 1e-3)),
        "eval/paloma/perplexity": points({s: math.exp(v) for s, v in falling(6, 4).items()}),
        "eval/blimp/no_bos/accuracy": points({s: 1 - v / 10 for s, v in falling(5, 4).items()}),
    }
    curves["eval/paloma/paper_perplexity"] = curves["eval/paloma/perplexity"]
    for what in WHATS:
        if what == "update_proxy" and method == "full_rank":
            continue
        for kind in KINDS:
            if kind == "vo" and what not in ("weight", "base"):
                continue
            base = f"dynamics/{what}/{kind}"
            curves[f"{base}/per"] = points({s: v / 8 for s, v in falling(6, 4).items()})
            ten = {s: 10**v for s, v in falling(2, 3).items()}
            curves[f"{base}/condition_number"] = points(ten)
    restarts = [s for s in (60, 120, 180) if s < steps] if method == "relora" else []
    if restarts:
        curves["restart/count"] = points({s: i + 1.0 for i, s in enumerate(restarts)})
        curves["restart/loss_before"] = points(dict.fromkeys(restarts, 4.5))
        curves["restart/loss_after"] = points(dict.fromkeys(restarts, 4.6))
        curves["restart/loss_next"] = points({s + 1: 4.55 for s in restarts})
        curves["restart/merged_norm"] = points({s: 5 - s / 60 for s in restarts})
    final = {name: values[-1].value for name, values in curves.items()}
    for index, name in enumerate(("binding", "ellipsis", "island_effects", "npi_licensing")):
        final[f"eval/blimp/no_bos/{name}"] = 0.4 + 0.1 * index + noise.gauss(0, 0.05)
    final["eval/blimp/eos_prefix/accuracy"] = final["eval/blimp/no_bos/accuracy"] - 0.02
    return RunData(
        run_id=f"{method}-{seed}",
        arm_id=method,
        name=f"method={method} seed={seed}",
        seed=seed,
        state=state,
        step=steps,
        config=config_of(method, seed=seed),
        metrics=final if state == "finished" else {},
        curves=curves,
        restarts=restarts,
    )


def arm_of(name: str, runs: Iterable[RunData], *, index: int) -> Arm:
    return Arm(
        arm_id=name,
        name=name,
        colour=OKABE_ITO[index % 8],
        style=STYLES[index // 8],
        runs=list(runs),
    )


def sweep_of(
    seeds: Iterable[int] = (0, 1, 2), *, arms: Iterable[str] = ("full_rank", "relora", "lora")
) -> Sweep:
    seeds = list(seeds)
    made = [
        arm_of(f"method={m}", [run_of(m, seed=s, level=0.1 * i) for s in seeds], index=i)
        for i, m in enumerate(arms)
    ]
    return Sweep(name="s", arms=made)


def catalogue(sweep: Sweep, *, x: str = "tokens", published: Path | None = None) -> Any:
    pairs = comparisons.against(sweep, reference=None) if sweep.arms else []
    return figures.catalogue(sweep, x=x, published=published, pairs=pairs)


def drawn(sweep: Sweep, folder: Path, *names: str, **options: Any) -> dict[str, Figure]:
    """The figures of these names; all of them, if none is given."""
    return {
        name: canvas.produce(name, title=title, draw=draw, folder=folder)
        for name, (title, draw) in catalogue(sweep, **options).items()
        if not names or name in names
    }


def sketched(sweep: Sweep, *names: str, **options: Any) -> dict[str, canvas.Drawing]:
    """The figures of these names, in memory: files take ten times as long."""
    with canvas.style():
        drawings = catalogue(sweep, **options)
        return {name: drawings[name][1]() for name in names}


def write_paper(path: Path) -> Path:
    """A file in the published format; values tell whose they are: 0.1 tiny, 0.2 small."""
    model = {
        "train_loss_digitised": {str(s): 5.0 for s in range(0, 100, 10)},
        "eval": {str(s): {"blimp": 0.55, "paloma_ppl_digitised": 90.0} for s in range(0, 100, 20)},
    }
    ids = ("t-rel", "t-dec", "s-rel", "s-dec")
    value = {"tiny": 0.1, "small": 0.2}
    curves = {
        f"{kind}|{size}|{method}": [[s, value[size]] for s in range(0, 100, 20)]
        for kind in ("swiglu_w2", "ov_circuit", "attn_v", "attn_o")
        for size in ("tiny", "small")
        for method in ("relora", "decoder")
    }
    names = ("per_weights", "cn_weights", "per_updates", "cn_updates")
    content = {
        "models": dict.fromkeys(ids, model),
        "gpu_hours": {i: {"gpu_h": 800.0} for i in ids},
        "learning_dynamics_digitised": dict.fromkeys(names, curves),
    }
    path.write_text(json.dumps(content))
    return path


# what is drawn ----------------------------------------------------------------------------------
@pytest.fixture(scope="module", autouse=True)
def coarse() -> Iterator[None]:
    """PNGs of few pixels: most of the time goes into these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "DPI", 50)
        yield


@pytest.fixture(scope="module")
def complete(coarse: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Figure]:
    return drawn(sweep_of([0, 1]), tmp_path_factory.mktemp("figures"))


@pytest.mark.slow
def test_a_whole_sweep_has_every_figure_as_svg_and_png(complete: dict[str, Figure]) -> None:
    assert set(complete) == NAMES
    for figure in complete.values():
        assert figure.missing is None, figure
        assert figure.svg.read_text().startswith("<?xml")
        assert figure.png.read_bytes().startswith(b"\x89PNG")
        assert figure.caption.endswith(".")
        assert "  " not in figure.caption


def texts(figure: Figure) -> str:
    return "\n".join(re.findall(r"<text[^>]*>(.*?)</text>", figure.svg.read_text(), flags=re.S))


def words(drawing: canvas.Drawing) -> str:
    texts: list[Any] = drawing.canvas.findobj(Text)
    return "\n".join(text.get_text() for text in texts)


@pytest.mark.slow
def test_svg_text_is_text_and_at_least_nine_points(complete: dict[str, Figure]) -> None:
    for figure in complete.values():
        svg = figure.svg.read_text()
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: ?([\d.]+)px", svg)]
        exponents = {6.65, 6.3, 7.0}  # of 10^3 on a tick, 70 % of it
        assert sizes
        assert all(size >= 9 or size in exponents for size in sizes), (figure.name, set(sizes))
    assert "method=relora" in texts(complete["learning_curves"])


def test_an_arm_has_its_colour_in_every_figure_that_shows_it(complete: dict[str, Figure]) -> None:
    for name in NAMES - {"schedules"}:
        svg = complete[name].svg
        assert OKABE_ITO[1] in svg.read_text().lower(), name  # relora's


@pytest.mark.slow
def test_the_same_sweep_gives_the_same_bytes(tmp_path: Path, complete: dict[str, Figure]) -> None:
    for name, figure in drawn(sweep_of([0, 1]), tmp_path, *(NAMES - TWINS)).items():
        for kind in ("svg", "png"):
            files = (getattr(one, kind).read_bytes() for one in (figure, complete[name]))
            assert len(set(files)) == 1, (name, kind)


def test_the_looks_of_other_figures_in_the_process_are_left_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    drawn(sweep_of([0], arms=["full_rank"]), tmp_path, "arms", "schedules")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("x", ["steps", "tokens", "gpu_hours"])
def test_curves_are_against_the_axis_that_was_asked_for(x: str) -> None:
    labels = {"steps": "optimizer steps", "tokens": "tokens (thousands)", "gpu_hours": "device-min"}
    shown = words(sketched(sweep_of([0]), "learning_curves", x=x)["learning_curves"])
    assert [axis for axis, label in labels.items() if label in shown] == [x]


def test_an_unknown_axis_is_one_line_with_the_nearest_choice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got 'token'.* 'tokens'") as error:
        drawn(sweep_of([0]), tmp_path, x="token")
    assert "\n" not in str(error.value)


# means and bands --------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_band_is_the_interval_of_the_statistics(scale: stats.Scale) -> None:
    runs = [run_of("lora", seed=s) for s in range(4)]
    drawn = curve(runs, "train/loss", axis=STEP, scale=scale)
    assert drawn is not None
    for index, step in enumerate(drawn.x):
        values = [p.value for run in runs for p in run.curves["train/loss"] if p.step == step]
        expected = stats.interval(values, scale=scale)
        assert drawn.mean[index] == pytest.approx(expected.mean)
        assert drawn.low[index] == pytest.approx(expected.low)
        assert drawn.high[index] == pytest.approx(expected.high)


def test_a_single_run_has_no_band_and_says_so() -> None:
    drawn = curve([run_of("lora", seed=0)], "train/loss", axis=STEP, scale="linear")
    assert drawn is not None
    assert np.isnan(drawn.low).all()
    caption = sketched(sweep_of([0]), "learning_curves")["learning_curves"].caption
    assert "no band" in caption
    assert "95 %" not in caption


def test_a_mean_is_over_the_same_runs_at_every_step() -> None:
    short, long = run_of("lora", seed=0, steps=120), run_of("lora", seed=1)
    drawn = curve([short, long], "train/loss", axis=STEP, scale="linear")
    assert drawn is not None
    assert drawn.x.max() == 120


def test_steps_with_values_that_are_not_finite_are_left_out_of_the_mean() -> None:
    runs = [run_of("lora", seed=s) for s in range(2)]
    broken = runs[0].curves["train/loss"]
    runs[0].curves["train/loss"] = [
        p._replace(value=math.nan) if p.step in (40, 240) else p for p in broken
    ]
    drawn = curve(runs, "train/loss", axis=STEP, scale="linear")
    assert drawn is not None
    assert set(drawn.x) == {s for s in range(0, 241, 20) if s not in (40, 240)}
    assert np.isfinite(drawn.mean).all()


def test_a_wide_band_does_not_set_the_scale() -> None:
    with canvas.style():
        panel = Panel(ax=canvas.Canvas().add_subplot(), axis=STEP)
        panel.lines, panel.bands, panel.end = [4.0, 6.0], [-500.0, 700.0], 60.0
        panel.finish(ylabel="")
        low, high = panel.ax.get_ylim()
    assert 1 < low < 4
    assert 6 < high < 9


def test_runs_that_did_not_finish_are_drawn_and_counted() -> None:
    sweep = sweep_of([0, 1])
    sweep.arms[1].runs.append(run_of("relora", seed=2, state="diverged", steps=100))
    sweep.arms[1].runs.append(run_of("relora", seed=3, state="running", steps=100))
    sweep.arms[0].runs = sweep.arms[0].runs[:1]  # a thin line, not a mean of few
    drawings = sketched(sweep, "learning_curves", "arms")
    assert "the 2 runs that have not finished" in drawings["learning_curves"].caption
    assert "(2 seeds)" in drawings["learning_curves"].caption
    assert "n = 2 of 4: 1 diverged, 1" in words(drawings["arms"])


# what cannot be drawn ---------------------------------------------------------------------------
def empty(sweep: Sweep) -> None:
    sweep.arms.clear()


def planned(sweep: Sweep) -> None:
    for run in sweep.runs:
        run.state, run.curves, run.metrics, run.restarts = "planned", {}, {}, []


def fill(sweep: Sweep, *, curves: float | None = None, metrics: float | None = None) -> None:
    """Give every point and every final metric this value."""
    for run in sweep.runs:
        if metrics is not None:
            run.metrics = dict.fromkeys(run.metrics, metrics)
        if curves is not None:
            run.curves = {
                name: [p._replace(value=curves) for p in line] for name, line in run.curves.items()
            }


def one_point(sweep: Sweep) -> None:
    for run in sweep.runs:
        run.curves = {name: line[:1] for name, line in run.curves.items()}


def no_common_seeds(sweep: Sweep) -> None:
    for index, run in enumerate(sweep.runs):
        run.seed = index


def empty_curves(sweep: Sweep) -> None:
    for run in sweep.runs:
        run.curves = {name: [] for name in run.curves}


def mixed(sweep: Sweep) -> None:
    for run in sweep.arms[0].runs:
        run.metrics, run.curves = {"only/mine": 1.0}, {}


ODD: dict[str, Callable[[Sweep], None]] = {
    "nan": partial(fill, curves=math.nan, metrics=math.nan),
    "infinite": partial(fill, metrics=math.inf),
    "constant": partial(fill, curves=0.5, metrics=0.5),
    "zero": partial(fill, curves=0.0),
    "huge": partial(fill, curves=1e300, metrics=1e300),
} | {f.__name__: f for f in (empty, planned, one_point, no_common_seeds, empty_curves, mixed)}


@pytest.mark.slow
@pytest.mark.parametrize("damage", ODD)
def test_an_odd_sweep_has_a_figure_or_a_reason_never_a_crash(damage: str) -> None:
    sweep = sweep_of([0, 1], arms=("full_rank", "relora"))
    ODD[damage](sweep)
    reasons = []
    with canvas.style():
        for name, (_, draw) in catalogue(sweep).items():
            try:
                if name not in TWINS:
                    draw().canvas.draw_without_rendering()  # laid out, too, as for a file
            except canvas.NoData as reason:
                reasons.append(str(reason))
    assert all(reason and "\n" not in reason for reason in reasons)


def test_a_figure_whose_data_went_away_leaves_no_file(tmp_path: Path) -> None:
    sweep = sweep_of([0], arms=["relora"])
    assert (tmp_path / "restarts.svg").exists() is False
    drawn(sweep, tmp_path, "restarts")
    assert (tmp_path / "restarts.svg").exists()
    planned(sweep)
    assert drawn(sweep, tmp_path, "restarts")["restarts"].missing == "no run has restarted"
    assert not (tmp_path / "restarts.svg").exists()
    assert not (tmp_path / "restarts.png").exists()


def test_a_figure_that_the_arms_no_longer_have_leaves_no_file(tmp_path: Path) -> None:
    for name in ("fronts.svg", "fronts_column.pdf", "response_relora_r.png", "mine.svg"):
        (tmp_path / name).touch()
    planned(sweep := sweep_of([0], arms=["relora"]))
    figures.all_figures(sweep, tmp_path, x="tokens", published=None, pairs=[])
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {"mine", "schedules"}  # schedules follow from settings


def test_an_overflow_is_in_no_mean_and_has_no_tick() -> None:
    sweep = sweep_of()
    sweep.runs[0].metrics["eval/paloma/perplexity"] = 1e200
    (panel,) = (
        ax
        for ax in sketched(sweep, "arms")["arms"].canvas.axes
        if ax.get_xlabel().startswith("Paloma perplexity")
    )
    ticks = [line for line in panel.lines if line.get_marker() == "|"]
    assert [len(np.asarray(line.get_xdata())) for line in ticks] == [2, 3, 3]


def test_arms_too_many_to_draw_are_said() -> None:
    arms = [
        arm_of(f"model=tiny relora.name=as_executed relora.r={i} more.key=17", [run], index=i % 32)
        for i in range(40)
        for run in [run_of("relora", seed=0)]
    ]
    sweep = Sweep(name="s", arms=arms)
    caption = sketched(sweep, "learning_curves")["learning_curves"].caption
    assert "16 others are in the tables" in caption
    with pytest.raises(canvas.NoData, match="40 arms are too many"):
        sketched(sweep, "blimp_phenomena")


# the paper's figures ----------------------------------------------------------------------------
SHARE = 4 / 32
"""Of rank 4 in w_2, 64 x 32; restarts at 60, 120, 180."""


@pytest.mark.parametrize(
    ("method", "knobs", "what", "caps"),
    [
        ("relora", {}, "update_proxy", [1, 1, 1, 1, 1]),
        ("relora", {}, "update_restart", [1, 1, 1, 1, 1]),
        ("relora", {}, "update_total", []),
        ("relora", {}, "gradient", []),
        ("full_rank", {}, "update_restart", []),
        ("lora", {}, "update_restart", [1, 1, 1, 1, 1]),
        # At 60 one of two adapters of the kind is drawn anew; the other goes from B_0 A_0 to B A.
        ("relora", {"restart_groups": 2}, "update_proxy", [1, 1, 1, 1, 1]),
        ("relora", {"restart_groups": 2}, "update_restart", [1, 1, 1.5, 1.5, 1.5]),
        ("relora", {"rank_schedule": [[120, 2]]}, "update_proxy", [1, 1, 1, 0.5, 0.5]),
        ("relora", {"rank_schedule": [[120, 2]]}, "update_restart", [1, 1, 1, 0.5, 0.5]),
        ("relora", {"adaptive_rank_energy": 0.9}, "update_restart", [1, 1, 1, 1, 1]),
        # Any rank (8 times 4 of 32) while the base is trained, and until the next reference.
        ("relora", {"warm_start_steps": 10}, "update_restart", [8, 8, 1, 1, 1]),
        ("relora", {"warm_start_steps": 60}, "update_restart", [8, 8, 1, 1, 1]),
        ("relora", {"warm_start_steps": 10}, "update_proxy", [1, 1, 1, 1, 1]),
        (
            "relora",
            {"full_rank_steps": 10, "low_rank_steps": 110},
            "update_restart",
            [8, 8, 1, 8, 8],
        ),
        # One of two layers has no adapter: no product BA, and an update of any rank.
        ("relora", {"full_rank_modules": ["layers.1"]}, "update_proxy", [1, 1, 1, 1, 1]),
        ("relora", {"full_rank_modules": ["layers.1"]}, "update_restart", [4.5] * 5),
        ("relora", {"full_rank_modules": ["w_2"]}, "update_proxy", []),
    ],
)  # fmt: skip
def test_the_cap_of_a_low_rank_update_follows_the_settings(
    method: str, knobs: dict[str, object], what: str, caps: list[float]
) -> None:
    config = config_of(method, seed=0)
    for key, value in knobs.items():
        setattr(config.relora, key, value)
    largest = figures_paper.largest_per(config, what=what, kind="w_2", steps=[30, 60, 90, 130, 170])
    assert largest == pytest.approx([SHARE * cap for cap in caps])


def test_caps_are_a_level_where_they_are_one_and_else_a_line() -> None:

    def lines(**knobs: object) -> list[Any]:
        run = run_of("relora", seed=0)
        for key, value in knobs.items():
            setattr(run.config.relora, key, value)
        run.curves["dynamics/update_restart/w_2/per"] = points({30: 0.1, 60: 0.1, 90: 0.1})
        panel = Panel(ax=Canvas().add_subplot(), axis=STEP)
        arm = arm_of("a", [run], index=0)
        assert figures_paper._caps(panel, [arm], what="update_restart", kind="w_2")
        return [list(line.get_ydata()) for line in panel.ax.lines]

    assert lines() == [[SHARE, SHARE]]
    assert lines(restart_groups=2) == [[SHARE, SHARE, 1.5 * SHARE]]
    (line,) = lines(warm_start_steps=10)
    assert line[2] == SHARE
    assert all(math.isnan(cap) for cap in line[:2])


@pytest.mark.parametrize("steps", [240, 20_000, 200_000])
def test_a_schedule_shows_every_restart_however_many_steps(steps: int) -> None:
    config = config_of("relora", seed=0, steps=steps)
    config.relora.reset_frequency = steps // 4
    at, rates = figures_paper._rates(config)
    assert len(at) <= figures_paper.FINEST * 2 + 100
    assert at[0] == 0
    assert at[-1] == steps - 1
    zeros = {int(step) for step, rate in zip(at, rates, strict=True) if rate == 0.0}
    assert zeros == {0, steps // 4, steps // 2, steps * 3 // 4}


def test_arms_of_one_schedule_share_a_panel(complete: dict[str, Figure]) -> None:
    assert "method=full_rank, method=lora" in texts(complete["schedules"])


def test_what_a_restart_changed_is_after_minus_before() -> None:
    changes = dict(figures_paper._changes(run_of("relora", seed=0)))
    assert [p.step for p in changes["loss after - before"]] == [60, 120, 180]
    assert [p.value for p in changes["loss after - before"]] == pytest.approx([0.1] * 3)
    assert [p.step for p in changes["loss next - before"]] == [60, 120, 180]
    assert [p.value for p in changes["loss next - before"]] == pytest.approx([0.05] * 3)


# published curves -------------------------------------------------------------------------------
def test_published_curves_are_labelled_and_the_swap_is_told(tmp_path: Path) -> None:
    paper = write_paper(tmp_path / "paper.json")
    names = "learning_curves", "weights_rank", "weights_condition", "updates_rank"
    names = *names, "updates_condition"
    drawings = sketched(sweep_of([0]), *names, x="steps", published=paper)
    label = "published (Weiss et al. 2025): ReLoRA tiny"
    for name in ("learning_curves", "weights_rank", "updates_condition"):
        assert label in words(drawings[name]), name
    assert "exchanged" in drawings["weights_rank"].caption
    assert "exchanged" in drawings["weights_condition"].caption
    assert "exchanged" not in drawings["updates_rank"].caption
    assert "BA formed in bf16" in drawings["updates_condition"].caption
    assert "BA formed in bf16" not in drawings["updates_rank"].caption
    alone = sketched(sweep_of([0]), "learning_curves", x="steps")
    assert label not in words(alone["learning_curves"])


def test_decoder_curves_of_weights_change_labels_and_no_others(tmp_path: Path) -> None:
    paper = published.load(write_paper(tmp_path / "paper.json"), models={"tiny"})

    def values(group: str, what: str) -> dict[str, float]:
        curves = paper._dynamics(group, what, "w_2", "per")
        return {series.method: series.points[0][1] for series in curves}

    assert values("weights", "base") == {"relora": 0.1, "decoder": 0.2}
    assert values("updates", "gradient") == {"decoder": 0.1}
    assert values("updates", "update_proxy") == {"relora": 0.1}


def test_published_curves_beyond_our_runs_are_said_to_be_absent(tmp_path: Path) -> None:
    paper = write_paper(tmp_path / "paper.json")
    drawings = sketched(sweep_of([0]), "learning_curves", x="tokens", published=paper)
    assert "No published curve" in drawings["learning_curves"].caption
    assert "published (Weiss" not in words(drawings["learning_curves"])


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"models": {}, "gpu_hours": {}}'])
def test_a_bad_file_of_published_curves_is_one_line(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "paper.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="published must") as error:
        drawn(sweep_of([0]), tmp_path, published=path)
    assert "\n" not in str(error.value)
    assert "paper.json" in str(error.value)
