"""Checks that a run reads what it was planned with, and stores a copy of its tokenizer.

    OUTPUT_DIR/inputs/<fingerprint>/files.json      how the files looked when they were last read
                                    tokenizer.json  of the data, with the tokenizer_config.json
    RUN_DIR/changes.json            what the user accepted although it has changed

Files are read again only if size, time or inode (`places.read_stamps`) have changed. Not for:
computing fingerprints (`relora_core/data`, `relora_core/evals`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments import json_files
from experiments.disk.output_dir import cache_dir
from experiments.disk.run_dir import RunDir
from relora_core import atomic, shared
from relora_core import data as data_package
from relora_core.config import EVALS, ConfigError, DataConfig, RunConfig
from relora_core.data import HFTokenizer
from relora_core.data.places import Stamp, read_stamps
from relora_core.data.tokenizer import files as tokenizer_files

SETTLED_NS = 2_000_000_000
"""A file that was younger when it was read may have changed since without a newer time."""
FILES = {"looks": list[list[Any]], "read": int, "sample": str | None}
FILES |= {"tokenizer": dict[str, str] | None}
TRAINING = ("retry", "search")
"""Commands that accept changes for training."""
CHANGE = {"key": str, "planned": str, "now": str, "what": str, "by": str, "time": float}


@dataclass(kw_only=True, slots=True)
class Change:
    """Data or texts of an eval that are not those the run was planned with."""

    key: str
    """`data` or `eval.blimp`: the section of the config."""
    planned: str
    """The planned fingerprint, or that of the newest accepted change."""
    now: str
    what: str
    """One line: what differs, where it lies, and how."""


def refusal(changes: Sequence[Change], *, remedy: str) -> ConfigError:
    """An error of one line on all changes; `remedy` says what to do besides undoing them."""
    differences = "; ".join(
        f"{c.what} (fingerprint {c.planned[:12]} -> {_short(c.now, c.planned)})" for c in changes
    )
    return ConfigError(f"{differences}: put back what the run was planned with, or {remedy}")


def _short(now: str, planned: str) -> str:
    """The start of a fingerprint, up to where it differs from the planned one."""
    return now[:12] if now[:12] != planned[:12] else now.replace(planned[:64], planned[:12])[:26]


# accepted changes -------------------------------------------------------------------------------
def accepted(run_dir: RunDir, *, by: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Accepted changes, oldest first; only those accepted `by` commands of these names."""
    return [c for c in accepted_in(run_dir.changes_path) if by is None or c["by"] in by]


def accept(run_dir: RunDir, changes: Sequence[Change], *, by: str) -> None:
    """Record that the user accepted `changes` with this command."""
    accept_in(run_dir.changes_path, changes, by=by)


def accepted_in(path: Path) -> list[dict[str, Any]]:
    """The changes that this file lists."""
    try:
        changes = json_files.read(path)["changes"]
        return [c for c in changes if json_files.has_types(c, CHANGE)]
    except FileNotFoundError:
        return []
    except (json_files.Damaged, KeyError, TypeError) as error:
        raise ConfigError(f"{path} must list changes, got {error}") from None


def accept_in(path: Path, changes: Sequence[Change], *, by: str) -> None:
    """Add `changes` to this file."""
    new = [dataclasses.asdict(c) | {"by": by, "time": time.time()} for c in changes]
    atomic.write_json(path, {"changes": [*accepted_in(path), *new]})


def fingerprints(changes: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Key -> fingerprint of the newest of these changes."""
    return {c["key"]: c["now"] for c in changes}


def describe_accepted(run_dir: RunDir) -> str | None:
    """One line on changes that were accepted for training; None if there are none."""
    keys = list(dict.fromkeys(c["key"] for c in accepted(run_dir, by=TRAINING)))
    return f"goes on with other {', '.join(keys)} than planned (--accept-changed)" if keys else None


def with_accepted(run_dir: RunDir, config: RunConfig) -> RunConfig:
    """`config` with the fingerprints of the changes accepted for training."""
    return with_fingerprints(config, fingerprints(accepted(run_dir, by=TRAINING)))


def undo(config: RunConfig, newest_first: Iterable[Mapping[str, Any]]) -> RunConfig:
    """`config` with the planned fingerprints in place of accepted ones, for these changes."""
    for change in newest_first:
        name = change["key"].removeprefix("eval.")
        section = config.data if name == "data" else getattr(config.eval, name)
        if section.fingerprint == change["now"].partition(".")[0]:  # without the sample
            planned = change["planned"].partition(".")[0]
            config = with_fingerprints(config, {change["key"]: planned})
    return config


def with_fingerprints(config: RunConfig, prints: dict[str, str]) -> RunConfig:
    """`config` with these fingerprints, by key."""
    data = replace(config.data, fingerprint=prints.get("data", config.data.fingerprint))
    sections = {}
    for name in EVALS:
        own = getattr(config.eval, name)
        sections[name] = replace(
            own, fingerprint=prints.get(f"eval.{name}", getattr(own, "fingerprint", None))
        )
    return replace(config, data=data, eval=replace(config.eval, **sections))


# checks -------------------------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class Checked:
    """A run's config with the tokenizer to use, and what is not as planned."""

    config: RunConfig
    """Its data.tokenizer is the stored copy, if there is one."""
    changes: list[Change]


def check(
    config: RunConfig, *, output_dir: Path, only: Iterable[str] = ("data", *EVALS)
) -> Checked:
    """Compare what the run reads with its fingerprints; use the stored copy of its tokenizer.

    `only` names what is compared: `tokenizer`, `data`, evals. A config without fingerprints was
    never planned and has no changes. ConfigError if something cannot be read. Of large data only a
    sample is read (`parquet.sample`); a data set of the hub is compared by commit.
    """
    from relora_core import evals  # numpy, which a command need not load to start

    checked, changes = config, []
    if config.data.fingerprint:
        copy = stored_tokenizer(config.data, output_dir=output_dir)
        if copy is not None:
            checked = replace(config, data=replace(config.data, tokenizer=str(copy)))
        if "data" in only or ("tokenizer" in only and copy is None and config.data.tokenizer):
            changes += _data(config, output_dir=output_dir, copy=copy)
    names = [name for name in evals.list_evals(config) if name in only]
    for name in names:
        changes += _eval(config, name, output_dir=output_dir)
    return Checked(config=checked, changes=changes)


def open_for_training(run_dir: RunDir, config: RunConfig) -> RunConfig:
    """`config` with the tokenizer to use; ConfigError if something has changed since the plan.

    Stores a copy of the tokenizer if there is none.
    """
    checked = check(with_accepted(run_dir, config), output_dir=run_dir.output_dir)
    if checked.changes:
        raise refusal(
            checked.changes,
            remedy=f"`python -m sweeps retry {run_dir.run_id} --accept-changed` goes on with what "
            "is there now, and writes it down",
        )
    return checked.config


def open_for_export(run_dir: RunDir, *, tokenizer: str | None) -> tuple[Checked, list[str]]:
    """The run with its own tokenizer, or with `tokenizer`, and notes."""
    config, output_dir = with_accepted(run_dir, run_dir.config()), run_dir.output_dir
    if tokenizer is not None:
        return _named(config, tokenizer, output_dir=output_dir)
    try:
        return check(config, output_dir=output_dir, only=("tokenizer",)), []
    except ConfigError as error:
        line = f"{error}; no copy of its tokenizer is stored: --tokenizer PATH names the one it had"
        raise ConfigError(line) from None


def _named(config: RunConfig, tokenizer: str, *, output_dir: Path) -> tuple[Checked, list[str]]:
    """`tokenizer` in place of the run's: compared with the stored copy, else by fingerprint."""
    if config.data.kind == "grammar":
        raise ConfigError(f"--tokenizer must be left out, since data=grammar, got {tokenizer!r}")
    copy = stored_tokenizer(config.data, output_dir=output_dir)
    new = replace(config, data=replace(config.data, tokenizer=tokenizer))
    size = HFTokenizer(tokenizer, eos_id=config.data.eos_id).vocab_size
    if size > (config.model.vocab_size or size):
        raise ConfigError(
            f"--tokenizer must have at most {config.model.vocab_size} ids (model.vocab_size), got "
            f"{size} in {tokenizer!r}"
        )
    planned = str(config.data.fingerprint)
    if config.data.tokenizer is None:
        return Checked(config=new, changes=[]), [
            "the run named no tokenizer: nothing here says whether its ids mean these texts"
        ]
    if copy is not None:
        own = replace(config.data, tokenizer=str(copy))
        planned, now = (
            str(data_package.tokenizer_digest(own)),
            str(data_package.tokenizer_digest(new.data)),
        )
    else:
        try:
            planned, now = planned.partition(".")[0], data_package.fingerprint(new.data)
        except ConfigError as error:
            return Checked(config=new, changes=[]), [f"--tokenizer could not be checked: {error}"]
    what = f"--tokenizer={tokenizer} is not the tokenizer that the run was planned with"
    change = Change(key="tokenizer", planned=planned, now=now, what=what)
    return Checked(config=new, changes=[change] if now != planned else []), []


def _data(config: RunConfig, *, output_dir: Path, copy: Path | None) -> list[Change]:
    """The data's change, if any. If there is none, its files' looks and tokenizer are stored."""
    data = config.data
    planned = str(data.fingerprint)
    fingerprint, _, planned_sample = planned.partition(".")
    stored = _read(output_dir, planned)
    if copy is not None and data_package.is_cached(data, cache_dir=cache_dir(output_dir)):
        return []  # the cached tokens are as planned, and no text is read
    if data.kind == "grammar":
        now = data_package.fingerprint(data)
        what = "the grammar of this version of the code is another"
        return [] if now == planned else [Change(key="data", planned=planned, now=now, what=what)]
    files = data_package.local_files(data)
    seen = read_stamps(file.absolute() for file in files)
    if files and (copy or not data.tokenizer) and _looks_same(stored, seen):
        return []
    now = data_package.fingerprint(data, tokenizer=str(copy) if copy else None)
    sample = data_package.sample(data)
    planned_sample = planned_sample or (stored or {}).get("sample")
    if now == fingerprint and (planned_sample is None or sample == planned_sample):
        digests = (stored or {}).get("tokenizer")
        if data.tokenizer and copy is None:
            digests = _store_tokenizer(data, output_dir=output_dir)
        _write(output_dir, planned, seen=seen, sample=sample, tokenizer=digests)
        return []
    if sample is not None:
        now = f"{now}.{sample}"
    what = f"data.path={data.path} has changed since the run was planned"
    if detail := _difference(stored, seen):
        what += f" ({detail})"
    elif not files:
        what += " (the hub has another commit of it: owner/name@commit names the planned one)"
    elif data.tokenizer and copy is None:
        what = f"data.path={data.path} or data.tokenizer={data.tokenizer} has changed since the "
        what += "run was planned"
    return [Change(key="data", planned=planned, now=now, what=what)]


def _eval(config: RunConfig, name: str, *, output_dir: Path) -> list[Change]:
    from relora_core import evals  # numpy

    section = getattr(config.eval, name)
    planned = section.fingerprint
    if not planned or section.path is None:
        return []
    seen = read_stamps(file.absolute() for file in evals.local_files(config)[name])
    stored = _read(output_dir, planned)
    if _looks_same(stored, seen):
        return []
    now = evals.texts_digest(config, name)
    if now == planned:
        _write(output_dir, planned, seen=seen)
        return []
    what = f"eval.{name}.path={section.path} has changed since the run was planned"
    if detail := _difference(stored, seen):
        what += f" ({detail})"
    return [Change(key=f"eval.{name}", planned=planned, now=str(now), what=what)]


# the tokenizer ------------------------------------------------------------------------------------
def stored_tokenizer(data: DataConfig, *, output_dir: Path) -> Path | None:
    """The folder with the copy of the run's tokenizer; None if there is none, or it is damaged."""
    stored = _read(output_dir, str(data.fingerprint)) if data.fingerprint else None
    digests = (stored or {}).get("tokenizer")
    if not digests or not data.tokenizer:
        return None
    folder = _folder(output_dir, str(data.fingerprint))
    with contextlib.suppress(OSError):
        if all(_sha256(folder / name) == digest for name, digest in digests.items()):
            return folder
    return None


def _store_tokenizer(data: DataConfig, *, output_dir: Path) -> dict[str, str] | None:
    """Copy the tokenizer's files; their digests. None if the output folder cannot be written to."""
    folder = _folder(output_dir, str(data.fingerprint))
    try:
        shared.make_folder(folder)
        main, config = tokenizer_files(str(data.tokenizer))
        sources = {"tokenizer.json": main} | ({"tokenizer_config.json": config} if config else {})
        for name, source in sources.items():
            atomic.write_text(folder / name, source.read_bytes().decode())
        return {name: _sha256(folder / name) for name in sources}
    except OSError:  # another user's folder: the original is compared each time
        return None


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# how files looked ---------------------------------------------------------------------------------
def _folder(output_dir: Path, fingerprint: str) -> Path:
    content, _, sample = fingerprint.partition(".")
    return output_dir / "inputs" / (f"{content[:32]}-{sample[:16]}" if sample else content[:32])


def _read(output_dir: Path, fingerprint: str) -> dict[str, Any] | None:
    """The recorded looks of the files; None if there is no readable record."""
    try:
        stored = json_files.read(_folder(output_dir, fingerprint) / "files.json")
    except (OSError, json_files.Damaged):
        return None
    return stored if json_files.has_types(stored, FILES) else None


def _write(
    output_dir: Path,
    fingerprint: str,
    *,
    seen: Sequence[Stamp],
    sample: str | None = None,
    tokenizer: dict[str, str] | None = None,
) -> None:
    folder = _folder(output_dir, fingerprint)
    content = {"looks": seen, "read": time.time_ns(), "sample": sample, "tokenizer": tokenizer}
    # If this fails the next check reads the files again; nothing else depends on it.
    with contextlib.suppress(OSError):
        shared.make_folder(folder)
        atomic.write_json(folder / "files.json", content)
        for torn in atomic.torn(folder):
            torn.unlink(missing_ok=True)


def _looks_same(stored: dict[str, Any] | None, seen: Sequence[Stamp]) -> bool:
    if stored is None or [list(look) for look in seen] != stored["looks"]:
        return False
    newest = max((max(look[2], look[3]) for look in seen), default=0)
    return newest < stored["read"] - SETTLED_NS


def _difference(stored: dict[str, Any] | None, seen: Sequence[Stamp]) -> str:
    """The files that look different; empty if none was recorded, or if all have moved."""
    before = {look[0]: look for look in (stored or {}).get("looks", [])}
    after = {look[0]: list(look) for look in seen}
    if not before.keys() & after.keys():
        return ""
    lines = [f"{Path(p).name} is missing" for p in before if p not in after]
    lines += [f"{Path(p).name} is new" for p in after if p not in before]
    for path in before.keys() & after.keys():
        was, now = before[path], after[path]
        if was[1] != now[1]:
            lines.append(f"{Path(path).name} had {was[1]:,} bytes, has {now[1]:,}")
        elif was != now:
            lines.append(f"{Path(path).name} was written again")
    return ", ".join(sorted(lines)[:3]) + (f" and {len(lines) - 3} more" if len(lines) > 3 else "")
