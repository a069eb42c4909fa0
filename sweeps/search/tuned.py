"""`sweep.from_search=NAME`: a sweep takes the best settings of each arm of a search.

Not for: what the sweep notes of that (`sweeps/planning/provenance.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.disk.output_dir import plan_folder, study_folder
from relora_core.config import ConfigError, nearest
from sweeps.planning.provenance import Tuned
from sweeps.search import response
from sweeps.search.arms import has_arms
from sweeps.search.response import Arm
from sweeps.search.trial import config_at

KEY = "sweep.from_search"


def read_tuned(output_dir: Path | str, search: str, arms: Mapping[str, str]) -> dict[str, Tuned]:
    """Arm of the sweep -> what it takes; `arms` is arm of the sweep -> arm of the search.

    ConfigError if the search lacks one of them, has not finished one, has no best for one, or has
    not tried all as often.
    """
    folder = study_folder(output_dir, name=search)
    if not has_arms(folder):
        files = plan_folder(output_dir, name="").glob("*/study/arms.json")
        names = sorted(path.parents[1].name for path in files)
        some = ", ".join(names[:8]) or "none yet"
        raise ConfigError(
            f"{KEY} must be a search with arms in {output_dir} ({some}), got {search!r}."
            f"{nearest(search, names)}"
        )
    begun = {arm.name: arm for arm in response.read(folder)}
    wanted = list(dict.fromkeys(arms.values()))
    if missing := [arm for arm in wanted if arm not in begun]:
        raise ConfigError(
            f"{KEY} must be a search of all arms, but {search} has no {', '.join(missing)} (it has "
            f"{', '.join(begun)}); a line in its search.arms and its own command add one"
        )
    _check_finished(search, [begun[arm] for arm in wanted])
    return {own: _tuned(search, begun[arm], borrowed=own != arm) for own, arm in arms.items()}


def _check_finished(search: str, arms: Sequence[Arm]) -> None:
    unfinished = [f"{arm.name} {arm.done} of {arm.n_trials}" for arm in arms if not arm.finished]
    if unfinished:
        raise ConfigError(
            f"{KEY} must be a finished search, but {search} has trials left "
            f"({', '.join(unfinished)}); its own command goes on with it"
        )
    if len({arm.done for arm in arms}) > 1:
        counts = ", ".join(f"{arm.name} {arm.done}" for arm in arms)
        raise ConfigError(
            f"{KEY} must be a search that has tuned all arms alike, but trials of {search} are "
            f"{counts}; one search.n_trials for all arms goes on with those that have fewer"
        )
    if failed := [arm.name for arm in arms if arm.best is None]:
        raise ConfigError(
            f"{KEY} must be a search with a best for each arm, but {search} has none for "
            f"{', '.join(failed)}"
        )


def _tuned(search: str, arm: Arm, *, borrowed: bool) -> Tuned:
    best, metric = arm.best, arm.results.goals[0].metric
    assert best is not None  # _check_finished
    return Tuned(
        search=search,
        arm=arm.name,
        trial=best.number,
        trials=arm.done,
        values=dict(best.params),
        metric=metric,
        value=best.values[metric],
        seeds=arm.spec.config.seeds,
        edges=arm.edges,
        searched=list(best.params),
        config=config_at(arm.spec, best.params),
        borrowed=borrowed,
        codes=arm.results.codes,
    )
