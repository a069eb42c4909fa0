"""`python -m experiments tokenizer`: a tokenizer of one's own text, for `data.tokenizer`."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.__main__ import main
from relora_core.data.tokenizer import HFTokenizer, train_tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "naïve café 東京", "a\n\n\tb  c"] * 5


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.txt").write_text("and the cow jumped over the moon")
    (tmp_path / "nulls.jsonl").write_text('{"text": null}\n')
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer(TEXTS, vocab_size=280, folder=folder)
    return HFTokenizer(str(folder))


def test_the_folder_is_a_tokenizer_of_the_size_asked_for(texts, tmp_path, capsys):
    assert main(["tokenizer", str(texts), str(tmp_path / "bpe"), "--vocab", "270"]) == 0
    assert "270" in capsys.readouterr().out
    tokenizer = HFTokenizer(str(tmp_path / "bpe"))
    assert tokenizer.vocab_size == 270
    assert 0 <= tokenizer.eos_id < 270
    assert len(tokenizer.encode("the cat")) < len("the cat")  # pairs of its own text are merged


@given(st.text())
def test_any_text_comes_back_and_no_id_is_out_of_range(small, text):
    import unicodedata

    ids = small.encode(text)
    assert all(0 <= i < small.vocab_size for i in ids)
    if "<|endoftext|>" not in text:
        assert small._tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_the_same_text_gives_the_same_file(tmp_path):
    for name in ("one", "two"):
        train_tokenizer(TEXTS, vocab_size=300, folder=tmp_path / name)
    one, two = ((tmp_path / n / "tokenizer.json").read_bytes() for n in ("one", "two"))
    assert one == two


def test_too_little_text_says_so(texts, tmp_path, capsys):
    command = ["tokenizer", str(texts), str(tmp_path / "bpe"), "--vocab", "9999", "--json"]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["vocab_size"] == HFTokenizer(answer["path"]).vocab_size < 9999
    assert "9999" in answer["notes"][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{texts}", "{new}", "--vocab", "100"], "--vocab must be >= 257"),
        (["{texts}", "{texts}/a.jsonl"], "DIR must hold no tokenizer yet"),
        (["{new}", "{new}2"], "DATA must be"),
        (["{texts}", "{new}", "--text-field", "txt"], "Did you mean 'text'?"),
        (["{texts}/../nulls.jsonl", "{new}"], "DATA holds no text"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(texts, tmp_path, capsys, words, message):
    new = tmp_path / "new"
    with pytest.raises(SystemExit) as ended:
        main(["tokenizer", *(w.format(texts=texts, new=new) for w in words)])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not new.exists()


def test_a_tokenizer_is_not_written_over(texts, tmp_path):
    assert main(["tokenizer", str(texts), str(tmp_path / "bpe"), "--vocab", "270"]) == 0
    before = (tmp_path / "bpe" / "tokenizer.json").read_bytes()
    with pytest.raises(SystemExit):
        main(["tokenizer", str(texts), str(tmp_path / "bpe"), "--vocab", "280"])
    assert (tmp_path / "bpe" / "tokenizer.json").read_bytes() == before
