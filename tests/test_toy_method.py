"""A method that the recipe in docs/recipes.md adds: everything that shows methods knows it."""

from __future__ import annotations

import json
import shutil

import pytest

from experiments.tracking.store import connect
from tests.recipes import NANO, call, carry_out, killed_at, lint, numbers, passes

pytestmark = pytest.mark.slow
ARMS = ["method=momentum,full_rank", "momentum.decay=0.5,0.75", "eval=none"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("method")


@pytest.fixture(scope="module", autouse=True)
def touched(root):
    return carry_out("Add a method", into=root)


@pytest.fixture(scope="module")
def out(root, migrated):
    """Of a sweep of the method beside full rank, where its knob says nothing."""
    (root / "out").mkdir()
    shutil.copy(migrated, root / "out" / "mlflow.db")
    words = ["run.py", "-m", *NANO, *ARMS, "sweep.name=toy", f"output_dir={root / 'out'}"]
    call(root, *words, figures=False)
    return root / "out"


def test_the_recipe_touches_four_files(touched, root):
    assert sorted(str(path.relative_to(root)) for path in touched) == [
        "conf/method/momentum.yaml",
        "relora_core/config.py",
        "relora_core/methods/__init__.py",
        "relora_core/methods/momentum.py",
    ]
    lint(touched, root)


def test_no_run_of_another_method_is_renamed(root):
    passes(root, "tests/experiments/test_identity.py")


def test_a_plan_names_and_prices_its_runs(root, tmp_path):
    shown = call(root, "run.py", "--plan", *NANO, *ARMS, f"output_dir={tmp_path}")
    assert "momentum.decay=0.5" in shown
    assert "3 runs" in shown  # full rank is one, whatever the momentum
    prices = {}
    for method in ("momentum", "full_rank"):
        words = ["-m", "experiments", "describe", "--json", *NANO, f"method={method}"]
        prices[method] = json.loads(call(root, *words))
    trainable = prices["momentum"]["parameters"]["trainable"]
    assert prices["momentum"]["memory_bytes"]["moments"] == 4 * trainable
    assert prices["full_rank"]["memory_bytes"]["moments"] == 8 * trainable


def test_a_run_that_was_killed_ends_as_an_undisturbed_one(root, tmp_path):
    run = ["run.py", *NANO, "method=momentum", "eval=none", "tracking=none"]
    call(root, *run, f"output_dir={tmp_path / 'straight'}")
    killed_at(root, *run, out=tmp_path / "killed", step=25)
    call(root, *run, f"output_dir={tmp_path / 'killed'}")
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "straight")


def test_names_status_and_report_have_its_knob(root, out):
    names = sorted(path.name for path in (out / "runs").iterdir())
    assert [name.split("-grammar")[0] for name in names] == [
        "nano-fullrank",
        "nano-momentum-d0.5",
        "nano-momentum-d0.75",
    ]
    status = call(root, "-m", "sweeps", "--output-dir", out, "status", "toy")
    assert status.count("finished") >= 3
    assert "momentum.decay=0.5" in status
    call(root, "-m", "sweeps", "--output-dir", out, "report", "toy", figures=False)
    assert "momentum.decay=0.75" in (out / "sweeps" / "toy" / "report" / "report.md").read_text()


def test_mlflow_shows_its_knob_where_it_applies(out):
    client = connect(f"sqlite:///{out / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("toy")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.kind = 'run'")
    decay = [(run.data.tags["method"], run.data.params.get("momentum.decay")) for run in runs]
    expected = [("full_rank", None), ("momentum", "0.5"), ("momentum", "0.75")]
    assert sorted(decay, key=str) == expected
