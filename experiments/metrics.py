"""The metrics that tables, figures and MLflow's pages show: the loss, and the evals' headlines.

The evals load numpy, which `--help` and a single run do without at their start.
"""

from __future__ import annotations

from functools import cache

from experiments.stats import Scale
from relora_core.events import Metric

LOSS = Metric(
    key="train/loss", title="loss", label="training loss\n(nats per token)", column="loss"
)

MFU, MFU_6N = "perf/mfu", "perf/mfu_6n"
"""Shares of the GPUs' peak (`relora_core/utilisation.py`): by the method's FLOPs, and by 6N."""


def percent(share: float | None) -> str:
    """`12.3 %`; `-` where nothing is known."""
    return "-" if share is None else f"{100 * share:.3g} %"


@cache
def headline() -> tuple[Metric, ...]:
    """All of them, the loss first."""
    from relora_core.evals import REGISTRY  # numpy

    return (LOSS, *(metric for spec in REGISTRY.values() for metric in spec.headline))


@cache
def columns() -> dict[str, str]:
    """Heading -> key of those that narrow tables show."""
    return {metric.column: metric.key for metric in headline() if metric.column}


def charted() -> list[Metric]:
    """Those with a chart of their own in every report and on MLflow's pages."""
    return [metric for metric in headline() if metric.charted]


def scale_of(key: str) -> Scale:
    """As the metric declares it; of others `log` for perplexities, judged by the name."""
    declared: dict[str, Scale] = {metric.key: metric.scale for metric in headline()}
    return declared.get(key, "log" if key.endswith("perplexity") else "linear")


def goes_up(key: str) -> bool:
    """Whether more is better, judged by the metric's name."""
    from relora_core.evals import REGISTRY  # numpy

    spec = REGISTRY.get(key.split("/")[1]) if "/" in key else None
    return spec.headline[0].better == "higher" if spec else "accuracy" in key
