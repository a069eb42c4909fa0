"""The metrics that are shown: each is named in one place, and every eval has some."""

import re
from pathlib import Path

import pytest

from experiments import metrics
from relora_core.evals import REGISTRY

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("metric", metrics.headline(), ids=lambda metric: metric.key)
def test_a_metric_is_named_where_it_is_declared_alone(metric):
    spelt = re.compile(f"[\"']{metric.key}[\"']")
    files = [file for top in ("experiments", "sweeps") for file in (ROOT / top).rglob("*.py")]
    names = [file.name for file in files if spelt.search(file.read_text())]
    assert names == ["metrics.py"] * (metric is metrics.LOSS)


@pytest.mark.parametrize("name", REGISTRY)
def test_the_metrics_of_an_eval_begin_with_its_name(name):
    assert REGISTRY[name].headline
    assert all(m.key.startswith(f"eval/{name}/") for m in REGISTRY[name].headline)


def test_headings_are_told_apart():
    shown = metrics.headline()
    assert len({metric.title for metric in shown}) == len(shown)
    assert list(metrics.columns()) == ["loss", "perplexity", "BLiMP"]


@pytest.mark.parametrize(
    ("key", "scale"),
    [
        ("train/loss", "linear"),
        ("eval/paloma/perplexity", "log"),
        ("test/paloma/c4/perplexity", "log"),
        ("eval/paloma/macro_perplexity", "log"),
        ("eval/paloma/bits_per_byte", "linear"),
        ("eval/blimp/no_bos/accuracy", "linear"),
    ],
)
def test_means_of_perplexities_are_geometric(key, scale):
    assert metrics.scale_of(key) == scale


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
