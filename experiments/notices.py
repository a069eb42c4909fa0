"""What a plan should say of runs that are to be compared with each other. Reads configs alone.

Not for: what one config may not do as expected (`relora_core/schedule.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

from relora_core.config import ADAPTERS, RunConfig


def across(configs: Iterable[RunConfig], *, seeds: int = 1) -> list[str]:
    """One line each; `seeds` is how many each of the configs is run with."""
    configs = list(configs)
    return [*scales(configs), *fixed_order(configs, seeds=seeds)]


def scales(configs: Iterable[RunConfig]) -> list[str]:
    """Ranks that are compared at one alpha differ in their scale, too."""
    ranks: dict[float, set[int]] = {}
    for config in configs:
        relora = config.relora
        if config.method in ADAPTERS and relora.r and relora.scaling == "standard":
            ranks.setdefault(relora.alpha, set()).add(relora.r)
    lines = []
    for alpha, of in ranks.items():
        if len(of) > 1:
            some = ", ".join(f"{alpha / r:.3g} at r={r}" for r in sorted(of)[:4])
            more = ", ..." if len(of) > 4 else ""
            lines.append(
                f"relora.r varies at relora.alpha={alpha:g}, and with it the scale alpha / r "
                f"({some}{more}): relora.scale={alpha / min(of):g} keeps it the same"
            )
    return lines


def fixed_order(configs: Iterable[RunConfig], *, seeds: int = 1) -> list[str]:
    """Seeds that leave the order of the data as it is do not measure its effect."""
    seen: dict[str, set[int]] = {}
    for config in configs:
        data = config.data
        if data.kind == "pretokenized" or (data.kind == "text" and not data.shuffle_rows):
            seen.setdefault(data.kind, set()).add(config.seed)
    return [
        f"seeds do not change the order of the data (data={kind}"
        + (", data.shuffle_rows=false" if kind == "text" else "")
        + "): intervals over them speak of weights, dropout and restarts alone"
        for kind, of in seen.items()
        if max(len(of), seeds) > 1
    ]
