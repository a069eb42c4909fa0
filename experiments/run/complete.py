"""Configs completed with what data and evals say: vocabulary and fingerprints; and notes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from experiments import environment
from experiments.disk.output_dir import cache_dir, refuse_file
from experiments.tracking import store
from relora_core import data, shell
from relora_core.config import EVALS, ConfigError, RunConfig, validate
from relora_core.data.base import DataInfo
from relora_core.redraws import notices


def complete(config: RunConfig, *, notes: list[str] | None = None) -> RunConfig:
    """The config with vocabulary and fingerprints filled in, and validated.

    Reads footers of data, tokenizers and files of evals; writes nothing. Notes on data and settings
    are appended to `notes`, once each.
    """
    return complete_all([config], notes=notes)[0]


def complete_all(
    configs: Sequence[RunConfig], *, notes: list[str] | None = None
) -> list[RunConfig]:
    """`complete` of each; data and evals that several share are inspected once."""
    from relora_core import evals  # numpy, which `--help` and `status` do without

    for config in configs:
        if config.output_dir.startswith("~"):  # no shell expanded it: it would be a folder here
            home = os.path.expanduser(config.output_dir)
            near = f"; nearest valid: {home}" if home != config.output_dir else ""
            raise ConfigError(
                f"output_dir must be a path from the root, or from here, got "
                f"{config.output_dir!r}{near}"
            )
    _check_used(configs)
    configs = [store.fill_from_environment(config, notes=notes) for config in configs]
    for config in configs:
        validate(config)
        shell.check_options(config, gpu=False)
    for output_dir in dict.fromkeys(config.output_dir for config in configs):
        refuse_file(output_dir)
    inspected: dict[str, DataInfo] = {}
    prints: dict[str, dict[str, str | None]] = {}
    filled = []
    for config in configs:
        key = repr((config.data, config.output_dir))
        if key not in inspected:
            inspected[key] = data.inspect(config.data, cache_dir=cache_dir(config.output_dir))
        if notes is not None:
            new = [*_data_notes(config, inspected[key]), *notices(config)]
            notes += [n for n in new if n not in notes]
        config = _with_data(config, inspected[key])
        key = repr((config.data, config.eval, config.model.vocab_size, config.model.max_seq_len))
        if key not in prints:
            prints[key] = evals.inspect(config)
            if notes is not None:
                notes += [n for n in evals.notes(config) if n not in notes]
        config = _with_evals(config, prints[key])
        validate(config)
        filled.append(config)
    if notes is not None:
        notes += environment.notes()
    return filled


def _check_used(configs: Sequence[RunConfig]) -> None:
    """ConfigError where data are named that no run would read: all would learn the grammar."""
    for key in ("path", "tokenizer"):
        values = [getattr(config.data, key) for config in configs if config.data.kind == "grammar"]
        if len(values) == len(configs) and any(values):
            raise ConfigError(
                f"data.{key} must be left out with data=grammar, which reads no files, got "
                f"{next(filter(None, values))!r}; nearest valid: data=text or data=pretokenized"
            )


def _data_notes(config: RunConfig, info: DataInfo) -> list[str]:
    """Notes that name the data set, one line each: there may be several."""
    notes = [note if str(config.data.path) in note else f"data: {note}" for note in info.notes]
    return notes + _passes(config, info.rows)


def _passes(config: RunConfig, rows: int | None) -> list[str]:
    read = config.train.steps * config.train.batch_size
    if not rows or read <= rows:
        return []
    passes = f"{read / rows:.3g} passes over the {rows:,} sequences of data.path"
    return [f"data: {read:,} sequences are trained on: {passes}={config.data.path}"]


def prepared_notes(config: RunConfig) -> list[str]:
    """Notes on a large text, which need its tokens."""
    rows = data.prepared_rows(config.data, cache_dir=cache_dir(config.output_dir))
    return _passes(config, rows)


def _with_data(config: RunConfig, info: DataInfo) -> RunConfig:
    vocabulary = config.model.vocab_size or info.vocab_size
    if vocabulary < info.vocab_size:
        raise ConfigError(
            f"model.vocab_size must be >= {info.vocab_size} (the ids of data={config.data.kind}), "
            f"got {vocabulary}; nearest valid: {info.vocab_size}"
        )
    return replace(
        config,
        model=replace(config.model, vocab_size=vocabulary),
        data=replace(config.data, fingerprint=info.fingerprint),
    )


def _with_evals(config: RunConfig, prints: dict[str, str | None]) -> RunConfig:
    sections = {
        name: replace(getattr(config.eval, name), fingerprint=prints.get(name)) for name in EVALS
    }
    return replace(config, eval=replace(config.eval, **sections))
