"""Frozen configs (config.json, cells of plan.json, bases of study.json): absolute paths.

`output_dir` is always the folder that the file is found in, so folders may be moved. Earlier
versions stored other paths as they were typed: `read` looks for those. Not for: opening files.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.addresses import located, relative_database, rooted
from relora_core.config import EVALS, RunConfig
from relora_core.data.places import expand, hub_name


def absolute(config: RunConfig) -> RunConfig:
    """`config` with paths and addresses that do not depend on the current folder."""
    here = [Path.cwd()]
    config = replace(config, output_dir=str(rooted(Path(config.output_dir))))
    return _changed(config, path=absolute_path, uri=lambda uri: located(uri, here, new=True))


def read(config: RunConfig, *, output_dir: Path | None) -> RunConfig:
    """A frozen config as stored in `output_dir`; None: in the folder that it names itself.

    A relative path of an earlier version is looked for in the folder that the command was typed in,
    if that is known, then in the current folder. It stays as it is if neither has it.
    """
    typed, folder = config.output_dir, output_dir or Path(config.output_dir)
    bases = typed_in(typed, folder)
    config = replace(config, output_dir=str(rooted(folder)))
    return _changed(
        config, path=lambda path: _there(path, bases), uri=lambda uri: located(uri, bases)
    )


def from_here(config: RunConfig) -> RunConfig:
    """A frozen config with relative paths where they are below the current folder."""
    here = Path.cwd()
    return _changed(config, path=lambda path: path.removeprefix(f"{here}/"), uri=str)


def typed_in(typed: str, folder: Path) -> list[Path]:
    """Folders that relative paths of a file in `folder` may start from.

    `typed` is the output folder as the command had it: `folder` without it is the folder that the
    command was typed in.
    """
    folder, parts, bases = rooted(folder), Path(typed).parts, [Path.cwd()]
    if not Path(typed).is_absolute() and folder.parts[len(folder.parts) - len(parts) :] == parts:
        bases.insert(0, Path(*folder.parts[: len(folder.parts) - len(parts)]))
    return bases


def absolute_path(path: str) -> str:
    """A local path, or glob, made absolute; a name on the hub as it is."""
    place = expand(path)
    if place.is_absolute():
        return str(place)
    if place.exists():
        return str(rooted(place))
    if hub_name(path):
        return path
    return _under(Path.cwd(), place)


def _there(path: str, bases: Sequence[Path]) -> str:
    """`path` below the first of `bases` that has it; unchanged if none has."""
    place = expand(path)
    if place.is_absolute():
        return str(place)
    for base in bases:
        if (base / place).exists():
            return str(rooted(base / place))
        if glob.has_magic(path) and next(glob.iglob(_under(base, place), recursive=True), None):
            return _under(base, place)
    return path


def _under(base: Path, place: Path) -> str:
    """Join the two; if `place` is a glob, characters of `base` are escaped."""
    pattern = glob.has_magic(str(place))
    return str(Path(glob.escape(str(base))) / place if pattern else rooted(base / place))


def _changed(config: RunConfig, *, path: Any, uri: Any) -> RunConfig:
    """The config with `path` applied to each path and tokenizer, `uri` to a relative address."""
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
