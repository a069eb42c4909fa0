"""Tokenizers from disk and hub: ids without special tokens, and which id ends a document."""

from __future__ import annotations

import itertools
import json
import lzma
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_files import write_bpe, write_words
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relora_core.config import ConfigError, DataConfig
from relora_core.data import DataError, load_tokenizer, tokenizer
from relora_core.data.tokenizer import HFTokenizer, padded_vocab


def error_line(source: Path | str, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        HFTokenizer(str(source), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("size", "padded"), [(50_280, 50_304), (128, 128), (129, 256), (1, 128)])
def test_vocabularies_are_padded_to_multiples_of_128(size, padded):
    assert padded_vocab(size) == padded


def test_a_file_and_its_folder_are_the_same_tokenizer(tmp_path):
    folder = write_bpe(tmp_path)
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "a"}}')
    one, two = HFTokenizer(str(folder)), HFTokenizer(str(folder / "tokenizer.json"))
    assert (one.digest, one.vocab_size, one.eos_id) == (two.digest, two.vocab_size, two.eos_id)


def test_batches_are_encoded_as_one_by_one_and_nothing_is_added_or_cut(tmp_path):
    from tokenizers import Tokenizer, processors

    file = write_bpe(tmp_path) / "tokenizer.json"
    raw = Tokenizer.from_file(str(file))
    texts = ["the cat", "", " sat on\nthe mat" * 40, "Grüße, 世界"]
    plain = [raw.encode(t, add_special_tokens=False).ids for t in texts]
    raw.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    raw.enable_truncation(5)
    raw.enable_padding(length=64)
    raw.save(str(file))
    tokenizer = HFTokenizer(str(file))
    assert tokenizer.encode_batch(texts) == plain
    assert [tokenizer.encode(t) for t in texts] == plain
    assert len(plain[2]) > 64


def test_the_vocabulary_reaches_the_largest_id_even_with_holes(tmp_path):
    file = write_words(tmp_path, ["a", "b"]) / "tokenizer.json"
    spec = json.loads(file.read_text())
    spec["model"]["vocab"]["<eos>"] = 40
    file.write_text(json.dumps(spec))
    assert HFTokenizer(str(tmp_path)).vocab_size == 41


def test_eos_is_what_is_configured_then_what_the_folder_says_then_a_usual_name(tmp_path):
    folder = write_bpe(tmp_path)
    assert HFTokenizer(str(folder)).eos_id == 0  # <|endoftext|> is trained as the first id
    (folder / "tokenizer_config.json").write_text('{"eos_token": "b"}')
    eos = HFTokenizer(str(folder)).eos_id
    assert HFTokenizer(str(folder)).encode("b") == [eos]
    assert HFTokenizer(str(folder), eos_id=7).eos_id == 7


def test_a_missing_eos_asks_for_one(tmp_path):
    folder = write_bpe(tmp_path, eos="[END]")
    assert "data.eos_id must name" in error_line(folder)
    assert HFTokenizer(str(folder), eos_id=0).eos_id == 0
    (folder / "tokenizer_config.json").write_text('{"eos_token": "[STOP]"}')
    assert "'[STOP]'" in error_line(folder)
    assert "nearest valid: 269" in error_line(folder, eos_id=270)


def test_what_is_no_tokenizer_is_one_line(tmp_path):
    write_bpe(tmp_path / "tokenizer")
    assert "Did you mean" in error_line(tmp_path / "tokeniser")
    assert "data.tokenizer must be" in error_line(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    assert "tokenizer.json cannot be read" in error_line(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    assert "tokenizer.json cannot be read" in error_line(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("[]")
    assert "not a JSON object" in error_line(tmp_path / "tokenizer")


def test_a_hub_name_is_downloaded_at_its_commit_and_unreachable_it_is_one_line(
    tmp_path, monkeypatch
):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    folder = write_bpe(tmp_path)
    asked: list[dict] = []

    def download(name, file, **options):
        asked.append({"name": name, **options})
        if not (folder / file).exists():
            raise EntryNotFoundError(file)
        return str(folder / file)

    def repo_info(self, name, **options):
        return SimpleNamespace(sha="c" * 40)

    def no_repo_info(self, name, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    assert HFTokenizer("owner/name").digest == HFTokenizer(str(folder)).digest
    assert asked[0] == {"name": "owner/name", "revision": "c" * 40}
    # offline: only what an earlier run has left on this machine
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", no_repo_info)
    assert HFTokenizer("owner/name").digest == HFTokenizer(str(folder)).digest
    assert asked[-1]["local_files_only"] is True
    (folder / "tokenizer.json").unlink()
    assert "the hub could not be reached (ConnectionError)" in error_line("owner/name")


@pytest.mark.parametrize("lost", [LocalEntryNotFoundError("no copy"), RuntimeError("no route")])
def test_a_connection_lost_between_two_files_of_the_hub_is_one_line(tmp_path, monkeypatch, lost):
    folder = write_bpe(tmp_path)

    def download(name, file, **options):
        if file == "tokenizer_config.json":
            raise lost
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.repo_info", lambda self, name, **options: SimpleNamespace(sha="c")
    )
    assert f"the hub could not be reached ({type(lost).__name__})" in error_line("owner/name")


@pytest.mark.parametrize("setting", [None, "true"])
def test_a_fork_after_encoding_encodes_on_and_says_nothing(tmp_path, monkeypatch, setting):
    write_bpe(tmp_path)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if setting:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", setting)
    code = (
        "import os\n"
        "from relora_core.data.tokenizer import HFTokenizer\n"
        f"tokenizer = HFTokenizer({str(tmp_path)!r})\n"
        "texts = ['the cat sat'] * 100\n"
        "before = tokenizer.encode_batch(texts)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os._exit(tokenizer.encode_batch(texts) != before)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        f"assert os.environ.get('TOKENIZERS_PARALLELISM') == {setting!r}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_pretokenized_data_may_name_no_tokenizer_and_the_grammar_has_its_own():
    data = DataConfig(kind="pretokenized", path="x", vocab_size=9, seq_len=4)
    assert load_tokenizer(data) is None
    grammar = load_tokenizer(DataConfig(kind="grammar", seq_len=4))
    assert grammar is not None
    assert 0 <= grammar.eos_id < grammar.vocab_size


def test_the_real_tokenizer_gives_the_published_ids(shared_data):
    tokenizer = HFTokenizer(str(shared_data / "tokenizer"))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50_280, 50_279)
    assert tokenizer.encode("Hello world") == [12092, 1533]
    assert tokenizer.encode_batch([" Hello world"]) == [[24387, 1533]]
    assert tokenizer.digest.startswith("9ad33b4b39a9f839")
    assert tokenizer.unknown == "known"  # though 13 bytes are not in it: UTF-8 has none of them


def test_other_forms_of_a_tokenizer_are_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    line = error_line(tmp_path)
    assert "a folder without one; from its tokenizer.model, transformers writes it with" in line


@pytest.mark.parametrize(
    ("model", "steps", "unknown"),
    [
        ({"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "[UNK]"}, {}, "error"),
        ({"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "a"}, {}, "known"),
        ({"type": "Unigram", "vocab": [["a", 0.0], ["</s>", 0.0]], "unk_id": None}, {}, "error"),
        ({"type": "Unigram", "vocab": [["a", 0.0], ["</s>", 0.0]], "unk_id": 0}, {}, "known"),
        ({"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": []}, {}, "dropped"),
        (
            {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": []},
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "use_regex": True,
                    "trim_offsets": True,
                }
            },
            "dropped",
        ),
        (
            {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": [], "unk_token": "a"},
            {},
            "known",
        ),
    ],
)
def test_what_becomes_of_unknown_characters(tmp_path, model, steps, unknown):
    """Compared with what the library does."""
    file = {"version": "1.0", "added_tokens": [], "model": model, "normalizer": None}
    file |= {"pre_tokenizer": None, "post_processor": None, "decoder": None, **steps}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    own = HFTokenizer(str(tmp_path))
    assert own.unknown == unknown
    for encode in (own.encode, lambda text: own.encode_batch([text])[0]):
        if unknown == "error":
            with pytest.raises(DataError, match=r"^data\.tokenizer cannot encode .*'axa'") as at:
                encode("axa")
            assert "\n" not in str(at.value)
        elif model["type"] == "BPE":
            assert (len(encode("axa")) < 3) == (unknown == "dropped")
        else:
            assert encode("axa")


def test_a_byte_level_tokenizer_knows_every_character(tmp_path):
    assert HFTokenizer(str(write_bpe(tmp_path))).unknown == "known"


# long documents -----------------------------------------------------------------------------------
WORDS = "the cat sat on the mat and the dog sat too. Grüße 世界! 12,345 __init__ (a+b)\n\n\t"
WORDS = WORDS.split(" ")


def sentencepiece(folder: Path, *, split: bool, model: str) -> Path:
    """As Llama's and Gemma's are converted: `▁` for spaces and before the text, no words if not
    `split`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    special = ["<unk>", "</s>"]
    if model == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        trainer = trainers.BpeTrainer(
            vocab_size=150, special_tokens=special, show_progress=False, max_token_length=8
        )
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = metaspace
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    if not split:
        replace = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        tokenizer.pre_tokenizer = None
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def byte_level(folder: Path, *, prefix: bool) -> Path:
    """As GPT-2's and RoBERTa's: a space before the text, offsets that leave spaces out."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors

    file = write_bpe(folder, vocab_size=300) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.save(str(file))
    return folder


def wordpiece(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    pieces = ["[UNK]", "<eos>", "the", "cat", "do", "##g", "s", "##at", ".", "12", ",", "("]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


KINDS = {
    "byte_level": lambda folder: byte_level(folder, prefix=False),
    "byte_level with a prefix": lambda folder: byte_level(folder, prefix=True),
    "sentencepiece bpe": lambda folder: sentencepiece(folder, split=True, model="bpe"),
    "sentencepiece bpe without words": lambda folder: sentencepiece(
        folder, split=False, model="bpe"
    ),
    "unigram": lambda folder: sentencepiece(folder, split=True, model="unigram"),
    "wordpiece": wordpiece,
}


@pytest.fixture(scope="module", params=KINDS)
def any_tokenizer(request, tmp_path_factory) -> HFTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer") / "one"
    return HFTokenizer(str(KINDS[request.param](folder)), eos_id=1)


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(tokenizer, "WINDOW", 600)
    monkeypatch.setattr(tokenizer, "OVERLAP", 300)
    monkeypatch.setattr(tokenizer, "AGREEING_WITHIN", 24)


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32), runs=st.booleans(), cut=st.integers(1, 900))
def test_a_document_in_pieces_has_the_ids_of_the_whole(
    any_tokenizer, small_windows, seed, runs, cut
):
    draw = random.Random(seed)
    odd = [
        "\n" * 9,
        " " * 40,
        "e\u0301\u0301",
        "\u0301",
        "a" * 30,
        "<|endoftext|>",
        "\r\n",
        "\U0001d4b3",
        "\0",
    ]
    words = WORDS + (odd if runs else [])
    text = "".join(draw.choice(words) + draw.choice(["", " ", " "]) for _ in range(900))
    pieces = [text[i : i + cut] for i in range(0, len(text), cut)]
    assert [*itertools.chain(*any_tokenizer.encode_long(pieces))] == any_tokenizer.encode(text)


@pytest.mark.parametrize("letter", ["a", " ", "世", "the cat "])
def test_so_has_one_that_repeats_itself(any_tokenizer, small_windows, letter):
    text = "the dog " * 50 + letter * 3000 + " sat too" * 50
    assert [*itertools.chain(*any_tokenizer.encode_long([text]))] == any_tokenizer.encode(text)


def test_a_long_text_takes_the_memory_of_a_window_wherever_it_is_encoded(
    any_tokenizer, small_windows, monkeypatch
):
    """An eval's, too: a document of 30 MB would take 3.5 GB."""
    text = "the dog sat on the mat " * 400
    ids, sizes, encoding = any_tokenizer.encode(text), [], HFTokenizer._encoding
    monkeypatch.setattr(
        HFTokenizer, "_encoding", lambda self, text: sizes.append(len(text)) or encoding(self, text)
    )
    monkeypatch.setattr(tokenizer, "LONG", 2000)
    assert any_tokenizer.encode_batch([text]) == [any_tokenizer.encode(text)] == [ids]
    assert max(sizes) < len(text) / 2


@pytest.mark.slow
def test_windows_stay_small_and_what_cannot_be_cut_is_one_line(tmp_path, monkeypatch):
    own = HFTokenizer(str(write_bpe(tmp_path)))
    sizes, encoding = [], HFTokenizer._encoding
    monkeypatch.setattr(
        HFTokenizer, "_encoding", lambda self, text: sizes.append(len(text)) or encoding(self, text)
    )
    monkeypatch.setattr(tokenizer, "WINDOW", 2**13)
    monkeypatch.setattr(tokenizer, "LONGEST", 2**14)
    parts = ("the cat sat on the mat " * 100 for _ in range(60))
    assert sum(map(len, own.encode_long(parts))) > 50_000
    assert max(sizes) == 2**13 + tokenizer.OVERLAP
    with pytest.raises(DataError, match=r"no place to cut in \d+ characters .*'xxxx") as caught:
        list(own.encode_long(["x" * 2**16]))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_long_real_document_has_the_ids_of_the_whole(shared_data, monkeypatch):
    own = HFTokenizer(str(shared_data / "tokenizer"))
    parts = []
    for name in ("books", "code", "docs", "wiki"):
        with lzma.open(shared_data / "corpus" / "train_core" / f"{name}.jsonl.xz", "rt") as lines:
            parts += [json.loads(line)["text"] for line in itertools.islice(lines, 20)]
    text = "\n\n".join(parts)[:800_000]
    monkeypatch.setattr(tokenizer, "WINDOW", 2**14)
    assert [*itertools.chain(*own.encode_long([text]))] == own.encode(text)
