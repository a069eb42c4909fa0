"""The metrics that are shown: each is named in one place, and every eval has some."""

from pathlib import Path

import pytest

from experiments import metrics
from relora_core.evals import REGISTRY

ROOT = Path(__file__).resolve().parents[2]
OF_EVALS = [metric.key for metric in metrics.headline() if metric is not metrics.LOSS]


@pytest.mark.parametrize("key", OF_EVALS)
def test_a_metric_of_an_eval_is_named_in_its_file_alone(key):
    files = [file for top in ("experiments", "sweeps") for file in (ROOT / top).rglob("*.py")]
    assert [str(file) for file in files if f'"{key}"' in file.read_text()] == []


@pytest.mark.parametrize("name", REGISTRY)
def test_the_metrics_of_an_eval_begin_with_its_name(name):
    assert REGISTRY[name].headline
    assert all(m.key.startswith(f"eval/{name}/") for m in REGISTRY[name].headline)


def test_headings_are_told_apart():
    shown = metrics.headline()
    assert len({metric.title for metric in shown}) == len(shown)
    assert list(metrics.columns()) == ["loss", "perplexity", "BLiMP"]


@pytest.mark.parametrize(
    ("key", "up"),
    [
        ("train/loss", False),
        ("eval/paloma/macro_perplexity", False),
        ("eval/blimp/no_bos/binding", True),
        ("test/blimp/eos_prefix/accuracy", True),
        ("accuracy", True),
    ],
)
def test_whether_more_is_better_follows_from_the_eval(key, up):
    assert metrics.goes_up(key) == up
