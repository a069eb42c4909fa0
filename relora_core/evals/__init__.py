"""The registry of evals, and those of a run. A new one: docs/recipes.md.

Loading and inspection import no torch. Not for: how often an eval runs (`measures.py`), nor for the
definition of any one measure (`paloma.py`, `blimp.py`).

    base.py     what an eval is, and what evals share
    scoring.py  log-probabilities of sequences
    tree.py     sequences that begin alike, computed once
    paloma.py   perplexity per source and domain
    blimp.py    minimal pairs
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from relora_core.config import EVALS, ConfigError, RunConfig, runs_eval
from relora_core.data import load_tokenizer
from relora_core.data.base import DataError, Tokenizer
from relora_core.evals import blimp, paloma
from relora_core.evals.base import EvalResult, EvalSpec, Item, LanguageModel, Work

SPECS = (
    paloma.SPEC,
    blimp.SPEC,
)
REGISTRY: dict[str, EvalSpec] = {spec.name: spec for spec in SPECS}
"""By the name of its section in `config.EvalConfig`."""
assert set(REGISTRY) == set(EVALS), f"evals {list(REGISTRY)}, sections of EvalConfig {EVALS}"


@dataclass(kw_only=True)
class Eval:
    """One eval of a run. Texts are loaded and tokenised at the first `run` and kept."""

    name: str
    every_steps: int | None
    """Cadence in optimizer steps; None: only at the end."""
    build: Callable[[], Callable[..., EvalResult]]
    """Loads and tokenises; gives the function of (model, **Work)."""

    def run(self, model: LanguageModel, **work: Unpack[Work]) -> EvalResult:
        """Evaluate `model` as it is: no RNG is used, and train/eval modes are put back."""
        return self._evaluate(model, **work)

    @functools.cached_property
    def _evaluate(self) -> Callable[..., EvalResult]:
        return self.build()


def inspect(config: RunConfig, *, tokenizer: Tokenizer | None = None) -> dict[str, str | None]:
    """Eval -> digest of its texts, for the evals that this run has; `tokenizer` in place of
    data.tokenizer.

    None stands for the grammar's own texts. Every record is read; the first bad one raises
    ConfigError, one line with file and line number.
    """
    digests = {}
    for name in list_evals(config):
        section = getattr(config.eval, name)
        digests[name] = texts_digest(config, name)
        if section.path is not None and config.data.kind == "grammar":
            _check_words(REGISTRY[name].load(section), key=f"eval.{name}.path", path=section.path)
        elif config.data.kind != "grammar":
            _check_tokens(config, name, tokenizer=tokenizer)
    return digests


def notes(config: RunConfig) -> list[str]:
    """One line for each kind of file in the evals' folders that no eval reads."""
    sections = {name: getattr(config.eval, name) for name in list_evals(config)}
    return [
        f"eval.{name}: {note}"
        for name, section in sections.items()
        if section.path is not None
        for note in REGISTRY[name].notes(section)
    ]


def _check_tokens(config: RunConfig, name: str, *, tokenizer: Tokenizer | None) -> None:
    """ConfigError if the eval cannot score the texts' tokens: raised here, not after hours of
    training. A tokenizer that knows every character needs no pass over all of them."""
    tokenizer = tokenizer or load_tokenizer(config.data)
    if tokenizer is None:
        raise _no_tokenizer(name)
    section = getattr(config.eval, name)
    knows_all = getattr(tokenizer, "unknown", "error") == "known"
    try:
        REGISTRY[name].check(section, tokenizer=tokenizer, knows_all=knows_all, model=config.model)
    except DataError as error:
        raise ConfigError(f"eval.{name}.path={section.path}: {error}") from None


def local_files(config: RunConfig) -> dict[str, list[Path]]:
    """Eval -> files of its texts, for the evals that this run has; none for the grammar's."""
    sections = {name: getattr(config.eval, name) for name in list_evals(config)}
    return {
        name: REGISTRY[name].local_files(section) if section.path is not None else []
        for name, section in sections.items()
    }


def texts_digest(config: RunConfig, name: str) -> str | None:
    """Of the texts of one eval as they are now; None for the grammar's own."""
    section = getattr(config.eval, name)
    digest = REGISTRY[name].inspect(section)
    assert digest or section.path is None, f"eval.{name} gives its texts no digest"
    return digest


def prepare(config: RunConfig, tokenizer: Tokenizer | None) -> list[Eval]:
    """The run's evals, nothing loaded yet. Raises ConfigError where the tokenizer does not fit."""
    evals = []
    for name in list_evals(config):
        if tokenizer is None:
            raise _no_tokenizer(name)
        _check_vocabulary(config, tokenizer)
        evals.append(
            Eval(
                name=name,
                every_steps=getattr(config.eval, name).every_steps,
                build=functools.partial(REGISTRY[name].build, config, tokenizer),
            )
        )
    return evals


def list_evals(config: RunConfig) -> list[str]:
    """The evals that this run has."""
    return [name for name in EVALS if runs_eval(config, name)]


def _no_tokenizer(name: str) -> ConfigError:
    return ConfigError(
        f"data.tokenizer must name a tokenizer, since eval.{name} scores text, got nothing; or set "
        f"eval.{name}.enabled=false"
    )


def _check_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> None:
    needed = max(tokenizer.vocab_size, tokenizer.eos_id + 1)
    if config.model.vocab_size is not None and needed > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size must be >= {needed} (ids of data.tokenizer="
            f"{config.data.tokenizer}), got {config.model.vocab_size}; nearest valid: {needed}"
        )


def _check_words(items: Iterable[Item], *, key: str, path: str) -> None:
    """The grammar's tokenizer knows only its own words; say so before anything is queued."""
    from relora_core.data.grammar import GrammarTokenizer

    tokenizer = GrammarTokenizer()
    for item in items:
        try:
            tokenizer.encode_batch(item.texts())
        except DataError as error:
            raise ConfigError(
                f"{key} must hold words of the grammar for data=grammar, got {path}: {error}"
            ) from None
