"""Text to ids with a tokenizer.json, from disk or the hub. Not for: the grammar's own words.

A long document is encoded in windows that overlap, which takes the memory of a window, and joined
where both windows agree on the ids: they are those of the document encoded as one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from relora_core import atomic, shared
from relora_core.config import ConfigError
from relora_core.data import places
from relora_core.data.base import DataError

if TYPE_CHECKING:
    import tokenizers

EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
"""Tokens that end a document, tried in this order if nothing names one."""

_EXPECTED = "a tokenizer.json, a folder that holds one, or a hub name"


WINDOW = 2**18
"""Characters of a long document that are encoded at a time; each takes about a hundred bytes."""
LONG = 2**20
"""Length in characters from which a text counts as long."""
OVERLAP = 2**12
"""Characters that two windows share."""
LONGEST = 2**22
"""Largest window in characters, if two never agree in the part that they share."""
AGREEING = 8
"""Tokens on both sides of a joint between words that must be the same in both windows."""
AGREEING_WITHIN = 256
"""The same where a tokenizer does not split text into words, or a word fills what they share."""

SMALLEST_VOCAB = 257
"""A byte-level vocabulary holds every byte and the end of a document."""


def padded_vocab(size: int) -> int:
    """`size` rounded up to a multiple of 128 (50,280 -> 50,304, as in Weiss et al. 2025)."""
    return -(-size // 128) * 128


class HFTokenizer:
    """A tokenizer.json behind the `Tokenizer` protocol. No special token is ever added.

    Text that spells a special token (`<|endoftext|>`) is encoded as that token, as the tokenizer
    library does. Truncation and padding that the file asks for are switched off: they would cut
    documents in silence. `digest` is the file's sha256.

    `unknown` says what happens to characters outside the vocabulary: they get an id (`known`),
    the text cannot be encoded (`error`), or they are left out (`dropped`).
    """

    def __init__(self, source: str, *, eos_id: int | None = None) -> None:
        file, config = files(source)
        vocabulary = self._take(file.read_bytes(), source=source, name=file.name)
        self.eos_id = _eos_id(source, config, vocabulary, eos_id=eos_id, size=self.vocab_size)

    def _take(self, raw: bytes, *, source: str, name: str = "tokenizer.json") -> dict[str, int]:
        """Take over the content of a tokenizer.json; returns its vocabulary."""
        import tokenizers

        _allow_forks()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(raw.decode())
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(
                f"data.tokenizer must be {_EXPECTED}, got {source!r}: {name} cannot be read: "
                f"{places.first_line(error)}"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ConfigError(f"data.tokenizer must hold a vocabulary, got {source!r}: it is empty")
        self.digest = hashlib.sha256(raw).hexdigest()
        self.unknown = _unknown_policy(json.loads(raw), vocabulary)
        self.vocab_size = max(vocabulary.values()) + 1  # not len(): ids may have holes
        return vocabulary

    def encode(self, text: str) -> list[int]:
        if len(text) <= LONG:
            return self._encoding(text).ids
        return [id_ for ids in self.encode_long([text]) for id_ in ids]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; the library's own threads share the work. Raises DataError."""
        if len(texts) == 1:
            return [self.encode(texts[0])]
        try:
            encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception:  # the library raises bare Exception, and does not say which text it was
            encoded = [self._encoding(text) for text in texts]
        return [e.ids for e in encoded]

    def encode_long(self, pieces: Iterable[str]) -> Iterator[list[int]]:
        """Ids of one document that comes in pieces, some at a time. Raises DataError."""
        rest = _Pieces(pieces)
        text = rest.take(WINDOW)
        here, begin = self._encoding(text), 0  # tokens before `begin` have been given out
        while more := rest.take(WINDOW):
            shared = min(OVERLAP, len(text))
            then = self._encoding(text[-shared:] + more)
            joint = _joint(here, then, shift=len(text) - shared)
            if joint is None:  # a larger window shares another stretch with the next one
                if len(text) > LONGEST:
                    raise DataError(
                        f"no place to cut in {len(text)} characters of one document, beginning "
                        f"{text[:40]!r}: the tokenizer splits them nowhere"
                    )
                text += more + rest.take(len(text))
                here = self._encoding(text)
                continue
            yield here.ids[begin : joint[0]]
            text, here, begin = text[-shared:] + more, then, joint[1]
        yield here.ids[begin:]

    def _encoding(self, text: str) -> tokenizers.Encoding:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"data.tokenizer cannot encode the text that begins {text[:40]!r}: "
                f"{places.first_line(error)}"
            ) from None


def _unknown_policy(file: dict[str, Any], vocabulary: dict[str, int]) -> str:
    """What happens to characters outside the vocabulary: see `HFTokenizer.unknown`."""
    from tokenizers import pre_tokenizers

    model = file.get("model") or {}
    unk, unigram = model.get("unk_token"), model.get("type") == "Unigram"
    covered = model.get("unk_id") is not None if unigram else unk in vocabulary
    if model.get("byte_fallback"):
        covered = covered or all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    if model.get("type", "BPE") != "BPE":
        return "known" if covered else "error"
    if _has_byte_level(file.get("pre_tokenizer")) or _has_byte_level(file.get("normalizer")):
        unused = {*map(chr, (0xC0, 0xC1, *range(0xF5, 0x100)))}  # bytes that never occur in UTF-8
        covered = covered or vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet()) - unused
    return "known" if covered else "error" if unk is not None else "dropped"


def _has_byte_level(step: Any) -> bool:
    if not isinstance(step, dict):
        return False
    parts = [*(step.get("pretokenizers") or []), *(step.get("normalizers") or [])]
    return step.get("type") == "ByteLevel" or any(map(_has_byte_level, parts))


class _Pieces:
    """Text that comes in pieces, taken in others."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces, self._rest = iter(pieces), ""

    def take(self, count: int) -> str:
        """The next `count` characters; fewer at the end only."""
        parts, missing = [], count
        while missing:
            self._rest = self._rest or next((p for p in self._pieces if p), "")
            if not self._rest:
                break
            parts.append(self._rest[:missing])
            self._rest = self._rest[missing:]
            missing -= len(parts[-1])
        return "".join(parts)


def _joint(
    here: tokenizers.Encoding, then: tokenizers.Encoding, *, shift: int
) -> tuple[int, int] | None:
    """Token of `here` and token of `then` that are the same one, between words if there are any.

    `then` begins `shift` characters after `here`. Where a word begins, what was before it does not
    matter to a tokenizer that splits text into words first; so if both begin one there, and `here`
    is right up to it, then `then` is right from it on. The tokens that agree around it show that
    neither window's edge matters any more.
    """
    ids = here.ids
    tail, first = [], len(ids)
    while first and (not tail or tail[-1].start >= 0):
        first -= 1
        tail.append(_token(here, first, ids, shift=shift))
    ours, theirs = tail[::-1], []
    ids = then.ids
    while len(theirs) < len(ids) and (not theirs or theirs[-1].start <= ours[-1].start):
        theirs.append(_token(then, len(theirs), ids, shift=0))
    at = {ours[i].start: i for i in range(len(ours) - 1, 0, -1)}  # the first of several
    middle = ours[-1].start // 2
    places = [j for j in range(1, len(theirs)) if theirs[j].start in at]
    places.sort(key=lambda j: abs(theirs[j].start - middle))
    for j in places:
        i = at[theirs[j].start]
        between = ours[i].word != ours[i - 1].word and theirs[j].word != theirs[j - 1].word
        if between and _agree(ours, i, theirs, j, count=AGREEING):
            return first + i, j
    for j in places:
        i = at[theirs[j].start]
        if _agree(ours, i, theirs, j, count=AGREEING_WITHIN):
            varied = {token.id for token in theirs[j - AGREEING_WITHIN : j + AGREEING_WITHIN]}
            if (
                len(varied) > AGREEING_WITHIN // 8
            ):  # a run of one letter agrees with itself anywhere
                return first + i, j
    return None


class _Token(NamedTuple):
    start: int
    """In characters of the later window."""
    id: int
    word: int | None


def _token(window: tokenizers.Encoding, i: int, ids: list[int], *, shift: int) -> _Token:
    start, _ = window.token_to_chars(i) or (0, 0)
    return _Token(start - shift, ids[i], window.token_to_word(i))


def _agree(ours: list[_Token], i: int, theirs: list[_Token], j: int, *, count: int) -> bool:
    """Whether `count` tokens before and after are the same ones in the same places."""
    if min(i, j) < count or i + count > len(ours) or j + count > len(theirs):
        return False
    return all(ours[i + k][:2] == theirs[j + k][:2] for k in range(-count, count))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, folder: Path) -> int:
    """Write folder/tokenizer.json, a byte-level BPE with `<|endoftext|>`. Gives its size: below
    `vocab_size` if the texts hold too few pairs. The same texts give the same file.

    Normalised and split as by the paper's tokenizer (OLMo's GPT-NeoX).
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCAB:
        raise ConfigError(
            f"--vocab must be >= {SMALLEST_VOCAB} (every byte and {EOS_NAMES[0]}), got "
            f"{vocab_size}; nearest valid: {SMALLEST_VOCAB}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_NAMES[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    shared.make_folder(folder)
    atomic.write_text(folder / "tokenizer.json", tokenizer.to_str())
    return tokenizer.get_vocab_size()


def files(source: str) -> tuple[Path, Path | None]:
    """(tokenizer.json, tokenizer_config.json beside it or None)."""
    path = places.expand(source)
    if path.is_dir():
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(
                f"data.tokenizer must be {_EXPECTED}, got {source!r}: a folder without one"
                + _conversion_hint(path)
            )
    elif path.is_file():
        file = path
    else:
        return _hub_files(source)
    config = file.with_name("tokenizer_config.json")
    return file, config if config.is_file() else None


def _conversion_hint(folder: Path) -> str:
    """Words on a tokenizer in another form, where the folder holds one."""
    forms = (
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "vocab.json",
        "vocab.txt",
    )
    names = [name for name in forms if (folder / name).is_file()]
    if not names:
        return ""
    return (
        f"; from its {names[0]}, transformers writes it with "
        f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER)"
    )


def _hub_files(source: str) -> tuple[Path, Path | None]:
    """The hub's files; where it cannot be reached, the copies that an earlier run left here."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    options: dict[str, Any] = {}
    unreachable = None
    try:
        options["revision"] = places.hub_commit(source, repo_type="model")
    except LookupError as error:
        unreachable = error
        options["local_files_only"] = True
    name, revision = places.hub_name(source) or ("", None)
    if unreachable and revision:
        options["revision"] = revision
    try:
        if not name:
            raise FileNotFoundError
        file = Path(hf_hub_download(name, "tokenizer.json", **options))
    except Exception as error:
        why = str(unreachable or f"the hub's copy has no tokenizer.json ({type(error).__name__})")
        raise places.path_error(
            "data.tokenizer", source=source, expected=_EXPECTED, why=why
        ) from None
    try:
        return file, Path(hf_hub_download(name, "tokenizer_config.json", **options))
    except Exception as error:
        lost = unreachable is None and isinstance(error, LocalEntryNotFoundError)
        if isinstance(error, EntryNotFoundError) and not lost:
            return file, None
        why = f"the hub could not be reached ({type(error).__name__})"
        raise places.path_error(
            "data.tokenizer", source=source, expected=_EXPECTED, why=why
        ) from None


def _eos_id(
    source: str, config: Path | None, vocabulary: dict[str, int], *, eos_id: int | None, size: int
) -> int:
    """data.eos_id, else tokenizer_config.json's eos_token, else a usual name, else ConfigError."""
    if eos_id is not None:
        if eos_id >= size:
            raise ConfigError(
                f"data.eos_id must be in [0, {size}) (the ids of data.tokenizer={source}), got "
                f"{eos_id}; nearest valid: {size - 1}"
            )
        return eos_id
    if config is not None and (token := _configured_eos(config)) is not None:
        if token not in vocabulary:
            raise ConfigError(
                f"data.eos_id must be set: {config.name} of data.tokenizer={source} names "
                f"{token!r}, which its tokenizer.json does not hold"
            )
        return vocabulary[token]
    for token in EOS_NAMES:
        if token in vocabulary:
            return vocabulary[token]
    raise ConfigError(
        f"data.eos_id must name the id that ends a document: data.tokenizer={source} holds none of "
        f"{', '.join(EOS_NAMES)}"
    )


def _configured_eos(config: Path) -> str | None:
    try:
        token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError, RecursionError):
        raise ConfigError(f"data.tokenizer: {config} is not a JSON object") from None
    return token.get("content") if isinstance(token, dict) else token


@cache
def _allow_forks() -> None:
    """Let a process fork after encoding: the child encodes without threads, and says nothing.

    The library's threads do not survive a fork: left alone it warns from the child, and under
    TOKENIZERS_PARALLELISM=true the child hangs. The parent keeps what the user has set.
    """
    name = "TOKENIZERS_PARALLELISM"
    saved: list[str | None] = []

    def before() -> None:
        saved.append(os.environ.get(name))
        os.environ[name] = "false"

    def after_in_parent() -> None:
        value = saved.pop()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

    os.register_at_fork(before=before, after_in_parent=after_in_parent)
