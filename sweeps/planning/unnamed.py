"""Notes on settings that differ between runs though their names do not say so.

Names are made of the fewest keys that distinguish runs (`plan.cell_axes`): if a learning rate
differs along with the model, its effect looks like the model's. What follows from an option of
conf/, such as a model's width, is not mentioned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from typing import Any

from experiments.identity import essential
from experiments.labels import OPTIONS
from experiments.options import values_of
from relora_core.config import RunConfig, get, walk

GROUPS = {group: key for group, key in OPTIONS.items() if group != "experiment"}
"""Not an experiment: what its file sets is to be mentioned."""
IMPLIED = ("model.vocab_size", "data.vocab_size", "data.tokenizer", "data.eos_id", "seed")
"""Keys that are never mentioned: those that follow from the data, and the seed."""
DEFAULTS: dict[str, Any] = {}
"""Key -> the schema's default; filled when first needed."""
MOST = 3
"""Keys of a note, and values of its label."""


def notes(
    configs: Sequence[RunConfig],
    rows: Sequence[Mapping[str, Any]],
    *,
    named: Sequence[str],
    spell: Callable[[str, Any], str],
) -> Iterator[str]:
    """A line for each key of the names along with which others differ.

    `rows` are the settings that names are made of, `named` the keys that they have; `spell` gives
    a key and its value as text.
    """
    every = dict.fromkeys(key for row in rows for key in row)
    hidden = [k for k in every if k not in named and len({repr(row.get(k)) for row in rows}) > 1]
    if not hidden:
        return
    by_label: dict[str | None, list[str]] = {}
    settings = [{k: get(c, k) for k in essential(c) if k in hidden} for c in configs]
    for key in hidden:
        if _differs(key, settings) and not _follows(key, configs, settings):
            label = next((one for one in named if _decides(one, key, rows, settings)), None)
            by_label.setdefault(label, []).append(key)
    for label, keys in by_label.items():
        yield _line(label, keys, rows, settings, named=named, spell=spell)


def _differs(key: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the key has several values, among the runs that it applies to."""
    if key in IMPLIED or key.endswith(".fingerprint"):
        return False
    return len({repr(row[key]) for row in settings if key in row}) > 1


def _follows(key: str, configs: Sequence[RunConfig], settings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each run's value comes from its options, or is the alpha of one fixed scale."""
    values = [(c, row[key]) for c, row in zip(configs, settings, strict=True) if key in row]
    if key == "relora.alpha" and len({c.relora.alpha / max(c.relora.r, 1) for c, _ in values}) == 1:
        return True
    return all(_value_of_options(config, key) == value for config, value in values)


def _value_of_options(config: RunConfig, key: str) -> Any:
    """The key's value by the config's options, or else the schema."""
    for group, label in GROUPS.items():
        option = values_of(group, str(get(config, label)))
        if key in option:
            return option[key]
    return _default(key, config=config)


def _default(key: str, *, config: RunConfig) -> Any:
    if not DEFAULTS:
        for name, f, _ in walk(config):
            DEFAULTS[name] = f.default if f.default_factory is MISSING else f.default_factory()
    return DEFAULTS[key]


def _decides(
    label: str,
    key: str,
    rows: Sequence[Mapping[str, Any]],
    settings: Sequence[Mapping[str, Any]],
) -> bool:
    """Whether the label's value determines the key's, in these runs."""
    pairs = {
        (repr(row.get(label)), repr(own.get(key))) for row, own in zip(rows, settings, strict=True)
    }
    return len(pairs) == len({one for one, _ in pairs})


def _line(
    label: str | None,
    keys: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    settings: Sequence[Mapping[str, Any]],
    *,
    named: Sequence[str],
    spell: Callable[[str, Any], str],
) -> str:
    """Like `names say model alone, yet model=tiny has train.lr=0.001; model=small has ...`."""
    of_name: dict[str, str] = {}
    for row, own in zip(rows, settings, strict=True):
        named_keys = [label] if label else named
        name = " ".join(spell(key, row[key]) for key in named_keys if key in row)
        has = ", ".join(spell(key, own[key]) for key in keys[:MOST] if key in own)
        if has:
            of_name.setdefault(name, f"{name} has {has}")
    some = "; ".join(list(of_name.values())[:MOST]) + ("; ..." if len(of_name) > MOST else "")
    more = len(keys) - MOST
    others = f" (and {more} more {'key differs' if more == 1 else 'keys differ'})"
    label_text = spell(label, "").rstrip("=") if label else ""
    what = f"names say {label_text} alone" if label else "names say less than differs"
    return f"{what}, yet {some}{others if more > 0 else ''}"
