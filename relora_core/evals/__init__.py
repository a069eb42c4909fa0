"""Which evals a run has. What they share is in `base.py` and `scoring.py`.

Loading and inspection import no torch. Not for: how often an eval runs (`train.py`), nor for the
definition of any one measure (`paloma.py`, `blimp.py`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from relora_core.config import (
    EVALS,
    GRAMMAR_DOCUMENTS,
    GRAMMAR_PAIRS,
    ConfigError,
    RunConfig,
    runs_eval,
)
from relora_core.data import load_tokenizer
from relora_core.data.base import DataError, Tokenizer
from relora_core.evals.base import EvalResult, Work, encode

if TYPE_CHECKING:
    from relora_core.model import Decoder


@dataclass(kw_only=True)
class Eval:
    """One eval of a run. Texts are loaded and tokenised at the first `run` and kept."""

    name: str
    every_steps: int | None
    """Cadence in optimizer steps; None: only at the end."""
    build: Callable[[], Callable[..., EvalResult]]
    """Loads and tokenises; gives the function of (model, **Work)."""

    def run(self, model: Decoder, **work: Unpack[Work]) -> EvalResult:
        """Evaluate `model` as it is: no RNG is used, and train/eval modes are put back."""
        return self._evaluate(model, **work)

    @functools.cached_property
    def _evaluate(self) -> Callable[..., EvalResult]:
        return self.build()


def inspect(config: RunConfig) -> dict[str, str | None]:
    """Section (`paloma`, `blimp`) -> digest of its texts, for the evals that this run has.

    None stands for the grammar's own texts. Every record is read; the first bad one raises
    ConfigError, one line with file and line number.
    """
    digests = {}
    for name in active(config):
        room, section = _room(name), getattr(config.eval, name)
        digests[name] = texts_digest(config, name)
        if section.path is not None and config.data.kind == "grammar":
            _check_words(room.load(section), key=f"eval.{name}.path", path=section.path)
        elif config.data.kind != "grammar":
            _check_tokens(config, name)
    return digests


def notes(config: RunConfig) -> list[str]:
    """What the evals' folders hold and no eval reads, a line each."""
    sections = {name: getattr(config.eval, name) for name in active(config)}
    return [
        f"eval.{name}: {note}"
        for name, section in sections.items()
        if section.path is not None
        for note in _room(name).notes(section)
    ]


def _check_tokens(config: RunConfig, name: str) -> None:
    """ConfigError where the texts do not become tokens that the eval can score: not after hours of
    training. A tokenizer that knows every character needs no pass over all of them."""
    tokenizer = load_tokenizer(config.data)
    if tokenizer is None:
        raise _no_tokenizer(name)
    section = getattr(config.eval, name)
    knows_all = getattr(tokenizer, "unknown", "error") == "known"
    try:
        _room(name).check(section, tokenizer=tokenizer, knows_all=knows_all, model=config.model)
    except DataError as error:
        raise ConfigError(f"eval.{name}.path={section.path}: {error}") from None


def local_files(config: RunConfig) -> dict[str, list[Path]]:
    """Section -> files of its texts, for the evals that this run has; none for the grammar's."""
    found = {}
    for name in active(config):
        section = getattr(config.eval, name)
        found[name] = _room(name).local_files(section) if section.path is not None else []
    return found


def texts_digest(config: RunConfig, name: str) -> str | None:
    """Of the texts of one eval as they are now; None for the grammar's own."""
    section = getattr(config.eval, name)
    found = _room(name).inspect(section)
    assert found or section.path is None, f"eval.{name} gives its texts no digest"
    return found


def _room(name: str) -> Any:
    """The file of an eval."""
    return importlib.import_module(f"{__name__}.{name}")


def prepare(config: RunConfig, tokenizer: Tokenizer | None) -> list[Eval]:
    """The run's evals, nothing loaded yet. Raises ConfigError where the tokenizer does not fit."""
    evals = []
    for name in active(config):
        if tokenizer is None:
            raise _no_tokenizer(name)
        _check_vocabulary(config, tokenizer)
        evals.append(
            Eval(
                name=name,
                every_steps=getattr(config.eval, name).every_steps,
                build=functools.partial(_BUILDERS[name], config, tokenizer),
            )
        )
    return evals


def active(config: RunConfig) -> list[str]:
    """The evals that this run has."""
    return [name for name in EVALS if runs_eval(config, name)]


def _build_paloma(config: RunConfig, tokenizer: Tokenizer) -> Callable[..., EvalResult]:
    from relora_core.evals import paloma

    section = config.eval.paloma
    if section.path is None:
        count = min(GRAMMAR_DOCUMENTS, section.max_documents or GRAMMAR_DOCUMENTS)
        documents = paloma.grammar_documents(count)
    else:
        documents = paloma.load(section)
    # Positions that training never reached would measure how RoPE extrapolates, not the language.
    max_len = min(config.model.max_seq_len, config.data.seq_len, paloma.MAX_LEN)
    return functools.partial(
        paloma.evaluate,
        documents=documents,
        ids=encode([d.text for d in documents], tokenizer),
        eos_id=tokenizer.eos_id,
        max_len=max_len,
        precision=section.precision,
    )


def _build_blimp(config: RunConfig, tokenizer: Tokenizer) -> Callable[..., EvalResult]:
    from relora_core.evals import blimp

    section = config.eval.blimp
    if section.path is None:
        pairs = blimp.grammar_pairs(min(GRAMMAR_PAIRS, section.max_pairs or GRAMMAR_PAIRS))
    else:
        pairs = blimp.load(section)
    return functools.partial(
        blimp.evaluate,
        pairs=pairs,
        windows=blimp.windows(pairs, tokenizer=tokenizer),
        precision=section.precision,
    )


_BUILDERS = {"paloma": _build_paloma, "blimp": _build_blimp}


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


def _check_words(items: Iterable[Any], *, key: str, path: str) -> None:
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
