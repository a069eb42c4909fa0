"""Perplexities against hand-computed numbers and a slow reference; one line for every bad input."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relora_core.config import ConfigError, PalomaConfig
from relora_core.data.base import DataError
from relora_core.evals import paloma
from relora_core.evals.paloma import Document

SHARED = Path(__file__).parents[3] / "shared" / "data" / "paloma_standin"
EOS = 0
# Row i: p(next | i). All logs are finite, so the numbers below can be written out by hand.
BIGRAM = [
    [0.1, 0.5, 0.25, 0.15],
    [0.25, 0.25, 0.25, 0.25],
    [0.7, 0.1, 0.1, 0.1],
    [0.4, 0.3, 0.2, 0.1],
]


class Bigram(torch.nn.Module):
    """p(next | last id) as in BIGRAM: no decoder, only what an eval asks of a model."""

    device = torch.device("cpu")

    def __init__(self, *, max_seq_len: int = 8) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.table = torch.nn.Parameter(torch.tensor(BIGRAM).log())

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids]

    def log_probs(self, ids, at, targets, *, precision="fp32") -> torch.Tensor:
        assert ids.shape[1] <= self.max_seq_len
        return self.logits(ids)[at].log_softmax(dim=1).gather(1, targets[:, None])[:, 0]


class Memory(Bigram):
    """A state that depends on everything seen so far, so that a wrong context changes the score."""

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        decay = 0.5 ** torch.arange(ids.shape[1]).float()
        seen = torch.nn.functional.one_hot(ids, 4).float() / decay[None, :, None]
        return 3 * seen.cumsum(dim=1) * decay[None, :, None]


def evaluate(model, texts, **kw):
    """texts: (source, domain, ids); the text is one byte per id."""
    documents = [Document(s, d, "x" * len(ids), str(i)) for i, (s, d, ids) in enumerate(texts)]
    ids = [np.array(x, dtype=np.int32) for _, _, x in texts]
    return paloma.evaluate(model, documents=documents, ids=ids, eos_id=EOS, **kw)


def perplexity(*probabilities: float) -> float:
    return math.prod(probabilities) ** (-1 / len(probabilities))


def test_perplexities_equal_those_computed_by_hand():
    texts = [("a", "x", [1, 2]), ("a", "x", [2]), ("a", "y", [3, 0, 1]), ("b", "b", [1])]
    result = evaluate(Bigram(), texts)
    # Each document starts from EOS = 0; no end token is scored.
    x, y, b = [0.5, 0.25, 0.25], [0.15, 0.4, 0.5], [0.5]
    metrics = {name.removeprefix("eval/paloma/"): v for name, v in result.metrics.items()}
    expected = {
        "perplexity": perplexity(*x, *y, *b),
        "bits_per_byte": math.log2(perplexity(*x, *y, *b)),  # one byte per token
        "a/perplexity": perplexity(*x, *y),
        "a/bits_per_byte": math.log2(perplexity(*x, *y)),
        "b/perplexity": 2.0,
        "b/bits_per_byte": 1.0,
        "macro_perplexity": ((perplexity(*x) + perplexity(*y)) / 2 + 2.0) / 2,
        "macro_domains_perplexity": (perplexity(*x) + perplexity(*y) + 2.0) / 3,
        "macro_sources_perplexity": (perplexity(*x, *y) + 2.0) / 2,
        "paper_perplexity": metrics["paper_perplexity"],
    }
    assert metrics == pytest.approx(expected, rel=1e-5)
    rows = [(r["source"], r["domain"], r["documents"], r["tokens"]) for r in _table(result)]
    assert rows == [("a", "x", 2, 3), ("a", "y", 1, 3), ("b", "b", 1, 1)]
    assert [r["perplexity"] for r in _table(result)] == pytest.approx(
        [perplexity(*x), perplexity(*y), 2.0], rel=1e-5
    )


def _table(result):
    return result.tables["paloma_domains"]


def test_bits_per_byte_counts_utf8_bytes():
    document = Document("a", "a", "äö", "0")  # 4 bytes, 2 tokens
    ids = [np.array([1, 2], dtype=np.int32)]
    result = paloma.evaluate(Bigram(), documents=[document], ids=ids, eos_id=EOS)
    assert result.metrics["eval/paloma/bits_per_byte"] == pytest.approx(3 / 4)  # p = 1/2 * 1/4


def test_paper_perplexity_is_the_mean_of_row_perplexities_without_start_token():
    result = evaluate(Bigram(), [("a", "a", [1, 2, 3, 1, 1, 2, 0])], max_len=4)
    # 7 ids and the end id: two rows of 4, [1 2 3 1] and [1 2 0 0] less their first tokens.
    rows = [perplexity(0.25, 0.1, 0.3), perplexity(0.25, 0.7, 0.1)]
    assert result.metrics["eval/paloma/paper_perplexity"] == pytest.approx(np.mean(rows), rel=1e-5)
    # An average of exponentials is not the exponential of the average.
    assert np.mean(rows) > perplexity(0.25, 0.1, 0.3, 0.25, 0.7, 0.1)


def test_paper_rows_take_every_document_once_in_a_fixed_order():
    ids = [np.full(n + 1, n % 3 + 1, dtype=np.int32) for n in range(20)]
    rows = list(paloma.paper_rows(ids, eos_id=EOS, length=5))
    joined = np.concatenate([r.ids for r in rows])
    total = sum(map(len, ids)) + 20
    assert len(joined) == total - total % 5
    assert [r.scored for r in rows] == [4] * len(rows)
    assert (
        np.concatenate([r.ids for r in paloma.paper_rows(ids, eos_id=EOS, length=5)]) == joined
    ).all()
    runs = [len(part) for part in "".join(map(str, joined)).split("0")[:-1]]
    assert set(runs) <= {n + 1 for n in range(20)}
    assert len(set(runs)) == len(runs)
    assert runs != sorted(runs)


@pytest.mark.parametrize(
    ("documents", "first"),
    [
        (12, [0, 7, 6, 9, 11, 3, 5, 2, 4, 10, 1, 8]),
        (5000, [1535, 1183, 3378, 3825, 643, 90, 2835, 3865, 2220, 2177, 3753, 3552]),
    ],
)
def test_the_order_of_documents_is_that_of_every_earlier_number(documents, first):
    """The digest of texts and settings does not tell another order. If a new numpy draws one, copy
    its old permutation here rather than change these numbers."""
    ids = [np.array([1 + n], dtype=np.int32) for n in range(documents)]
    rows = [row.ids.tolist() for row in paloma.paper_rows(ids, eos_id=EOS, length=2)]
    assert rows[: len(first)] == [[1 + n, EOS] for n in first]


def test_paper_rows_stop_at_a_hundred_per_source():
    ids = [np.ones(50, dtype=np.int32)] * 40
    assert len(list(paloma.paper_rows(ids, eos_id=EOS, length=10))) == 100


def test_a_source_shorter_than_a_row_gives_no_paper_figure():
    assert "eval/paloma/paper_perplexity" not in evaluate(Bigram(), [("a", "a", [1, 2])]).metrics


@given(length=st.integers(0, 70), max_len=st.integers(1, 20))
def test_windows_score_each_token_once_with_the_stated_context(length, max_len):
    ids = np.arange(1, length + 1, dtype=np.int32)
    windows = list(paloma.document_windows(ids, prefix=EOS, max_len=max_len))
    assert [t for w in windows for t in w.ids[len(w.ids) - w.scored :]] == list(ids)
    stream = [EOS, *ids]
    for n, window in enumerate(windows):
        first = int(window.ids[0])
        assert list(window.ids) == stream[first : first + len(window.ids)]  # consecutive
        assert len(window.ids) - 1 <= max_len
        context = len(window.ids) - window.scored
        if n == 0:
            assert window.ids[0] == EOS
            assert context == 1
        elif window.scored == max_len:
            assert context == 1
        else:
            assert n == len(windows) - 1
            assert len(window.ids) == max_len + 1


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 29])
def test_long_documents_equal_a_reference_that_scores_token_by_token(length):
    model, max_len = Memory(max_seq_len=8), 8
    ids = np.random.default_rng(length).integers(1, 4, size=length)
    stream, nats = [EOS, *ids], 0.0
    for i in range(length):
        start = i - i % max_len  # of the window that scores ids[i]
        stop = min(start + max_len, length)
        context = torch.tensor([stream[max(0, stop - max_len) : i + 1]])
        logits = model.double().logits(context)[0, -1].double()
        nats -= logits.log_softmax(0)[int(ids[i])].item()
    result = evaluate(Memory(max_seq_len=8), [("a", "a", ids)])
    assert result.metrics["eval/paloma/perplexity"] == pytest.approx(
        math.exp(nats / length), rel=1e-5
    )


def test_a_diverged_model_gives_nan_and_a_certain_mistake_infinity():
    model = Bigram()
    with torch.no_grad():
        model.table.fill_(math.nan)
    assert math.isnan(evaluate(model, [("a", "a", [1])]).metrics["eval/paloma/perplexity"])
    with torch.no_grad():
        model.table.copy_(torch.tensor([2000.0, 0, 0, 0]))
    assert evaluate(model, [("a", "a", [1])]).metrics["eval/paloma/perplexity"] == math.inf


def test_a_domain_without_tokens_is_refused():
    with pytest.raises(DataError, match="domain a/y must hold tokens"):
        evaluate(Bigram(), [("a", "x", [1]), ("a", "y", [])])


def write(folder: Path, lines: list, *, source: str = "wiki", split: str = "val") -> Path:
    file = folder / source / split / f"{source}_00000000.jsonl.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines)
    file.write_bytes(gzip.compress(text.encode()))
    return file


def record(text: str, **more: str) -> dict[str, str]:
    return {"text": text, "id": "7", **more}


def test_load_takes_source_from_the_folder_and_domain_from_the_record(tmp_path):
    write(tmp_path, [record("one", subdomain="art"), "\n", record(""), record("two")])
    write(tmp_path, [record("three", source="elsewhere")], source="books")
    write(tmp_path, [record("other split")], split="test")
    assert paloma.load(PalomaConfig(path=str(tmp_path))) == [
        Document("books", "books", "three", "7"),
        Document("wiki", "art", "one", "7"),
        Document("wiki", "wiki", "two", "7"),
    ]


def test_plain_jsonl_and_other_packings_are_sources_too_and_what_is_left_out_is_said(tmp_path):
    write(tmp_path, [record("one")])
    config = PalomaConfig(path=str(tmp_path))
    before = paloma.inspect(config)
    assert paloma.notes(config) == []
    write(tmp_path, [record("elsewhere")], source="mC4", split="test")
    write(tmp_path, [record("hidden")], source=".cache")
    line = json.dumps(record("one")).encode()
    (tmp_path / "wiki" / "val" / "wiki_00000000.jsonl").write_bytes(line + b"\n")
    (tmp_path / "wiki" / "val" / "deep").mkdir()
    (tmp_path / "wiki" / "val" / "deep" / "x.jsonl.gz").write_bytes(gzip.compress(line))
    (tmp_path / "x.jsonl").write_bytes(line)
    assert paloma.inspect(config) == before  # the plain copy is the packed file's own
    assert paloma.notes(config) == [
        "sources without a split val, left out: mC4",
        "no <source>/<split>/FILE, or there twice, not read: wiki/val/deep/x.jsonl.gz, "
        "wiki/val/wiki_00000000.jsonl.gz, x.jsonl",
    ]
    for name, content in {"a.jsonl": line, "b.json.gz": gzip.compress(line)}.items():
        (tmp_path / name[0] / "val").mkdir(parents=True)
        (tmp_path / name[0] / "val" / name).write_bytes(content)
    assert [d.source for d in paloma.load(config)] == ["a", "b", "wiki"]


def test_max_documents_keeps_the_first_of_each_domain(tmp_path):
    lines = [record(f"{d}{i}", subdomain=d) for i in range(3) for d in "ab"]
    write(tmp_path, lines)
    loaded = paloma.load(PalomaConfig(path=str(tmp_path), max_documents=2))
    assert [d.text for d in loaded] == ["a0", "b0", "a1", "b1"]


def test_the_digest_follows_content_and_not_place(tmp_path):
    for name, text in {"here": "same", "there": "same", "changed": "other"}.items():
        write(tmp_path / name, [record(text)])
    digests = {
        n: paloma.inspect(PalomaConfig(path=str(tmp_path / n)))
        for n in ("here", "there", "changed")
    }
    assert digests["here"] == digests["there"] != digests["changed"]
    write(tmp_path / "here", [record("rewritten")])  # a kept digest must not outlive the file
    assert paloma.inspect(PalomaConfig(path=str(tmp_path / "here"))) != digests["there"]


def truncated() -> bytes:
    """Cut within the second line, which gzip cannot make smaller."""
    lines = [record("one"), record(str(np.random.default_rng(0).bytes(3000)))]
    return gzip.compress("\n".join(map(json.dumps, lines)).encode())[:-40]


BAD = {
    "json": ([record("fine"), '{"text": "cut\n'],
             "line 2: not JSON (Invalid control character"),
    "truncated": (truncated(), "line 2: broken gzip file"),
    "no gzip": (b"plain text\n", "line 1: broken gzip file"),
    "no text": ([{"txet": "x"}], "line 1: expected a field 'text', got txet"),
    "no string": ([{"text": 3}], "line 1: 'text' must be a string, got 3"),
    "no object": (['["text"]\n'], "line 1: expected an object"),
    "surrogate": (['{"text": "\\ud800"}\n'], "line 1: 'text' must be Unicode text"),
    "empty": ([], "must hold at least one document"),
    "bytes": (gzip.compress(b'{"text": "\xff"}\n'), "line 1: not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_line_that_names_file_and_line(tmp_path, kind):
    content, message = BAD[kind]
    if isinstance(content, bytes):
        write(tmp_path, []).write_bytes(content)
    else:
        write(tmp_path, content)
    with pytest.raises(ConfigError) as error:
        paloma.inspect(PalomaConfig(path=str(tmp_path)))
    assert str(error.value).startswith("eval.paloma.path: wiki/val/wiki_00000000.jsonl.gz") or (
        kind == "empty" and "wiki/val" in str(error.value)
    )
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_path_or_split_names_what_there_is(tmp_path):
    write(tmp_path / "paloma", [record("x")])
    cases = {
        "paloma/wiki/val/wiki_00000000.jsonl.gz": "must be a folder",
        "palomma": "paloma'?",
        "paloma/wiki": "found none in",
    }
    for path, message in cases.items():
        with pytest.raises(ConfigError, match=r"^eval\.paloma\.path[^\n]*$") as error:
            paloma.inspect(PalomaConfig(path=str(tmp_path / path)))
        assert message in str(error.value)
    with pytest.raises(ConfigError, match=r"^eval\.paloma\.split .*one of val .*'vall'.*'val'\?$"):
        paloma.inspect(PalomaConfig(path=str(tmp_path / "paloma"), split="vall"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the checkout")
def test_the_real_layout_is_read_whole():
    config = PalomaConfig(path=str(SHARED))
    assert len(paloma.inspect(config) or "") == 64
    documents = paloma.load(config)
    assert len({d.source for d in documents}) == 14
    assert len({d.domain for d in documents if d.source == "arxiv_abstracts"}) == 20
    assert sum(d.source == "arxiv_abstracts" for d in documents) == 1200
    assert (
        sum(
            d.source == "c4_100_domains"
            for d in paloma.load(PalomaConfig(path=str(SHARED), split="test"))
        )
        == 0
    )
