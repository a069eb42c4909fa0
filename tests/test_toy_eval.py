"""An eval that the recipe in docs/recipes.md adds: whatever loops over evals has it."""

from __future__ import annotations

import json
import shutil

import pytest

from experiments.tracking.store import connect
from relora_core.data.grammar import REGISTERS, documents
from tests.recipes import NANO, call, carry_out, killed_at, lint, numbers, passes

pytestmark = pytest.mark.slow
METRIC = "eval/lines/nats_per_token"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(scope="module", autouse=True)
def touched(root):
    """The copy, and two files of text for the eval."""
    paths = carry_out("Add an eval", into=root)
    for seed, name in enumerate(("a.txt", "b.txt")):
        lines = [" ".join(text.split()[:8]) for text in documents(REGISTERS[0], 10, seed=seed)]
        (root / name).write_text("\n".join(lines))
    return paths


@pytest.fixture(scope="module")
def out(root, migrated):
    """Of a sweep over two files of text."""
    (root / "out").mkdir()
    shutil.copy(migrated, root / "out" / "mlflow.db")
    axis = f"eval.lines.path={root / 'a.txt'},{root / 'b.txt'}"
    words = ["run.py", "-m", *NANO, "eval=lines", axis, "sweep.name=toy"]
    shown = call(root, *words, f"output_dir={root / 'out'}", figures=False)
    (root / "shown.txt").write_text(shown)
    return root / "out"


def test_the_recipe_touches_four_files(touched, root):
    assert sorted(str(path.relative_to(root)) for path in touched) == [
        "conf/eval/lines.yaml",
        "relora_core/config.py",
        "relora_core/evals/__init__.py",
        "relora_core/evals/lines.py",
    ]
    lint(touched, root)


def test_no_run_without_it_is_renamed(root):
    passes(root, "tests/experiments/test_identity.py")


def test_a_plan_tells_its_data_apart_by_their_digest(root, tmp_path):
    def ids(path: str) -> str:
        words = ["-m", "experiments", "describe", "--json", *NANO, "eval=lines"]
        return json.loads(call(root, *words, f"eval.lines.path={path}"))["run_id"]

    shutil.copy(root / "a.txt", tmp_path / "copy.txt")
    one, other, same = (
        ids(str(p)) for p in (root / "a.txt", root / "b.txt", tmp_path / "copy.txt")
    )
    assert one == same != other


def test_a_bad_text_is_refused_before_anything_is_queued(root, tmp_path):
    (tmp_path / "bad.txt").write_text("words that no grammar has")
    words = [*NANO, "eval=lines", f"eval.lines.path={tmp_path / 'bad.txt'}"]
    with pytest.raises(AssertionError, match=r"eval\.lines\.path must hold words of the grammar"):
        call(root, "run.py", "--plan", *words, f"output_dir={tmp_path / 'out'}")


def test_a_run_that_was_killed_ends_as_an_undisturbed_one(root, tmp_path):
    run = ["run.py", *NANO, "eval=lines", f"eval.lines.path={root / 'a.txt'}", "tracking=none"]
    run += ["eval.lines.every_steps=20"]
    call(root, *run, f"output_dir={tmp_path / 'straight'}")
    killed_at(root, *run, out=tmp_path / "killed", step=35)
    call(root, *run, f"output_dir={tmp_path / 'killed'}")
    straight = numbers(tmp_path / "straight")
    assert [step for step, name in straight if name == METRIC] == [0, 20, 40, 60]
    assert numbers(tmp_path / "killed") == straight


def test_status_report_and_mlflow_have_two_runs_with_its_metric(root, out):
    results = [json.loads(p.read_text()) for p in sorted(out.glob("runs/*/result.json"))]
    values = sorted(result["metrics"][METRIC] for result in results)
    assert len(set(values)) == 2
    status = call(root, "-m", "sweeps", "--output-dir", out, "status", "toy")
    assert status.count("finished") >= 2
    closing = (root / "shown.txt").read_text()
    assert all(f"{value:.4g}" in closing for value in values)
    call(root, "-m", "sweeps", "--output-dir", out, "report", "toy", figures=False)
    report = (out / "sweeps" / "toy" / "report" / "report.md").read_text()
    assert "nats per token of lines" in report
    client = connect(f"sqlite:///{out / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("toy")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.kind = 'run'")
    assert sorted(run.data.metrics[METRIC] for run in runs) == pytest.approx(values)
    inputs = [one.dataset for run in runs for one in run.inputs.dataset_inputs]
    assert len({one.digest for one in inputs if one.name == "lines"}) == 2


def test_checkpoints_are_evaluated_with_it_afterwards(root, out, tmp_path):
    run = ["run.py", *NANO, "eval=none", "tracking=none", f"output_dir={tmp_path}"]
    call(root, *run)
    words = ["eval", "nano-relora", f"eval.lines.path={root / 'b.txt'}", "eval.lines.max_lines=2"]
    shown = call(root, "-m", "sweeps", "--output-dir", tmp_path, *words)
    assert METRIC in shown
