"""What is known of the data and matters to the user is said, and stands in the record."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from experiments import environment, scheduler, schema
from experiments.__main__ import describe, show
from experiments.disk.output_dir import plan_folder, runs_folder, study_folder
from experiments.disk.run_dir import RunDir
from experiments.identity import run_id
from experiments.labels import typed
from experiments.notices import fixed_order, replaced, scales, without_effect
from experiments.report import data, document, gather, tables
from experiments.report import page as report
from experiments.report.page import _notes
from experiments.run.complete import complete, complete_all
from experiments.run.runner import run_experiment
from experiments.run.single import run_here
from relora_core.config import ConfigError, RunConfig
from sweeps.__main__ import main
from sweeps.launch import run_sweep
from sweeps.local.launcher import LocalLauncher
from sweeps.planning.budget import Place
from sweeps.planning.plan import Plan, load, make_plan
from sweeps.search import process
from sweeps.search.config import normalise
from sweeps.search.launch import Draft, run_search
from sweeps.search.space import Float, with_values
from sweeps.search.study import Study
from sweeps.slurm.options import SlurmOptions, check_cell
from tests.conftest import nano_config

CUT = "each stored row of 17 ids gives 3 sequences of data.seq_len=5; its last 1 ids are not used"


@pytest.fixture
def cut(tmp_path: Path) -> RunConfig:
    """10 stored rows of 17 ids, of which 5 + 5 + 5 + 1 are read, and 24 sequences asked for."""
    rows = np.random.default_rng(0).integers(0, 97, (10, 17)).tolist()
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "rows" / "train-0.parquet")
    data = {"kind": "pretokenized", "path": str(tmp_path / "rows"), "seq_len": 5, "vocab_size": 97}
    config = nano_config(data=data, output_dir=str(tmp_path / "out"))
    config.train.steps = 9
    config.checkpoint.every_steps = 9
    config.eval.blimp.enabled = config.eval.paloma.enabled = False
    return config


def test_a_single_run_says_it_once_and_its_record_keeps_it(
    cut: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(cut) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    many = "36 sequences are trained on: 1.2 passes over the 30 sequences of data.path="
    assert said == [f"note: data: {CUT}", f"note: data: {many}{cut.data.path}"]
    (path,) = runs_folder(cut.output_dir).iterdir()
    assert show(RunDir(path))["notes"] == [CUT]
    run = data.RunData(run_id="", arm_id="", name="", seed=0, config=cut)
    gather._read_record(run, RunDir(path))
    assert run.notes == [CUT]


def test_describe_says_it(cut: RunConfig) -> None:
    assert f"data: {CUT}" in describe(cut, at_steps=[])["notes"]


def test_what_the_user_set_in_vain_is_said_of_one_run_and_of_a_plan(
    cut: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever types relora.r=8 for GaLore means galore.r, and gets the default of that."""
    vain = "relora.r does not apply to method=galore"
    galore = with_values(cut, {"method": "galore", "relora.r": 2, "galore.r": 2})
    assert run_here(galore, given={"relora.r": "2", "galore.r": "2", "method": "galore"}) == 0
    assert f"note: {vain}\n" in capsys.readouterr().err
    assert vain in describe(galore, at_steps=[], given={"relora.r": "2"})["notes"]
    fixed = {"method": "galore", "relora.r": 2, "galore.r": 2}
    assert planned(cut, fixed | {"seed": 1}, fixed | {"seed": 2})[-1] == vain
    assert vain not in planned(cut, fixed, fixed | {"method": "lora"})


def test_a_setting_is_in_vain_beside_another_one_or_where_its_eval_is_off() -> None:
    config = nano_config()
    config.schedule.name, config.schedule.min_ratio = "linear", 0.1
    config.relora.prune_ratio, config.relora.optimizer_state = 0.5, "zero"
    config.eval.paloma.enabled = False
    given = ["schedule.min_ratio", "relora.prune_ratio", "eval.paloma.max_documents"]
    assert list(without_effect([*given, "train.lr", "eval.paloma.enabled"], [config])) == [
        "relora.prune_ratio does not apply with relora.optimizer_state=zero",
        "schedule.min_ratio does not apply with schedule.name=linear",
        "eval.paloma.max_documents does not apply with eval.paloma.enabled=false",
    ]
    other = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule))
    other.schedule.name = "cosine"
    assert list(without_effect(["schedule.min_ratio"], [config, other])) == []


def test_an_option_of_which_an_experiment_replaces_a_value_is_named() -> None:
    """APOLLO-Mini's scale of 128 is for one vector; galore_60m has 128 of them, for APOLLO."""
    words = ["experiment=galore_60m", "method=apollo_mini"]
    said = "method=apollo_mini has apollo.r=128 by experiment=galore_60m: apollo.r=1 is its own"
    assert list(replaced(typed(words), schema.compose(words))) == [said]
    words.append("apollo.r=128")
    assert list(replaced(typed(words), schema.compose(words))) == []
    words = ["experiment=lialin_60m", "relora=as_executed", "relora.scale=2"]
    assert list(replaced(typed(words), schema.compose(words))) == [
        "relora=as_executed has relora.prune_ratio=0.9 by experiment=lialin_60m: "
        "relora.prune_ratio=0.999 is its own"
    ]
    words = ["experiment=demo", "relora=as_executed"]  # whose dropout is that of all four
    assert list(replaced(typed(words), schema.compose(words))) == []


def test_a_plan_says_what_an_experiment_replaces(cut: RunConfig) -> None:
    cut.experiment, cut.method = "galore_60m", "apollo"
    cut.apollo.r, cut.apollo.scaling, cut.apollo.scale = 2, "tensor", 128.0
    points = [
        ({"method": "apollo_mini", "seed": str(k)}, dataclasses.replace(cut, seed=k))
        for k in (1, 2)
    ]
    out = io.StringIO()
    run_sweep(points, launcher=Idle(), console=Console(file=out, width=200))
    said = "method=apollo_mini has apollo.r=2 by experiment=galore_60m: apollo.r=1 is its own"
    assert out.getvalue().count(said) == 1


def test_a_search_says_so_too_and_the_plan_of_its_trials_keeps_it(
    cut: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeps.search.launch.start_processes", lambda *_, **__: 130)
    monkeypatch.setattr("sweeps.search.launch.close", lambda *_: 0)
    cut.experiment, cut.method = "galore_60m", "apollo"
    cut.apollo.r, cut.apollo.scaling, cut.apollo.scale = 2, "tensor", 128.0
    draft = Draft(
        search=normalise({"objectives": "train/loss", "sampler": "random"}),
        space={"train.lr": Float(low=1e-4, high=1e-1, log=True)},
        bases=[({}, cut)],
        follows=[{}],
        given={"method": "apollo_mini"},
    )
    out = io.StringIO()
    run_search([draft], name="s", launcher=Idle(), console=Console(file=out, width=200))
    said = "method=apollo_mini has apollo.r=2 by experiment=galore_60m: apollo.r=1 is its own"
    assert out.getvalue().count(said) == 1
    trial = Study.open(study_folder(cut.output_dir, name="s")).take(process.this_process())
    assert trial is not None
    process.prepare(trial)
    assert load(plan_folder(cut.output_dir, name="s") / "plan.json").notes.count(said) == 1


def test_data_that_no_run_would_read_are_refused(cut: RunConfig) -> None:
    """Of `run.py data.path=TEXTS` without data=text nothing would be read, and all learn."""
    own = dataclasses.replace(cut, data=dataclasses.replace(cut.data, kind="grammar"))
    own.model = dataclasses.replace(own.model, vocab_size=None)
    line = r"^data\.path must be left out with data=grammar, .* nearest valid: data=text or data=p"
    with pytest.raises(ConfigError, match=line):
        complete(own)
    assert len(complete_all([own, cut])) == 2  # an axis over both


def test_describe_says_what_cannot_learn(cut: RunConfig) -> None:
    cut.relora.init_a, cut.relora.reset_frequency = "zero", 10
    assert any("14 of 14 adapters learn nothing" in n for n in describe(cut, at_steps=[])["notes"])


def test_a_plan_says_it_once_for_all_its_runs(cut: RunConfig) -> None:
    out = io.StringIO()
    points = [({"seed": str(k)}, dataclasses.replace(cut, seed=k)) for k in (0, 1)]
    assert (
        run_sweep(
            points,
            launcher=LocalLauncher(),
            plan_only=True,
            console=Console(file=out, width=100),
        )
        == 0
    )
    assert out.getvalue().count(f"note: data: {CUT}\n") == 1


def test_a_report_says_it() -> None:
    run = SimpleNamespace(notes=[CUT], config=nano_config(), changed=[])
    sweep = SimpleNamespace(runs=[run, run], notes=[f"data: {CUT}", "x"])
    assert _notes(sweep) == [document.Bullets([f"Data: {CUT}.", "X."])]  # type: ignore[arg-type]


# what planning knows of many runs ---------------------------------------------------------------
SCALES = (
    "relora.r varies at relora.alpha=8, and with it the scale alpha / r (4 at r=2, 2 at r=4): "
    "relora.scale=4 keeps it the same"
)
ORDER = (
    "seeds do not change the order of the data (data=pretokenized): intervals over them speak of "
    "weights, dropout and restarts alone"
)
NO_RESTART = (
    "no restart within train.steps=9: the first would be at step 10 (relora.reset_frequency=10), "
    "so method=relora does what method=lora does"
)
PASSES = "data: 36 sequences are trained on: 1.2 passes over the 30 sequences of data.path="


class Idle(LocalLauncher):
    """Plans, stores, and runs nothing."""

    def launch(self, plan: Plan, *, output_dir: Path, console: Console) -> int:
        return 130


def planned(cut: RunConfig, *axes: dict[str, Any]) -> list[str]:
    """The notes that a sweep of these points prints; it is stored and nothing is run."""
    out = io.StringIO()
    points = [({k: str(v) for k, v in one.items()}, with_values(cut, one)) for one in axes]
    run_sweep(points, launcher=Idle(), console=Console(file=out, width=100))
    lines = out.getvalue().splitlines()
    return [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]


def test_plan_status_and_report_say_what_is_known(
    cut: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    cut.relora.reset_frequency = 10
    grid = [{"relora.r": r, "seed": k} for r in (2, 4) for k in (0, 1)]
    known = [f"data: {CUT}", f"{PASSES}{cut.data.path}", NO_RESTART, SCALES, ORDER]
    assert planned(cut, *grid) == known
    for words in (["status"], ["status", "relora.r-seed"], ["plan", "relora.r-seed"]):
        assert main(["--output-dir", cut.output_dir, *words]) == 0
        said = capsys.readouterr().out.splitlines()
        assert [line for line in said if line.startswith("note: ")] == [f"note: {n}" for n in known]
    page = report.write(cut.output_dir, "relora.r-seed").with_suffix(".md").read_text()
    for line in known:
        assert page.count(f"{line[:1].upper()}{line[1:]}.") == 1


def test_the_order_of_the_data_is_said_beside_the_intervals(cut: RunConfig) -> None:
    assert planned(cut, {"seed": 0}, {"seed": 1})[-1] == ORDER
    found = gather.gather(cut.output_dir, "seed")
    for run in found.runs:
        run.state, run.metrics = "finished", {"train/loss": 1.0 + run.seed}
    (table,) = (b for b in tables.results(found) if isinstance(b, document.Table))
    assert f"{ORDER[0].upper()}{ORDER[1:]}." in table.note
    text = {"kind": "text", "path": "x", "tokenizer": "y"}
    two = [nano_config(data=text, seed=k) for k in (0, 1)]
    assert fixed_order(two)[0].startswith(
        "seeds do not change the order of the data (data=text, data.shuffle_rows=false)"
    )
    for config in two:
        config.data.shuffle_rows = True
    assert fixed_order(two) == fixed_order(two[:1]) == []
    assert fixed_order([nano_config(seed=k) for k in (0, 1)]) == []  # the grammar's follows it


def test_what_is_said_of_runs_side_by_side_is_said_of_a_wider_grid_once(cut: RunConfig) -> None:
    planned(cut, {"relora.r": 2}, {"relora.r": 4})
    planned(cut, {"relora.r": 2}, {"relora.r": 8})
    stored = load(plan_folder(cut.output_dir, name="relora.r") / "plan.json").notes
    (line,) = [note for note in stored if note.startswith("relora.r varies")]
    assert "(4 at r=2, 2 at r=4, 1 at r=8)" in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([{"r": 2}, {"r": 4}], 1),
        ([{"r": 2}, {"r": 4}, {"r": 2, "alpha": 5.0}], 1),
        ([{"r": 2, "alpha": 4.0}, {"r": 4, "alpha": 8.0}], 0),  # the same scale
        ([{"r": 2, "scaling": "rslora"}, {"r": 4, "scaling": "rslora"}], 0),  # its very point
        ([{"r": 2, "scaling": "trainable"}, {"r": 4, "scaling": "trainable"}], 0),
    ],
)
def test_ranks_at_one_alpha_are_said_where_the_scale_follows(changes: Any, said: int) -> None:
    assert len(scales([nano_config(relora=change) for change in changes])) == said
    assert scales([nano_config(relora=c, method="full_rank") for c in changes]) == []


# joining an older sweep -------------------------------------------------------------------------
def joins(notes: list[str]) -> str:
    return next((note for note in notes if "sweep.name=NAME" in note), "")


def test_a_sweep_that_would_join_one_of_other_fixed_settings_says_so(cut: RunConfig) -> None:
    axis = {"relora.r": 2}, {"relora.r": 4}
    assert not joins(planned(cut, *axis))
    assert not joins(planned(cut, *axis))  # the same again
    assert not joins(planned(cut, {"relora.r": 2}, {"relora.r": 8}))  # a wider grid
    assert not joins(planned(cut, {"relora.r": 1}, {"relora.r": 3}))  # of other scales alpha / r
    assert not joins(planned(cut, *({**one, "seed": 1} for one in axis)))  # another seed
    longer = [{**one, "train.steps": 12} for one in axis]
    assert joins(planned(cut, *longer)) == (
        "sweep relora.r has runs of earlier commands with train.steps=9 (now 12), and these join "
        "them: sweep.name=NAME keeps them apart"
    )
    assert not joins(planned(cut, *longer))  # they are there by now
    assert "relora.dropout=0 (now 0.1), train.lr=0.01 (now 0.02)" in joins(
        planned(cut, *({**one, "relora.dropout": 0.1, "train.lr": 0.02} for one in axis))
    )
    named = [{**one, "train.steps": 5, "sweep.name": "relora.r"} for one in axis]
    assert not joins(planned(cut, *named))  # on purpose


def test_what_follows_from_an_axis_is_no_fixed_setting(cut: RunConfig) -> None:
    one = with_values(cut, {"model.d_model": 64, "model.name": "a"})
    two = with_values(cut, {"model.d_model": 48, "model.name": "b"})
    three = with_values(cut, {"model.d_model": 16, "model.name": "c", "relora.r": 2})
    for configs in ((cut, one), (two, three)):
        out = io.StringIO()
        points = [({"model": c.model.name}, c) for c in configs]
        run_sweep(points, launcher=Idle(), console=Console(file=out, width=100))
    assert "relora.r=4 (now" not in out.getvalue()  # 2 and 4 are there
    assert "sweep.name=NAME" not in out.getvalue()


# a GPU asked for --------------------------------------------------------------------------------
@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)


CUDA = "runtime.device must be auto or cpu here (no GPU found), got 'cuda'"
RESOURCES = "runtime.device must be cpu here (no GPU found), got 'auto' with resources."


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"runtime.device": "cuda"}, CUDA),
        (
            {"runtime.device": "auto", "train.precision": "tf32"},
            "train.precision must be fp32 or bf16 here (no GPU found), got 'tf32'",
        ),
        (
            {"runtime.device": "auto", "runtime.head": "cce", "train.precision": "bf16"},
            "runtime.head must be chunked here (no GPU found), got 'cce'",
        ),
        (
            {"runtime.device": "auto", "resources.gpus_per_node": 1},
            f"{RESOURCES}gpus_per_node=1",
        ),
    ],
)
def test_a_gpu_asked_for_and_not_there_is_one_line_before_anything_is_written(
    cut: RunConfig,
    no_gpu: None,
    changes: dict[str, Any],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = with_values(cut, changes)
    for go in (
        lambda: run_here(config),
        lambda: run_sweep([({}, config)], launcher=LocalLauncher(), plan_only=True),
        lambda: run_sweep([({}, config)], launcher=LocalLauncher()),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(line)}$"):
            go()
    if config.runtime.device == "cuda":  # an Apple GPU is another
        monkeypatch.setattr("sys.platform", "darwin")
        with pytest.raises(ConfigError, match=f"^{re.escape(line)}$"):
            LocalLauncher().check(make_plan([({}, config)]), estimates={})
    assert not Path(cut.output_dir).exists()
    on_cpu = {"runtime.device": "cpu", "train.precision": "fp32", "runtime.head": "chunked"}
    assert environment.gpu_asked(with_values(config, on_cpu)) is None


def test_a_job_that_asked_for_a_gpu_and_finds_none_fails_in_one_line(
    cut: RunConfig, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = complete(with_values(cut, {"runtime.device": "auto"}))
    run = RunDir(runs_folder(cut.output_dir) / run_id(config))
    monkeypatch.setattr(scheduler, "_job", "a.b/12")
    monkeypatch.setenv(scheduler.GPUS, "2")
    line = "runtime.device must be cpu here (no GPU found), got 'auto' with a job of 2 GPUs on each"
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}"):
        run_experiment(config, run)
    assert (run.status().state, run.newest_step()) == ("failed", 0)
    assert (run.status().error or "").startswith(line)
    monkeypatch.setattr(scheduler, "_job", None)  # a stray variable of the shell asks for nothing
    assert environment.gpu_asked(config) is None


def test_a_job_without_gpus_cannot_have_a_run_on_one(cut: RunConfig) -> None:
    on_gpu = with_values(cut, {"runtime.device": "cuda"})
    with pytest.raises(ConfigError, match=r"^hydra.launcher.gpus_per_node must be >= 1 with "):
        check_cell(on_gpu, SlurmOptions(gpus_per_node=0))
    check_cell(on_gpu, SlurmOptions(gpus_per_node=1))
    rounded = with_values(cut, {"runtime.device": "auto", "train.precision": "tf32"})
    with pytest.raises(
        ConfigError, match=r"must be >= 1 with train.precision=tf32, got 0; nea.*1$"
    ):
        check_cell(rounded, SlurmOptions(gpus_per_node=0))
    check_cell(with_values(cut, {"runtime.device": "auto"}), SlurmOptions(gpus_per_node=0))


def test_a_job_whose_gpus_nobody_uses_is_said(cut: RunConfig) -> None:
    class Cluster(Idle):
        def place(self, config: RunConfig) -> Place:
            return Place(gpus=1)

    out = io.StringIO()
    run_sweep([({}, cut)], launcher=Cluster(), plan_only=True, console=Console(file=out, width=99))
    assert "jobs hold GPUs that runtime.device=cpu leaves idle" in out.getvalue()
