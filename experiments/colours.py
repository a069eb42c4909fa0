"""The colour of an arm, which reports and MLflow share.

Not for: colours of states in the terminal (`sweeps/display.py`).
"""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from experiments.disk.plans import PlannedRun

OKABE_ITO = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7"),
    *("#56b4e9", "#e69f00", "#000000", "#f0e442"),
)
"""Safe for colour-blind readers; those that are faint on white paper come last."""
TOL_MUTED = ("#332288", "#882255", "#117733", "#999933", "#aa4499", "#44aa99", "#cc6677")
STYLES = ("-", "--", ":", "-.")
FAMILY = ("model.name", "experiment", "method", "relora.name", "data.kind")
"""Arms that share these settings share a hue."""
DARKEST, LIGHTEST = 0.22, 0.72
GOLDEN = 0.618034
"""Multiples of it, modulo 1, are spread evenly however many there are."""


class Look(NamedTuple):
    """How an arm is drawn."""

    colour: str
    """`#rrggbb`, unique within the sweep."""
    style: str
    """Line style in a report: arms of one hue differ by it, too."""


def looks(runs: Iterable[PlannedRun]) -> dict[str, Look]:
    """arm_id -> look, for the runs of a plan in the plan's order.

    It depends only on the arms before it, so adding arms to a plan changes no other arm's look.
    """
    families: dict[tuple[str, ...], list[str]] = {}
    arms: dict[str, Look] = {}
    taken: set[str] = set()
    for run in runs:
        if run.arm_id in arms:
            continue
        members = families.setdefault(_family(run.config), [])
        colour = _shade(_base(list(families.values()).index(members)), place=len(members))
        while colour in taken:
            colour = f"#{(int(colour[1:], 16) + 0x070B05) % 0x1000000:06x}"
        taken.add(colour)
        arms[run.arm_id] = Look(colour, STYLES[len(members) % len(STYLES)])
        members.append(run.arm_id)
    return arms


def least_used(colours: Iterable[str]) -> str:
    """A colour for an arm of no sweep: the one that is rarest among `colours`."""
    used = Counter(colour.lower() for colour in colours)
    return min((*OKABE_ITO[:6], *TOL_MUTED), key=lambda colour: used[colour])


def _family(config: Mapping[str, Any]) -> tuple[str, ...]:
    values = []
    for key in FAMILY:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        values.append(str(value))
    return tuple(values)


def _base(number: int) -> str:
    """Colour of the first arm of a family."""
    if number < len(OKABE_ITO):
        return OKABE_ITO[number]
    return _hex(number * GOLDEN % 1, 0.45, 0.6)


def _shade(colour: str, *, place: int) -> str:
    """A shade of the colour's hue; place 0 is the colour itself."""
    if place == 0:
        return colour
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    span = LIGHTEST - DARKEST
    part = ((lightness - DARKEST) / span + place * GOLDEN) % 1
    return _hex(hue, DARKEST + span * part, saturation)


def _hex(hue: float, lightness: float, saturation: float) -> str:
    rgb = colorsys.hls_to_rgb(hue, lightness, saturation)
    return "#" + "".join(f"{round(255 * value):02x}" for value in rgb)
