"""The runs of a sweep as tidy data: sweep, arms, runs, points.

Not for: reading them (`gather.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from experiments.disk.evaluations import eval_settings
from experiments.disk.states import State
from experiments.identity import scientific
from experiments.stats import Interval, Side, interval
from relora_core.config import EVALS, EvaluatedConfig, RunConfig, get, runs_eval
from relora_core.data import grammar
from relora_core.evals.paloma import longest_window
from relora_core.events import Metric

FIRST = ("experiment", "method", "model.name", "relora.name", "data.path")
"""Settings that are listed first, whether part of the identity or not."""


class Point(NamedTuple):
    """A value of a curve, and its place on each axis that a curve can be drawn against."""

    step: int
    tokens: int
    gpu_hours: float
    """Of training: seconds times processes, without evals."""
    value: float


AXES = {"steps": "step", "tokens": "tokens", "gpu_hours": "gpu_hours"}
"""What curves can be drawn against -> its field of a Point, and column of data.parquet."""


@dataclass(kw_only=True, slots=True)
class Cost:
    """What a run has cost."""

    gpu_hours: float = 0.0
    """Of training, without evals and work that was lost to kills. CPUs count, too."""
    all_hours: float = 0.0
    """All attempts from first to last event, times processes: evals and lost work included."""
    tokens: int = 0
    attempts: int = 0


@dataclass(kw_only=True, slots=True)
class Attempt:
    """Where and with what code an attempt ran, as far as it was recorded."""

    host: str = ""
    python: str = ""
    code_hash: str = ""
    commit: str = ""
    dirty: bool | None = None
    hardware: str = ""
    packages: dict[str, str] = field(default_factory=dict)


class Evaluated(NamedTuple):
    """A separate evaluation of a run."""

    digest: str
    """Of its settings."""
    code: str
    """code_hash; empty if it was not recorded."""
    metrics: list[str]
    tables: list[str]


@dataclass(kw_only=True, slots=True)
class RunData:
    """One run as it is now."""

    run_id: str
    arm_id: str
    name: str
    seed: int
    state: str = State.PLANNED
    """A State, or `unreadable` where its files are damaged."""
    reason: str | None = None
    step: int = 0
    config: RunConfig
    metrics: dict[str, float] = field(default_factory=dict)
    """Final numbers; empty until it has ended. Of a diverged run those of the step it ended at."""
    loss_steps: int = 0
    """Updates that the final train/loss is a mean over."""
    curves: dict[str, list[Point]] = field(default_factory=dict)
    """Metric -> points by step, without those that a later attempt replaced."""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Table -> its newest rows."""
    evaluated: dict[tuple[str, str], Evaluated] = field(default_factory=dict)
    """Separate evaluations, by name and section."""
    restarts: list[int] = field(default_factory=list)
    """Steps at which it restarted."""
    notes: list[str] = field(default_factory=list)
    """Its attempts' notes on the data they read, each once."""
    cost: Cost = field(default_factory=Cost)
    attempts: list[Attempt] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    """Sections (`data`, `eval.blimp`) with changes that the user accepted."""

    @property
    def finished(self) -> bool:
        return self.state == State.FINISHED

    @property
    def trained(self) -> bool:
        """Whether it was trained here; else it is a model from elsewhere."""
        return not isinstance(self.config, EvaluatedConfig)

    @property
    def code(self) -> list[str]:
        """code_hash of its attempts, each once."""
        return list(dict.fromkeys(a.code_hash for a in self.attempts if a.code_hash))


@dataclass(kw_only=True, slots=True)
class Arm:
    """A setting regardless of seed."""

    arm_id: str
    name: str
    colour: str
    """`#rrggbb`, in MLflow, too (`experiments/colours.py`)."""
    style: str = "-"
    axes: dict[str, str] = field(default_factory=dict)
    """Its values of the axes of the plan without the seed, as on a command line."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Key -> value of settings that vary in the sweep and apply to the arm, without the seed."""
    runs: list[RunData] = field(default_factory=list)

    @property
    def finished(self) -> list[RunData]:
        return [run for run in self.runs if run.finished]

    @property
    def trained(self) -> bool:
        """Whether it was trained here; else it is a model from elsewhere, whose seed 0 is none."""
        return all(run.trained for run in self.runs)

    def values(self, metric: str) -> dict[int, float]:
        """Seed -> final value of the finished runs that have the metric; nan for diverged ones.

        Empty if no run has it: nan means that a value was lost, not that none was measured.
        """
        by_seed = {run.seed: run.metrics[metric] for run in self.finished if metric in run.metrics}
        return self.with_lost(by_seed)

    def estimate(self, metric: Metric) -> Interval | None:
        """Its mean over `values`; None if no run has it."""
        values = list(self.values(metric.key).values())
        return interval(values, scale=metric.scale) if values else None

    def with_lost(self, by_seed: dict[int, float]) -> dict[int, float]:
        """The same with nan for diverged runs; empty if no run has a value."""
        lost = {run.seed: math.nan for run in self.runs if run.state == State.DIVERGED}
        return by_seed | lost if by_seed else {}


@dataclass(kw_only=True, slots=True)
class Sweep:
    """A plan and the data of its runs."""

    name: str
    question: str | None = None
    commands: list[str] = field(default_factory=list)
    collapsed: list[str] = field(default_factory=list)
    """Why there are fewer runs than points of the grid."""
    notes: list[str] = field(default_factory=list)
    """Notes of planning on settings and data."""
    same_arms: dict[str, str] = field(default_factory=dict)
    """Arm without runs of its own -> the one that computes the same and has them."""
    arms: list[Arm]
    """In the plan's order."""

    @property
    def runs(self) -> list[RunData]:
        return [run for arm in self.arms for run in arm.runs]

    @property
    def seeds(self) -> list[int]:
        """Of the runs that were trained here, ascending."""
        return sorted({run.seed for run in self.runs if run.trained})

    @property
    def counts(self) -> dict[str, int]:
        """State -> runs, most frequent first."""
        return dict(Counter(run.state for run in self.runs).most_common())

    @property
    def varies(self) -> dict[str, list[Any]]:
        """Key -> values of settings that differ between arms; the seed comes last, if it varies."""
        varied: dict[str, list[Any]] = {}
        for arm in self.arms:
            for key, value in arm.settings.items():
                values = varied.setdefault(key, [])
                if value not in values:
                    values.append(value)
        seeds = self.seeds
        return varied | ({"seed": seeds} if len(seeds) > 1 else {})

    @property
    def fixed(self) -> dict[str, Any]:
        """Key -> value of the settings that are the same in all runs that they apply to."""
        shared: dict[str, Any] = {}
        for arm in self.arms:
            shared |= settings(arm.runs[0].config) if arm.runs else {}
        varies = self.varies
        return {key: value for key, value in shared.items() if key not in varies}

    def metrics(self) -> list[str]:
        """Metrics of the finished runs, without duplicates."""
        return list(dict.fromkeys(m for run in self.runs if run.finished for m in run.metrics))


def settings(config: RunConfig) -> dict[str, Any]:
    """Labels that apply, and scientific settings without the seed."""
    labels = {key: get(config, key) for key in FIRST if key != "relora.name"}
    if config.method == "relora":
        labels["relora.name"] = config.relora.name
    rows = {key: value for key, value in labels.items() if value is not None} | scientific(config)
    return {key: value for key, value in rows.items() if key != "seed"}


def differing_texts(sweep: Sweep) -> list[str]:
    """Settings that give arms, or their evals, other texts or vocabularies."""
    keys = [key for key in sweep.varies if key.startswith(("data.", "model.vocab_size"))]
    return keys + [key for key in sweep.varies if _is_part_of_eval(key)]


def reads_other(arm: Arm, reference: Arm) -> bool:
    """Whether losses and perplexities of the two are of different texts or tokenizers."""
    if not arm.trained or not reference.trained:
        return True
    one, other = (side.runs[0].config for side in (arm, reference))
    return any(get(one, key) != get(other, key) for key in ("model.vocab_size", "data.fingerprint"))


def other_context(arm: Arm, reference: Arm, *, training: bool) -> bool:
    """Whether a token has more before it in one of the two, since `data.seq_len` differs: in rows
    of training, or else in Paloma's windows and the paper's rows, which no longer rows lengthen.
    """
    one, other = (side.runs[0].config for side in (arm, reference))
    if training:
        return one.data.seq_len != other.data.seq_len
    return longest_window(one) != longest_window(other)


def scored_otherwise(arm: Arm, reference: Arm) -> list[str]:
    """Settings, as `eval.blimp.max_pairs`, by which an eval has other texts in each of the two.

    Evaluations apart from training count for nothing: `gather` leaves out those that differ.
    """
    one, other = (side.runs[0].config for side in (arm, reference))
    differing = []
    for section in EVALS:
        if runs_eval(one, section) and runs_eval(other, section):
            a, b = (eval_settings(config.eval, section) for config in (one, other))
            keys = (f"eval.{section}.{name}" for name in a if a[name] != b.get(name))
            differing += filter(_is_part_of_eval, keys)
    return differing


def fixed_side(arm: Arm, reference: Arm) -> Side | None:
    """Which of the two is a model from elsewhere, and so one value without seeds."""
    return "reference" if not reference.trained else "arm" if not arm.trained else None


def _is_part_of_eval(key: str) -> bool:
    """Whether it says which texts an eval scores, or how many of them."""
    name = key.rpartition(".")[2]
    return key.startswith("eval.") and name.startswith(("fingerprint", "split", "max_"))


# floors -----------------------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class Floor:
    """Losses that training is measured against, in nats per token."""

    entropy: float
    """A lower bound of any model's expected loss."""
    unigram: float
    """The loss of a model that knows only frequencies of tokens."""


def floor(sweep: Sweep) -> Floor | None:
    """The floor of the grammar, whose entropy has a closed form; None for other data."""
    if not sweep.runs or any(run.config.data.kind != "grammar" for run in sweep.runs):
        return None
    return Floor(entropy=grammar.entropy_rate(), unigram=grammar.unigram_entropy())
