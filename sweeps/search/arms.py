"""The arms of a search: settings that are each tuned alone, with the same number of trials.

    output_dir/sweeps/<name>/study/arms.json       their names, in order
                                  /arms/<arm>/     the study of an arm (`study.py`)

A search without arms has its only study in sweeps/<name>/study. Not for: the settings of an arm
(the bases of its study), nor how arms compare (`response.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments import json_files
from experiments.disk.output_dir import place_of_study, study_folder
from relora_core import atomic, shared
from relora_core.config import ConfigError
from sweeps.search.study import Study

FILE = "arms.json"


def has_arms(folder: Path) -> bool:
    """Whether the search in `folder` (its `study`) has arms."""
    return (folder / FILE).exists()


def arm_folders(folder: Path | str) -> dict[str | None, Path]:
    """Arm -> folder of its study, of the arms that have begun; {None: folder} without arms."""
    folder = Path(folder)
    if not has_arms(folder):
        return {None: folder}
    output_dir, name, _ = place_of_study(folder)
    places = {arm: study_folder(output_dir, name=name, arm=arm) for arm in _names(folder)}
    return {arm: place for arm, place in places.items() if (place / "study.json").exists()}


def open_studies(folder: Path | str) -> list[Study]:
    """The study of each arm that has begun; without arms the only one."""
    return [Study.open(place) for place in arm_folders(folder).values()]


def write_arms(folder: Path, names: Sequence[str]) -> None:
    """Write arms.json; arms of earlier commands stay in it."""
    shared.make_folder(folder)
    before = _names(folder) if has_arms(folder) else []
    atomic.write_json(folder / FILE, {"arms": list(dict.fromkeys([*before, *names]))})


def check_begun(folder: Path, *, arms: bool) -> None:
    """ConfigError if a search that was begun without arms now has some, or vice versa."""
    name = place_of_study(folder).name
    if arms and (folder / "study.json").exists():
        raise ConfigError(
            f"search.arms must be empty in search {name}, which was begun without; another "
            "sweep.name begins a new one"
        )
    if not arms and has_arms(folder):
        raise ConfigError(
            f"search.arms must not be empty in search {name}, which was begun with "
            f"{', '.join(_names(folder))}; another sweep.name begins a new one"
        )


def _names(folder: Path) -> list[str]:
    try:
        names = json_files.parse((folder / FILE).read_bytes())["arms"]
        if not all(json_files.names_folder(name) for name in names):
            raise ValueError("it names no folders")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / FILE} must be arms as this version writes them ({error!r}); the search's "
            "own command writes it again where it is moved away"
        ) from None
    return names
