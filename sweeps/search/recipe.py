"""A frozen RunConfig -> the shortest command line, or experiment file, that gives it again.

Options of groups (`model=tiny`) come first, then each knob that applies and has another value than
they give it. Not for: anything about trials (`results.py`).
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import schema, typos
from experiments.environment import RUN
from experiments.labels import OPTIONS, is_plain, quoted
from relora_core import data
from relora_core.config import EVALS, ConfigError, RunConfig, applies, get, walk

NAMES = ("experiment", "model.name", "relora.name")
"""Set by the choice of an option; without any effect."""
FILLED_IN = ("data.fingerprint", *(f"eval.{name}.fingerprint" for name in EVALS))
"""Written by planning, from the files at the paths."""
MEASURED = ("eval", "dynamics")
"""Groups whose option is not named in a config: the one that gives most of its values is taken."""


@dataclass(kw_only=True, slots=True)
class Recipe:
    """Options of config groups, and the knobs with other values than these give them."""

    choices: dict[str, str]
    values: dict[str, Any]


def recipe(config: RunConfig) -> Recipe:
    """The choices and values that compose to `config`, but for what planning fills in."""
    chosen = _labelled(config)
    base = _composed(chosen)
    for group in MEASURED:
        if not any(key.startswith(f"{group}.") for key in _differences(config, base)):
            continue
        tried = {}
        for option in typos.options(group):
            composed = _composed({**chosen, group: option})
            tried[option] = (len(_differences(config, composed)), composed)
        chosen[group] = min(tried, key=lambda option: tried[option][0])
        base = tried[chosen[group]][1]
    values = _differences(config, base)
    if values:  # what refers to one of them in an option's file follows it, and not the config
        values |= _differences(config, schema.compose([*_texts(chosen), *_assignments(values)]))
    return Recipe(choices=chosen, values=values)


def _composed(choices: Mapping[str, str]) -> RunConfig:
    """What the options alone compose to; not to be changed."""
    return _compose_once(tuple(_texts(choices)), typos.CONF)


@functools.cache
def _compose_once(texts: tuple[str, ...], conf: Path) -> RunConfig:
    return schema.compose(list(texts))


def _labelled(config: RunConfig) -> dict[str, str]:
    """Group -> option, of the groups whose option is named in the config."""
    names = {group: get(config, key) for group, key in OPTIONS.items()}
    if config.method != "relora":
        del names["relora"]
    return {group: name for group, name in names.items() if name in typos.options(group)}


def _differences(config: RunConfig, base: RunConfig) -> dict[str, Any]:
    """Dotted key -> value of the knobs that have an effect and another value in `base`."""
    differences = {}
    for key, f, value in walk(config):
        if key in (*NAMES, *FILLED_IN) or key.startswith("sweep."):
            continue
        if applies(f.metadata, config) and value != get(base, key):
            differences[key] = value
    if _is_filled_in(config, base):
        differences.pop("model.vocab_size", None)
    return differences


def _is_filled_in(config: RunConfig, base: RunConfig) -> bool:
    """Whether planning would fill in this vocabulary; asked only of the grammar, which is quick."""
    if base.model.vocab_size is not None or config.data.kind != "grammar":
        return False
    return data.inspect(config.data).vocab_size == config.model.vocab_size


# as a command line ------------------------------------------------------------------------------
def overrides(config: RunConfig) -> list[str]:
    """The arguments of `python run.py`, in Hydra's grammar; the seed is always given, last."""
    made = recipe(config)
    values = {key: value for key, value in made.values.items() if key != "seed"}
    values["seed"] = config.seed
    return _texts(made.choices) + _assignments(values)


def command(config: RunConfig) -> str:
    """Ready to paste into a shell."""
    return f"{RUN} {shlex.join(overrides(config))}"


def _texts(choices: Mapping[str, str]) -> list[str]:
    return [f"{group}={quoted(option)}" for group, option in choices.items()]


def _assignments(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={quoted(value)}" for key, value in values.items()]


# as an experiment file --------------------------------------------------------------------------
def experiment_yaml(config: RunConfig, *, name: str, question: str, source: list[str]) -> str:
    """conf/experiment/<name>.yaml: what differs from the experiment that the config began with."""
    made = recipe(config)
    base = made.choices.pop("experiment", None)
    values = {key: value for key, value in made.values.items() if key != "output_dir"}
    lines = [
        "# @package _global_",
        f"# Question: {question}",
        f"# Command:  {RUN} experiment={quoted(name)}",
        *(f"# {'Source:' if i == 0 else '':<9} {line}" for i, line in enumerate(source)),
        "defaults:",
        *([f"  - {base}"] if base else []),
        "  - _self_",
        *(f"  - override /{group}: {option}" for group, option in _changed(made, base).items()),
        f"experiment: {_scalar(name)}",
        *_nested(values),
    ]
    return "\n".join(lines) + "\n"


def _changed(made: Recipe, base: str | None) -> dict[str, str]:
    """The choices that the base experiment alone would not lead to."""
    default = _labelled(_composed({"experiment": base} if base else {}))
    return {group: name for group, name in made.choices.items() if default.get(group) != name}


def _nested(values: Mapping[str, Any], *, indent: str = "") -> list[str]:
    """Dotted keys as YAML sections."""
    lines, sections = [], {}
    for key, value in values.items():
        head, _, rest = key.partition(".")
        if rest:
            sections.setdefault(head, {})[rest] = value
        else:
            lines.append(f"{indent}{head}: {_scalar(value)}")
    for head, inner in sections.items():
        lines += [f"{indent}{head}:", *_nested(inner, indent=f"{indent}  ")]
    return lines


def _scalar(value: Any) -> str:
    plain = isinstance(value, str) and is_plain(value)
    return value if plain else json.dumps(value)  # JSON is YAML


def experiment_path(word: str) -> Path:
    """`lr` -> conf/experiment/lr.yaml, a path as it is; ConfigError unless it can be written."""
    path = Path(word)
    if path.suffix not in (".yaml", ""):
        raise ConfigError(f"--write-experiment must be a name or a .yaml file, got {word!r}")
    if path.parent == Path() and path.suffix == "":
        path = typos.CONF / "experiment" / f"{word}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", path.stem):
        raise ConfigError(
            f"--write-experiment must be a name of letters, digits, - or _, got {path.stem!r}"
        )
    if path.exists():
        raise ConfigError(f"--write-experiment must be a new file, got {word!r}: {path} is there")
    return path
