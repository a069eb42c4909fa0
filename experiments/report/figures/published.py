"""The paper's own curves, to draw under ours, from a file that is not part of the project.

The file holds numbers of Weiss et al. (2025): `models` (`t-rel`, `t-dec`, `s-rel`, `s-dec`) with
evals and losses by step, `gpu_hours` and `learning_dynamics_digitised`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D

from experiments import json_files
from experiments.metrics import LOSS
from experiments.report.figures.curves import Panel
from relora_core.config import ConfigError
from relora_core.data.places import expand
from relora_core.evals.blimp import ACCURACY
from relora_core.evals.paloma import PAPER_PERPLEXITY

TOKENS_PER_STEP = 1024 * 2048
REFERENCE_STEP = 20_000
"""Steps that the published GPU-hours are of."""
SIZES = {"tiny": "t", "small": "s"}
METHODS = {"relora": "rel", "decoder": "dec"}
LABELS = {"relora": "ReLoRA", "decoder": "decoder"}
LOOKS: dict[str, dict[str, Any]] = {
    "relora": {"color": "#3b4046", "linestyle": (0, (5, 2))},
    "decoder": {"color": "#8a8f94", "linestyle": (0, (5, 2))},
}
WIDTHS = {"tiny": 1.3, "small": 2.2}
SERIES = {
    LOSS.key: ("train_loss_digitised", ()),
    PAPER_PERPLEXITY.key: ("eval", ("paloma_ppl", "paloma_ppl_digitised")),
    ACCURACY.key: ("eval", ("blimp",)),
}
"""Metric -> its key below a model, and the names of its values there."""
KINDS = {
    "weights": {"w_2": "swiglu_w2", "vo": "ov_circuit"},
    "updates": {"w_2": "swiglu_w2", "v_proj": "attn_v", "o_proj": "attn_o"},
}
MEASURES = {"per": "per", "condition_number": "cn"}
WHATS = {
    ("weights", "base"): ("relora", "decoder"),
    ("updates", "gradient"): ("decoder",),
    ("updates", "update_proxy"): ("relora",),
}
"""(figure, sort of matrix) as we name them -> methods with published curves."""
SWAPPED = (
    " The published figure files very probably carry exchanged tiny and small labels on the decoder"
    " curves of weights: the values at step 0 fit seed 42 only when they are exchanged back, as"
    " here."
)
LATER = " The published ReLoRA values labelled 2000 k were measured at step 2000 k + 100."
ROUNDED = (
    " The published updates of ReLoRA are the product BA formed in bf16: their smallest singular"
    " values are rounding, so their condition numbers say nothing on conditioning."
)


@dataclass(kw_only=True, slots=True)
class Series:
    """One published curve."""

    method: str
    size: str
    points: list[tuple[float, float]]
    """(step, value)."""
    hours_per_step: float

    @property
    def label(self) -> str:
        return f"published (Weiss et al. 2025): {LABELS[self.method]} {self.size}"

    @property
    def look(self) -> dict[str, Any]:
        return {**LOOKS[self.method], "linewidth": WIDTHS[self.size]}

    def at(self, step: float, *, key: str) -> float:
        """A step in the unit of a Point's field `key`."""
        per_step = {"step": 1.0, "tokens": TOKENS_PER_STEP, "gpu_hours": self.hours_per_step}
        return step * per_step[key]


@dataclass(kw_only=True, slots=True)
class Published:
    """The file's content, and the model sizes to draw."""

    data: dict[str, Any]
    sizes: list[str]

    def check(self) -> None:
        """Read every curve once: raises what drawing them would."""
        for metric in SERIES:
            list(self._series(metric))
        for group, what in WHATS:
            for kind in KINDS[group]:
                for measure in MEASURES:
                    list(self._dynamics(group, what, kind, measure))

    def lay(self, panel: Panel, metric: str) -> list[Series]:
        """Draw the curves with points within the panel's extent, and return them."""
        return self._draw(panel, self._series(metric))

    def lay_dynamics(
        self, panel: Panel, *, group: str, what: str, kind: str, measure: str
    ) -> list[Series]:
        """Like `lay`, for the measures of Figures 3 to 6."""
        return self._draw(panel, self._dynamics(group, what, kind, measure))

    def _draw(self, panel: Panel, curves: Iterable[Series]) -> list[Series]:
        drawn = []
        for series in curves:
            xs = [series.at(s, key=panel.axis.key) * panel.axis.factor for s, _ in series.points]
            ys = [value for _, value in series.points]
            inside = [y for x, y in zip(xs, ys, strict=True) if panel.start <= x <= panel.end]
            if len(inside) < 2:
                continue
            panel.ax.plot(xs, ys, **series.look, zorder=1.8)
            panel.lines += [min(inside), max(inside)]
            drawn.append(series)
        return drawn

    def _series(self, metric: str) -> Iterator[Series]:
        where, names = SERIES.get(metric, ("", ()))
        for method, size, model in self._models():
            rows = model.get(where, {})
            points = []
            for step, row in rows.items():
                value = next((row[n] for n in names if n in row), None) if names else row
                if value is not None:
                    points.append((float(step), float(value)))
            yield self._of(method, size, points)

    def _dynamics(self, group: str, what: str, kind: str, measure: str) -> Iterator[Series]:
        curves = self.data["learning_dynamics_digitised"].get(f"{MEASURES[measure]}_{group}", {})
        name = KINDS[group].get(kind)
        for method in WHATS.get((group, what), ()):
            for size in self.sizes:
                labelled = _other(size) if (group, method) == ("weights", "decoder") else size
                points = curves.get(f"{name}|{labelled}|{method}", [])
                late = 100 if method == "relora" else 0
                usable = [(s + late if s else s, v) for s, v in points if math.isfinite(v)]
                yield self._of(method, size, usable)

    def _models(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        for method, short in METHODS.items():
            for size in self.sizes:
                yield method, size, self.data["models"].get(f"{SIZES[size]}-{short}", {})

    def _of(self, method: str, size: str, points: list[tuple[float, float]]) -> Series:
        hours = self.data["gpu_hours"][f"{SIZES[size]}-{METHODS[method]}"]["gpu_h"]
        return Series(
            method=method,
            size=size,
            points=sorted(points),
            hours_per_step=hours / REFERENCE_STEP,
        )

    def legend(self, drawn: Sequence[Sequence[Series]]) -> list[Line2D]:
        """An entry for each curve that was drawn."""
        looks = {series.label: series.look for panel in drawn for series in panel}
        return [Line2D([], [], **look, label=label) for label, look in looks.items()]


def load(path: Path | str, *, models: Iterable[str]) -> Published:
    """The published curves of the sizes among `models`, or of tiny if there is none.

    ConfigError if the file does not hold them.
    """
    try:
        data = json_files.parse(expand(path).read_bytes())
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"published must be a file to read, got {path}: {reason}") from None
    except ValueError:
        raise ConfigError(f"published must be a JSON file, got {path}") from None
    parts = ("models", "gpu_hours", "learning_dynamics_digitised")
    wanted = [f"{a}-{b}" for a in SIZES.values() for b in METHODS.values()]
    if not all(isinstance(data.get(p), dict) for p in parts):
        raise ConfigError(f"published must hold {', '.join(parts)}, got {path}")
    if not all(isinstance(data["gpu_hours"].get(m), dict) for m in wanted):
        raise ConfigError(f"published must hold gpu_hours of {', '.join(wanted)}, got {path}")
    names = set(models)
    paper = Published(data=data, sizes=[s for s in SIZES if s in names] or ["tiny"])
    try:
        paper.check()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"published must hold numbers by step, got {path}: {type(error).__name__}: {error}"
        ) from None
    return paper


def note(
    drawn: Sequence[Sequence[Series]], *, group: str | None = None, measure: str | None = None
) -> str:
    """A caption on the published curves in a figure; begins with a space."""
    series = [s for panel in drawn for s in panel]
    if not series:
        return " No published curve has points within the extent of these runs."
    text = " Dashed grey: published (Weiss et al. 2025), one seed, other text and hardware."
    methods = {s.method for s in series}
    if group == "weights" and "decoder" in methods:
        text += SWAPPED
    if group and "relora" in methods:
        text += LATER
    noise = (group, measure) == ("updates", "condition_number") and "relora" in methods
    return text + (ROUNDED if noise else "")


def _other(size: str) -> str:
    return "small" if size == "tiny" else "tiny"
