"""Paths and addresses of a frozen config: absolute, so that they are valid from any folder.

A frozen config is config.json of a run, a cell of plan.json, a base of study.json. `output_dir` is
always where the file lies, so a folder may be moved. Earlier versions stored the rest
as typed: such a path is looked for in the folder of the command (if `output_dir` shows which that
was), then the current one, and stays as it is if neither has it. Not for: opening files.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.addresses import located, relative_database, rooted
from relora_core.config import EVALS, RunConfig
from relora_core.data.places import hub_name


def absolute(config: RunConfig) -> RunConfig:
    """`config` to be frozen: nothing in it depends on the current folder."""
    here = [Path.cwd()]
    config = replace(config, output_dir=str(rooted(Path(config.output_dir))))
    return _changed(config, path=absolute_path, uri=lambda uri: located(uri, here, new=True))


def read(config: RunConfig, *, output_dir: Path | None) -> RunConfig:
    """A frozen config stored in `output_dir`; None stands for the folder that the config names."""
    typed, folder = config.output_dir, output_dir or Path(config.output_dir)
    bases = typed_in(typed, folder)
    config = replace(config, output_dir=str(rooted(folder)))
    return _changed(
        config, path=lambda path: _there(path, bases), uri=lambda uri: located(uri, bases)
    )


def from_here(config: RunConfig) -> RunConfig:
    """A frozen config with paths below the current folder made relative, as one would type them."""
    here = Path.cwd()
    return _changed(config, path=lambda path: path.removeprefix(f"{here}/"), uri=str)


def typed_in(typed: str, folder: Path) -> list[Path]:
    """Where relative paths of a file in `folder` may start: when written, that was `typed`."""
    folder, parts, bases = rooted(folder), Path(typed).parts, [Path.cwd()]
    if not Path(typed).is_absolute() and folder.parts[len(folder.parts) - len(parts) :] == parts:
        bases.insert(0, Path(*folder.parts[: len(folder.parts) - len(parts)]))
    return bases


def absolute_path(path: str) -> str:
    """A local path, or glob, from the root; a name on the hub as it is."""
    place = Path(path).expanduser()
    if place.is_absolute():
        return str(place)
    if place.exists():
        return str(rooted(place))
    if hub_name(path):
        return path
    return _under(Path.cwd(), place)


def _there(path: str, bases: Sequence[Path]) -> str:
    """`path` in the first of `bases` that has it; as it is where none has."""
    place = Path(path).expanduser()
    if place.is_absolute():
        return str(place)
    for base in bases:
        if (base / place).exists():
            return str(rooted(base / place))
        if glob.has_magic(path) and next(glob.iglob(_under(base, place), recursive=True), None):
            return _under(base, place)
    return path


def _under(base: Path, place: Path) -> str:
    """Join the two; glob characters count in `place`, and are escaped in `base`."""
    pattern = glob.has_magic(str(place))
    return str(Path(glob.escape(str(base))) / place if pattern else rooted(base / place))


def _changed(config: RunConfig, *, path: Any, uri: Any) -> RunConfig:
    """Each path, tokenizer and address passed through `path` and `uri`; None stays None."""
    sections = {name: _mapped(getattr(config.eval, name), path) for name in EVALS}
    if any(sections[name] is not getattr(config.eval, name) for name in EVALS):
        config = replace(config, eval=replace(config.eval, **sections))
    config = replace(config, data=_mapped(config.data, path))
    if relative_database(config.tracking.uri):
        config = replace(config, tracking=replace(config.tracking, uri=uri(config.tracking.uri)))
    return config


def _mapped(section: Any, path: Any) -> Any:
    values = {key: getattr(section, key, None) for key in ("path", "tokenizer")}
    changed = {k: new for k, old in values.items() if old and (new := path(old)) != old}
    return replace(section, **changed) if changed else section
