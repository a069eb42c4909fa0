"""Notices on the configs that a command asks for together. Reads nothing else.

Not for: notices on a single config (`relora_core/redraws.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from experiments.identity import essential, left_out, overruled
from experiments.labels import text_of
from experiments.options import is_common, values_of
from relora_core.config import ADAPTERS, EVALS, RunConfig, get, walk


def across(configs: Iterable[RunConfig], *, seeds: int = 1) -> list[str]:
    """All notices, one line each; `seeds`: the number of seeds that each config is run with."""
    configs = list(configs)
    return [*scales(configs), *fixed_order(configs, seeds=seeds)]


def of_one(given: Mapping[str, str], config: RunConfig) -> list[str]:
    """Notices on what the user set of a single run: key -> value."""
    return [*without_effect(given, [config]), *replaced(given, config)]


def without_effect(given: Collection[str], configs: Sequence[RunConfig]) -> Iterator[str]:
    """A notice for each reason why knobs that the user gave have no effect on any of the runs."""
    keys: dict[str, list[str]] = {}
    for key, f, _ in walk(configs[0]):
        if key not in given:
            continue
        reasons = [overruled(f.metadata, config) or _off(key, config) for config in configs]
        if all(reasons):
            keys.setdefault(" and ".join(dict.fromkeys(map(str, reasons))), []).append(key)
    for reason, names in keys.items():
        yield f"{', '.join(names)} {'do' if len(names) > 1 else 'does'} not apply {reason}"


def replaced(given: Mapping[str, str], config: RunConfig) -> Iterator[str]:
    """A notice for each option that the user gave of which an experiment replaces a value by which
    it differs from other options, since a table shows the numbers under the option's name.

    `given`: key -> value of what the user set. Experiments are composed last.
    """
    counts = essential(config).keys() - given.keys()
    if "relora.scale" in given:
        counts -= {"relora.alpha"}  # it follows
    for group in [group for group in ("model", "method", "relora") if group in given]:
        values = values_of(group, given[group])
        keys = [key for key in values if key in counts and get(config, key) != values[key]]
        keys = [key for key in keys if not is_common(group, key)]
        if keys:
            now = ", ".join(f"{key}={text_of(get(config, key))}" for key in keys)
            own = " ".join(f"{key}={text_of(values[key])}" for key in keys)
            yield (
                f"{group}={given[group]} has {now} by experiment={config.experiment}: "
                f"{own} is its own"
            )


def _off(key: str, config: RunConfig) -> str | None:
    """What leaves a knob of an eval without effect: the eval does not run."""
    name = key.split(".")[1] if key.startswith("eval.") else ""
    if name not in EVALS or key == f"eval.{name}.enabled":
        return None
    off = left_out(name, config)
    return off and f"with {off}"


def scales(configs: Iterable[RunConfig]) -> list[str]:
    """A notice for each alpha at which several ranks are compared: their scales differ, too."""
    ranks: dict[float, set[int]] = {}
    for config in configs:
        relora = config.relora
        if config.method in ADAPTERS and relora.r and relora.scaling == "standard":
            ranks.setdefault(relora.alpha, set()).add(relora.r)
    lines = []
    for alpha, compared in ranks.items():
        if len(compared) > 1:
            some = ", ".join(f"{alpha / r:.3g} at r={r}" for r in sorted(compared)[:4])
            more = ", ..." if len(compared) > 4 else ""
            lines.append(
                f"relora.r varies at relora.alpha={alpha:g}, and with it the scale alpha / r "
                f"({some}{more}): relora.scale={alpha / min(compared):g} keeps it the same"
            )
    return lines


def fixed_order(configs: Iterable[RunConfig], *, seeds: int = 1) -> list[str]:
    """A notice for each kind of data whose order does not depend on the seed."""
    seeds_of: dict[str, set[int]] = {}
    for config in configs:
        data = config.data
        if data.kind == "pretokenized" or (data.kind == "text" and not data.shuffle_rows):
            seeds_of.setdefault(data.kind, set()).add(config.seed)
    return [
        f"seeds do not change the order of the data (data={kind}"
        + (", data.shuffle_rows=false" if kind == "text" else "")
        + "): intervals over them speak of weights, dropout and restarts alone"
        for kind, different in seeds_of.items()
        if max(len(different), seeds) > 1
    ]
