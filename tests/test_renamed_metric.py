"""A metric that the recipe in docs/recipes.md renames: whatever shows it has the new name."""

from __future__ import annotations

import shutil

import pytest

from experiments.tracking.store import connect
from tests.recipes import NANO, call, carry_out

NEW = "eval/paloma/pooled_perplexity"


@pytest.mark.slow
def test_a_renamed_metric_is_shown_in_terminal_report_and_mlflow(tmp_path, migrated):
    touched = carry_out("Rename a metric", into=tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in touched] == ["relora_core/evals/paloma.py"]
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(migrated, out / "mlflow.db")
    words = ["run.py", "-m", *NANO, "seed=0,1", "sweep.name=toy", f"output_dir={out}"]
    table = next(line for line in call(tmp_path, *words).splitlines() if "seed=0  finished" in line)
    client = connect(f"sqlite:///{out / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'toy'")
    runs = client.search_runs([experiment.experiment_id], "tags.kind = 'run'")
    values = [run.data.metrics[NEW] for run in sorted(runs, key=lambda r: r.data.params["seed"])]
    assert f"{values[0]:.4g}" in table
    (arm,) = client.search_runs([experiment.experiment_id], "tags.kind = 'arm'")
    mean = (values[0] * values[1]) ** 0.5
    assert arm.data.tags["perplexity"].startswith(f"{mean:.4g}"[:4])
    report = out / "sweeps" / "toy" / "report"
    header, _, row, *_ = (report / "report.md").read_text().partition("**Arms**")[2].split("\n")[2:]
    cell = row.split("|")[header.split("|").index(" perplexity ")]
    assert cell.strip().startswith(f"{mean:.4g}"[:4])
    assert NEW in (report / "tables" / "arms.csv").read_text()
    assert "Paloma perplexity" in (report / "figures" / "arms.svg").read_text()
