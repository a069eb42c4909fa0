"""Which evals a run has, and what they share: reading records, and log-probabilities of sequences.

Loading and inspection import no torch. Not for: how often an eval runs (`train.py`), nor for the
definition of any one measure (`paloma.py`, `blimp.py`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, Unpack

import numpy as np

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
from relora_core.data.places import missing

if TYPE_CHECKING:
    from torch import Tensor

    from relora_core.model import Decoder

BATCH_TOKENS = {"cpu": 1024, "cuda": 65536}
"""Tokens per forward pass; a CPU wants activations that stay in its caches."""
SHORT = 64
"""Tokens of a sequence that may share a tree of prefixes with others."""
PORTION = 2**20
"""Characters encoded at a time; a longer text alone, in windows."""


@dataclass(kw_only=True, slots=True)
class EvalResult:
    """What one evaluation found."""

    metrics: dict[str, float]
    """Name under `eval/` -> value."""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Table name -> rows, JSON-serialisable."""


class Work(TypedDict, total=False):
    """How an evaluation is shared and watched. By default one process does it all, silently."""

    rank: int
    world: int
    reduce: Callable[[Tensor], Tensor] | None
    """Sum of a float64 tensor over the ranks; needed where world > 1."""
    progress: Callable[[int, int], None] | None
    """Called with (done, total) sequences."""


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


def existing(path: str, *, key: str) -> Path:
    """`path`, or a ConfigError that names the nearest entry of the folder where it should be."""
    found = Path(path).expanduser()
    if not found.exists():
        raise missing(key, source=path, expected="an existing folder or file")
    return found


def records(
    lines: Iterable[bytes], *, where: str, fields: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """One dict per line that is not blank. ConfigError, with file and line, for a broken one.

    Each of `fields` must be a string that can be written as UTF-8.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            # JSONDecodeError's own text counts lines within this one.
            what = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise ConfigError(f"{where} line {number}: not JSON ({what})") from None
        if not isinstance(record, dict):
            raise ConfigError(f"{where} line {number}: expected an object, got {line[:40]!r}")
        for name in fields:
            _check_string(record, name, where=f"{where} line {number}")
        yield record


def _check_string(record: dict[str, Any], name: str, *, where: str) -> None:
    if name not in record:
        has = ", ".join(sorted(record)) or "nothing"
        raise ConfigError(f"{where}: expected a field '{name}', got {has}")
    if not isinstance(record[name], str):
        raise ConfigError(f"{where}: '{name}' must be a string, got {record[name]!r:.40}")
    try:
        record[name].encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: '{name}' must be Unicode text, got a lone surrogate") from None


def digest(items: Iterable[tuple[Any, ...]]) -> str:
    """sha256 of what is evaluated, in order: independent of folders, archives and compression."""
    total = hashlib.sha256()
    for item in items:
        total.update(json.dumps(item).encode() + b"\n")
    return total.hexdigest()


def encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """int32 ids of each text. In portions: encoding takes a hundred times a text's memory."""
    return [
        np.array(ids, dtype=np.int32)
        for portion in _portions(texts)
        for ids in tokenizer.encode_batch(portion)
    ]


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    portion, characters = [], 0
    for text in texts:
        if portion and characters + len(text) > PORTION:
            yield portion
            portion, characters = [], 0
        portion.append(text)
        characters += len(text)
    if portion:
        yield portion


class Window(NamedTuple):
    """A sequence of which the last `scored` tokens are predicted, each from all before it."""

    ids: np.ndarray
    """(n,) int32; scored < n."""
    scored: int


def score(
    model: Decoder,
    windows: Sequence[Window],
    *,
    batch_tokens: int | None = None,
    share_prefixes: bool = False,
    precision: str = "fp32",
    **work: Unpack[Work],
) -> np.ndarray:
    """Sum of log p(scored tokens) of each window in nats, float64, shape (len(windows),).

    Equal windows are scored once, so they get equal sums; `share_prefixes` of short ones are
    computed once, too. With precision bf16 the head's matmuls are. Batches are the same for any
    number of ranks; rank r takes batches r, r + world, ..., and `reduce` brings the sums together.
    """
    import torch

    # Longest first, so that there is hardly any padding; short ones by content, which brings
    # together what begins alike.
    short = SHORT if share_prefixes else 0
    keys = [(min(short - len(w.ids), 0), w.ids.tobytes(), w.scored) for w in windows]
    index = {key: i for i, key in enumerate(keys)}
    order = sorted(index)
    unique = [windows[index[key]] for key in order]
    weight = model.de_embedding_proj.weight.detach()
    head = weight.bfloat16() if precision == "bf16" else weight
    device = weight.device
    budget = batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    batches = _plan(unique, budget=budget, short=short)
    rank, world = work.get("rank", 0), work.get("world", 1)
    reduce, progress = work.get("reduce"), work.get("progress")
    sums = torch.zeros(len(unique), dtype=torch.float64, device=device)
    # no_grad and not inference_mode: what a module caches here must still serve training.
    with _evaluating(model), torch.no_grad():
        for start, stop, sums_of in batches[rank::world]:
            sums[start:stop] = sums_of(model, unique[start:stop], head)
            if progress is not None:
                progress(stop, len(unique))
    if reduce is not None:
        sums = reduce(sums)
    place = {key: i for i, key in enumerate(order)}
    return sums.cpu().numpy()[[place[key] for key in keys]]


def _plan(
    windows: Sequence[Window], *, budget: int, short: int
) -> list[tuple[int, int, Callable[..., Tensor]]]:
    """Batches: (start, stop, how they are computed). Prefixes are shared up to `short` tokens."""
    lengths = [len(w.ids) for w in windows if len(w.ids) > short]
    plan = [(*span, _padded_sums) for span in _batches(lengths, budget=budget)]
    if len(lengths) < len(windows):
        from relora_core.evals import tree

        first, size = len(lengths), max(1, budget // tree.NODES)
        groups = list(tree.groups([w.ids for w in windows[first:]]))
        parts = (groups[i : i + size] for i in range(0, len(groups), size))
        plan += [(first + part[0][0], first + part[-1][1], tree.sums) for part in parts]
    return plan


def _batches(lengths: Sequence[int], *, budget: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of at least one sequence, of at most `budget` padded tokens; lengths fall."""
    start = 0
    while start < len(lengths):
        stop = min(len(lengths), start + max(1, budget // max(1, lengths[start])))
        yield start, stop
        start = stop


@contextlib.contextmanager
def _evaluating(model: Decoder) -> Iterator[None]:
    """Dropout off, and every module back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _padded_sums(model: Decoder, batch: Sequence[Window], head: Tensor) -> Tensor:
    """(B,) float64 sums. Only positions that are scored reach the head."""
    import torch

    from relora_core.loss import target_log_probs

    ids, scored = padded(batch)
    own, tokens = torch.from_numpy(scored).to(head.device), torch.from_numpy(ids).to(head.device)
    sums = torch.zeros(own.shape, dtype=torch.float64, device=head.device)
    if scored.any():
        hidden = model.hidden_states(tokens[:, :-1])[own]  # (N, C)
        sums[own] = target_log_probs(hidden, head, tokens[:, 1:][own]).double()
    return sums.sum(dim=1)


def padded(batch: Sequence[Window]) -> tuple[np.ndarray, np.ndarray]:
    """ids (B, T + 1) int64, padded with 0 on the right, and which of the T targets are scored."""
    width = max(2, max(len(w.ids) for w in batch))
    ids = np.zeros((len(batch), width), dtype=np.int64)
    scored = np.zeros((len(batch), width - 1), dtype=bool)
    for row, (tokens, count) in enumerate(batch):
        ids[row, : len(tokens)] = tokens
        scored[row, len(tokens) - 1 - count : max(0, len(tokens) - 1)] = True
    return ids, scored
