"""`python -m experiments evaluate MODEL`: a model that was not trained here, as a run beside ours.

Its folder is a run's, with the same record: dynamics of the weights, evals and their tables at step
0. Not for: loading and measuring it (`relora_core/foreign.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from experiments import environment, schema, typos
from experiments.disk import frozen
from experiments.disk.output_dir import check_output_dir, runs_folder
from experiments.disk.run_dir import RunDir
from experiments.disk.states import State
from experiments.identity import run_id
from experiments.run.single import carry_out, print_result
from experiments.tracking import store
from relora_core import shell
from relora_core.config import (
    EVALS,
    EVALUATED,
    ConfigError,
    DataConfig,
    DynamicsConfig,
    EvalConfig,
    EvaluatedConfig,
    ForeignConfig,
    RunConfig,
    TrainConfig,
    nearest,
    validate,
)
from relora_core.data.places import expand

if TYPE_CHECKING:
    from relora_core.foreign import Loaded

SETTINGS = ("eval", "tracking", "runtime", "dynamics.kinds", "output_dir")
"""Keys, and sections, that say something of a model which is not trained."""
LONGEST = 2048
"""Paloma's guideline for the longest window, as of our own models."""


@dataclass(kw_only=True, slots=True)
class Wanted:
    """What the command line asks for."""

    source: str
    name: str | None = None
    """None: the last part of the source."""
    overrides: Sequence[str] = ()
    revision: str | None = None
    remote_code: bool = False
    max_length: int | None = None
    """Tokens of the longest window; None: the model's own, at most LONGEST."""
    config_dir: str | None = None


def evaluate(wanted: Wanted) -> tuple[int, RunDir]:
    """Evaluate the model, unless a finished run has; the exit code, and the run."""
    shell.require_one_process("an evaluation")
    name = _name(wanted)
    composed = _composed(wanted)
    store.check(composed)
    from relora_core import foreign  # torch

    loaded = foreign.load(
        wanted.source, name=name, revision=wanted.revision, remote_code=wanted.remote_code
    )
    notes: list[str] = []
    config = describe(composed, loaded, wanted=wanted, notes=notes)
    run_dir, typed = RunDir(runs_folder(config.output_dir) / run_id(config)), config.output_dir
    environment.check_gpu(config)
    if ended := run_dir.ended():
        print(f"{run_dir.run_id} is {ended} already: nothing to do")
        print_result(run_dir)
        return 0 if ended is State.FINISHED else 1, run_dir
    check_output_dir(config.output_dir)
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    config = frozen.absolute(config)
    assert isinstance(config, EvaluatedConfig)
    work = functools.partial(foreign.evaluate, config, loaded=loaded)
    return carry_out(config, run_dir, typed=typed, work=work), run_dir


def _name(wanted: Wanted) -> str:
    last = expand(wanted.source).resolve().name
    name = last if wanted.name is None else wanted.name
    if wanted.name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,39}", name):
        near = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")[:40] or "model"
        raise ConfigError(
            "--as must be a name of at most 40 letters, digits, '.', '_' and '-', got "
            f"{name!r}; nearest valid: {near}"
        )
    return name


def _composed(wanted: Wanted) -> RunConfig:
    """The settings that the command line gives; ConfigError for one of training."""
    every = typos.schema_keys()
    known = [key for key in every if key.startswith(tuple(f"{s}." for s in SETTINGS))]
    known += [key for key in every if key in SETTINGS]
    for text in wanted.overrides:
        key = text.lstrip("+").partition("=")[0]
        if key not in known and key not in ("eval", "tracking"):
            raise ConfigError(
                f"{key} must be a key of {', '.join(SETTINGS)} ({text}), since MODEL is not "
                f"trained.{nearest(key, known)}"
            )
    return schema.compose([*schema.NO_EXPERIMENT, *wanted.overrides], config_dir=wanted.config_dir)


def describe(
    composed: RunConfig, loaded: Loaded, *, wanted: Wanted, notes: list[str]
) -> EvaluatedConfig:
    """The config of the run; ConfigError if the evals' files cannot be read, or do not fit.

    Evals without a path are off: the grammar's texts are for models of the grammar.
    """
    from relora_core import evals  # numpy

    model, tokenizer = loaded.model, loaded.tokenizer
    sections = {name: getattr(composed.eval, name) for name in EVALS}
    sections = {
        name: replace(own, enabled=own.enabled and own.path is not None, every_steps=None)
        for name, own in sections.items()
    }
    config = EvaluatedConfig(
        experiment=EVALUATED,
        output_dir=composed.output_dir,
        method=EVALUATED,
        model=model.config,
        train=TrainConfig(steps=0, batch_size=1),
        data=DataConfig(kind=EVALUATED, seq_len=_length(wanted, model.max_seq_len)),
        eval=EvalConfig(**sections),
        dynamics=DynamicsConfig(every_steps=1, kinds=composed.dynamics.kinds),
        tracking=composed.tracking,
        runtime=composed.runtime,
        foreign=ForeignConfig(
            source=_absolute(wanted.source),
            revision=wanted.revision,
            remote_code=wanted.remote_code,
            architecture=loaded.architecture,
            parameters=loaded.parameters,
            start_id=tokenizer.start_id,
            fingerprint=loaded.fingerprint,
        ),
    )
    validate(replace(composed, eval=config.eval))  # bounds of what was typed
    digests = evals.inspect(config, tokenizer=tokenizer)
    for name in () if model.split else digests:
        precision = getattr(getattr(config.eval, name), "precision", "fp32")
        if precision != "fp32":
            raise ConfigError(
                f"eval.{name}.precision must be fp32 for {loaded.architecture} (its logits are not "
                f"its last states times a head, which could be rounded), got {precision!r}"
            )
    evals.prepare(config, tokenizer)
    sections = {name: replace(sections[name], fingerprint=digests.get(name)) for name in EVALS}
    off = [name for name in EVALS if name not in digests]
    if off:
        paths = " and ".join(f"eval.{name}.path" for name in off)
        notes.append(f"{', '.join(off)} is off without a path: {paths}")
    notes += evals.notes(config)
    notes.append(
        "perplexity is per token of the model's own tokenizer: among models of different "
        "tokenizers bits_per_byte compares"
    )
    return dataclasses.replace(config, eval=EvalConfig(**sections))


def _length(wanted: Wanted, longest: int) -> int:
    asked = wanted.max_length
    if asked is not None and not 1 <= asked <= longest:
        raise ConfigError(
            f"--max-length must be in [1, {longest}] (MODEL's longest input), got {asked}; nearest "
            f"valid: {min(max(asked, 1), longest)}"
        )
    return asked or min(longest, LONGEST)


def _absolute(source: str) -> str:
    folder = expand(source)
    return str(folder.resolve()) if folder.is_dir() else source
