"""What users of the stock plugins for submitit and Optuna type, in our names.

Arguments are translated before Hydra reads them: whatever follows (plans, run_ids, the recorded
command) is that of our own names, and other plugins beside ours are never asked for.

Not for: names in config files, which `experiments/typos.py` explains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    RangeSweep,
    Sweep,
    Transformer,
)
from hydra.errors import HydraException
from omegaconf import OmegaConf

from experiments.addresses import redacted
from experiments.typos import LAUNCHERS, PLUS, option_folders, overrides_among
from hydra_plugins.relora_sweeps._guards import install_guards
from relora_core.config import ConfigError
from sweeps.search.config import DIRECTIONS, SAMPLERS, direction
from sweeps.slurm.options import minutes, own_option, plain


@dataclass(frozen=True, kw_only=True)
class Habit:
    """What becomes of one name of a stock plugin. Without a reason it is only renamed."""

    ours: str = ""
    """The key that does the same; a dot at the end takes the rest of a dotted key."""
    ignored: str = ""
    """Why it has no effect here."""
    refused: str = ""
    """Why it cannot be had."""
    only: str = "null"
    """The one value that is so anyway, where others are refused."""


SAME = Habit()
OWN_FOLDER = Habit(ignored="output_dir says where everything goes")
RUNS_HAVE_LOGS = Habit(ignored="each run's folder has its logs")
ONE_NAME = Habit(ignored="jobs are named after their sweep")
LOCAL_SHAPE = Habit(ignored="local runs share the GPUs and cores of this machine")
EXTRA = "++hydra.launcher.extra."
SLURM = {
    **{
        name: Habit(ours=ours.replace(EXTRA.lstrip("+"), EXTRA)) for name, ours in LAUNCHERS.items()
    },
    "additional_parameters": Habit(ours=EXTRA),
    "max_num_timeout": Habit(ignored="jobs resume until hydra.launcher.max_stalled ends them"),
    "submitit_folder": OWN_FOLDER,
    "stderr_to_stdout": RUNS_HAVE_LOGS,
    "name": ONE_NAME,
}
"""`hydra.launcher.KEY` with hydra/launcher=submitit_slurm; other names are ours as well."""
LOCAL = {
    "array_parallelism": Habit(ours="hydra.launcher.max_parallel"),
    "timeout_min": Habit(ignored="local runs have no time limit"),
    "submitit_folder": OWN_FOLDER,
    "stderr_to_stdout": RUNS_HAVE_LOGS,
    "name": ONE_NAME,
    **dict.fromkeys(("cpus_per_task", "gpus_per_node", "mem_gb"), LOCAL_SHAPE),
    **dict.fromkeys(
        ("nodes", "tasks_per_node"),
        Habit(refused="runs of several processes need hydra/launcher=slurm", only="1"),
    ),
}
"""Likewise with hydra/launcher=submitit_local."""
OPTUNA = {
    "n_trials": Habit(ours="search.n_trials"),
    "n_jobs": Habit(ours="hydra.launcher.max_parallel"),
    "study_name": Habit(ours="sweep.name"),
    "storage": Habit(ours="search.storage"),
    "params": Habit(ours="."),
    "search_space": Habit(ours="."),
    "sampler.seed": Habit(ours="search.seed"),
    "sampler._target_": Habit(refused="configs call no code; hydra/sweeper/sampler=NAME chooses"),
    "sampler": Habit(ours="++search.sampler."),
    "direction": SAME,  # `_objectives`: here a direction stands with its metric
    "custom_search_space": Habit(
        refused="it is code, and a config calls none; search.space and search.when do the same"
    ),
    "max_failure_rate": Habit(
        refused="it is a share of a batch; search.max_failures counts failed trials in a row"
    ),
}
"""`hydra.sweeper.KEY` with hydra/sweeper=optuna."""
OPTIONS = {
    ("hydra/launcher", "submitit_slurm"): ("slurm", SLURM),
    ("hydra/launcher", "submitit_local"): ("local", LOCAL),
    ("hydra/sweeper", "optuna"): ("search", OPTUNA),
}
"""(group, a stock plugin's option) -> ours, and its keys."""
SAMPLER = "hydra/sweeper/sampler"


def translate(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments in our names, and a line for each that changed.

    ConfigError for two names that disagree, and for what cannot be had.
    """
    install_guards()  # without, Hydra's choice() takes no null
    overrides = {text: _parsed(text) for text in overrides_among(arguments)}
    tables: dict[str, dict[str, Habit]] = {}
    for one in overrides.values():
        if one is not None and (option := OPTIONS.get((one.key_or_group, _value(one)))):
            tables[one.key_or_group.replace("/", ".")] = option[1]
    made: list[tuple[str, list[str]]] = []
    notes: list[str] = []
    for text in arguments:
        one = overrides.get(text)
        ours, note = ([text], None) if one is None else _one(text, one, tables, arguments)
        made.append((text, ours))
        notes += [note] if note else []
    return _without_doubles(made), notes


def _one(
    text: str, one: Override, tables: dict[str, dict[str, Habit]], arguments: Sequence[str]
) -> tuple[list[str], str | None]:
    """One argument in our names, and its line if that is a change."""
    key, value = one.key_or_group, text.partition("=")[2]
    if option := OPTIONS.get((key, _value(one))):
        return _renamed(text, f"{key}={option[0]}")
    if PLUS.match(text):
        return _renamed(text, f"{key}={value}")
    if key == SAMPLER:
        return _renamed(text, _sampler(text, value, tables, arguments))
    if one.is_delete():
        return [text], None
    if (rest := key.removeprefix(EXTRA.lstrip("+"))) != key:
        entry = _entry(EXTRA, rest, value)
        return ([text], None) if entry.startswith(EXTRA) else _renamed(text, entry)
    if ".".join(key.split(".")[:2]) in tables:
        return _by_habit(text, one, tables, arguments)
    return [text], None


def _sampler(
    text: str, name: str, tables: dict[str, dict[str, Habit]], arguments: Sequence[str]
) -> str:
    """`search.sampler.name=...`; ConfigError if there is no search, or no such sampler."""
    ours = f"search.sampler.name={name}"
    if "hydra.sweeper" not in tables and "hydra/sweeper=search" not in arguments:
        raise ConfigError(f"{text} needs hydra/sweeper=optuna, or it is {ours} with search")
    if name not in SAMPLERS:
        raise ConfigError(f"{SAMPLER} must be one of {', '.join(SAMPLERS)}, got {name!r}")
    return ours


def _by_habit(
    text: str, one: Override, tables: dict[str, dict[str, Habit]], arguments: Sequence[str]
) -> tuple[list[str], str | None]:
    """Likewise of a key in a section of a stock plugin."""
    section = ".".join(one.key_or_group.split(".")[:2])
    table, value = tables[section], text.partition("=")[2]
    name, rest = one.key_or_group.removeprefix(f"{section}."), ""
    if table is OPTUNA and name == "direction":
        return _renamed(text, _objectives(one, text, arguments))
    if name not in table:
        name, _, rest = name.partition(".")
    habit = table.get(name, SAME)
    if habit.refused and value not in (habit.only, "null"):
        raise ConfigError(f"{text} cannot be had: {habit.refused}")
    if habit.ignored or habit.refused or (value == "null" and habit.ours):
        reason = habit.ignored or "that is so without it"
        return [], f"{text} has no effect: {reason}"
    if not habit.ours:
        return [text], None
    if not habit.ours.endswith("."):
        return _renamed(text, f"{habit.ours}={value}")
    start = habit.ours if habit.ours != "." else ""
    if rest:
        return _renamed(text, _entry(start, rest, value))
    entries = one.value()
    if not isinstance(entries, dict):
        raise ConfigError(f"{one.key_or_group} must be {{key: value, ...}}, got {text!r}")
    for k, v in entries.items():
        if isinstance(v, dict):
            raise ConfigError(f"{one.key_or_group}: {_no_section(k, v, axis=not start)}")
    ours: list[str] = []
    for k, v in entries.items():
        if f"{name}.{k}" in table:  # as if it had been given alone
            line = f"{one.key_or_group}.{k}={_quoted(v, bare=False)}"
            if (alone := _parsed(line)) is not None:
                ours += _one(line, alone, tables, arguments)[0]
        else:
            ours.append(_entry(start, k, _quoted(v, bare=not start)))
    return _renamed(text, *ours)


def _entry(start: str, key: str, value: str) -> str:
    """An entry of a dict as an override of its own; an option of sbatch by our name, if it has one.

    `settled` does so for config files, too, but cannot see there whether a default was meant.
    """
    kind = ":" in value and plain(key) == "gpus_per_node"  # a100:2, of which ours takes the 2 alone
    own = own_option(key, value.strip("'\"")) if start == EXTRA and value != "null" else None
    if own is None or kind:
        return f"{start}{key}={value}"
    name, new = own
    return f"hydra.launcher.{name}={f'{new:g}' if name == 'mem_gb' else value}"


def _no_section(key: str, value: dict[str, Any], *, axis: bool) -> str:
    """The rest of the line for a section where a value is expected."""
    got = f"got {Transformer.str(value)}"
    if not axis:
        return f"{key} must be one value, {got}"
    return (
        f"{key} must be values in Hydra's grammar, {got}; as in search.space it is "
        f"{key}='tag(log,interval(LOW,HIGH))', interval(LOW,HIGH), range(LOW,HIGH) or choice(A,B)"
    )


def _quoted(value: Any, *, bare: bool) -> str:
    """A value of a dict as it stands behind `=`; `bare`: an axis, in Hydra's grammar."""
    if isinstance(value, Sweep):
        return _sweep_text(value)
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    if not isinstance(value, str):
        return Transformer.str(value)
    return str(value) if bare or value.isalnum() else '"' + value.replace('"', '\\"') + '"'


def _sweep_text(sweep: Sweep) -> str:
    """What Hydra's grammar reads as this sweep: a shell has removed the quotes around it."""
    if isinstance(sweep, ChoiceSweep):
        text = f"choice({','.join(map(Transformer.str, sweep.list))})"
    elif isinstance(sweep, RangeSweep):
        text = f"range({sweep.start},{sweep.stop},{sweep.step})"
    else:
        assert isinstance(sweep, IntervalSweep)
        text = f"interval({sweep.start},{sweep.end})"  # whose ends Hydra makes floats
        text = f"int({text})" if isinstance(sweep.start, int) else text
    if getattr(sweep, "shuffle", False):
        text = f"shuffle({text})"
    return f"tag({','.join(sorted(sweep.tags))},{text})" if sweep.tags else text


def _renamed(text: str, *ours: str) -> tuple[list[str], str | None]:
    return [*ours], redacted(f"{text} is {' '.join(ours)}")


def _objectives(one: Override, text: str, arguments: Sequence[str]) -> str:
    """`search.objectives=[...]`: those of the command line, or its search, in this direction."""
    value = one.value()
    given = [str(v) for v in (value if isinstance(value, list) else [value])]
    goals: Any = None
    for other in map(_parsed, overrides_among(arguments)):
        if other is not None and other.key_or_group == "search":
            files = [f / "search" / f"{_value(other)}.yaml" for f in option_folders(arguments)]
            loaded = [OmegaConf.load(file) for file in files if file.is_file()]
            goals = OmegaConf.to_container(loaded[-1]).get("objectives") if loaded else None  # type: ignore[union-attr]
    for other in map(_parsed, overrides_among(arguments)):
        if other is not None and other.key_or_group == "search.objectives":
            typed = [direction(word) for goal in _list(other.value()) for word in goal.split()]
            said = [word for word in typed if word in DIRECTIONS]
            if said and said != [*map(direction, given)]:
                raise ConfigError(f"{text} and {other.input_line} disagree: leave one out")
            goals = other.value()
    goals = _list(goals)
    if len(goals) != len(given) or not all(isinstance(goal, str) for goal in goals):
        raise ConfigError(
            f"{text} must have a metric for each direction: "
            f"search.objectives='[\"METRIC {given[0]}\"]'"
        )
    words = [goal.split() for goal in goals]
    lines = [" ".join([w[0], direction(d), *w[2:]]) for w, d in zip(words, given, strict=True)]
    return "search.objectives=[" + ",".join(f'"{line}"' for line in lines) + "]"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _without_doubles(made: list[tuple[str, list[str]]]) -> list[str]:
    """All arguments in order, each key once where a translation gave it; ConfigError for two
    names with different values."""
    first: dict[str, tuple[str, str]] = {}
    translated = {_key(new) for old, ours in made for new in ours if new != old}
    replaced = {key for key in translated if key == "search.objectives"}
    kept: list[str] = []
    for old, ours in made:
        for new in ours:
            key, value = _key(new), new.partition("=")[2]
            if key in replaced and new == old:
                continue  # `_objectives` has read it
            if key not in translated or key.startswith("-"):
                kept.append(new)
            elif key not in first:
                first[key] = (old, value)
                kept.append(new)
            elif not _same(key, first[key][1], value):
                raise ConfigError(f"{first[key][0]} and {old} disagree: leave one out")
    return kept


def _key(text: str) -> str:
    """A key by which spellings of the same option are compared: sbatch has dashes."""
    key = text.partition("=")[0].lstrip("+")
    return plain(key) if key.startswith(EXTRA.lstrip("+")) else key


def _same(key: str, one: str, two: str) -> bool:
    if key == "hydra.launcher.time":
        return minutes(one.strip("'\"")) == minutes(two.strip("'\""))
    return one.strip("'\"") == two.strip("'\"")


def _parsed(text: str) -> Override | None:
    """The override; None for what Hydra will refuse."""
    with contextlib.suppress(HydraException):
        return OverridesParser.create().parse_override(text)
    return None


def _value(one: Override) -> str:
    return "" if one.is_delete() or one.is_sweep_override() else str(one.value())
