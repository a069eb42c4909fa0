"""Both ways of scoring against a slow float64 scorer; loader quirks; one line per bad input."""

from __future__ import annotations

import io
import json
import math
import shutil
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from relora_core.config import BlimpConfig, ConfigError, ModelConfig
from relora_core.evals import blimp, scoring
from relora_core.evals.blimp import Pair
from relora_core.model import Decoder

SHARED = Path(__file__).parents[3] / "shared" / "data" / "blimp"
needs_blimp = pytest.mark.skipif(
    not (SHARED / "blimp_data.tar.xz").is_file(), reason="no ../shared/data/blimp"
)
WORDS = ["the", "a", "cat", "dogs", "sees", "see", "sleep", "sleeps", "old", "who"]


class SpaceTokenizer:
    """One id per word; a word after a space differs from one at the start, as in byte-level BPE."""

    eos_id = 0
    vocab_size = 1 + 2 * len(WORDS)

    def encode(self, text: str) -> list[int]:
        spaced = text.startswith(" ")
        ids = [1 + WORDS.index(word) for word in text.split()]
        return [i + len(WORDS) if spaced or n else i for n, i in enumerate(ids)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


def make_model(seed: int = 0, *, max_seq_len: int = 16) -> Decoder:
    torch.manual_seed(seed)
    config = ModelConfig(
        d_model=16,
        d_ff=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        max_seq_len=max_seq_len,
        vocab_size=SpaceTokenizer.vocab_size,
    )
    model = Decoder(config)
    with torch.no_grad():
        model.de_embedding_proj.weight.mul_(4)
    return model


def make_pairs(count: int = 90, *, seed: int = 0) -> list[Pair]:
    """Three paradigms of two phenomena, of unequal sizes; every tenth pair has good == bad."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(count):
        uid, phenomenon = [("u1", "p1"), ("u2", "p1"), ("u3", "p2")][min(2, i % 4)]
        good = " ".join(rng.choice(WORDS, size=rng.integers(1, 9)))
        bad = good if i % 10 == 0 else " ".join(rng.choice(WORDS, size=rng.integers(1, 9)))
        pairs.append(Pair(uid, phenomenon, "syntax", good, bad, str(i)))
    return pairs


def run(model, pairs, **work):
    windows = blimp.windows(pairs, tokenizer=SpaceTokenizer())
    return blimp.evaluate(model, pairs=pairs, windows=windows, **work)


def slow_log_prob(model: Decoder, ids: list[int]) -> float:
    """Sum over t >= 1 of log p(ids[t] | ids[:t]), one prefix at a time, in float64."""
    total = 0.0
    with torch.no_grad():
        for t in range(1, len(ids)):
            logits = model.hidden_states(torch.tensor([ids[:t]]))[0, -1]
            scores = model.de_embedding_proj.weight @ logits
            total += scores.log_softmax(0)[ids[t]].item()
    return total


@pytest.mark.slow
def test_both_variants_equal_a_slow_float64_scorer():
    pairs, model, tokenizer = make_pairs(), make_model(), SpaceTokenizer()
    double = make_model().double()
    right: dict[str, dict[str, list[bool]]] = {v: {} for v in ("no_bos", "eos_prefix")}
    for pair in pairs:
        bare = [slow_log_prob(double, tokenizer.encode(t)) for t in pair.texts()]
        spaced = [slow_log_prob(double, [0, *tokenizer.encode(" " + t)]) for t in pair.texts()]
        right["no_bos"].setdefault(pair.uid, []).append(bare[0] > bare[1])
        right["eos_prefix"].setdefault(pair.uid, []).append(spaced[0] >= spaced[1])
    result = run(model, pairs)
    for row in result.tables["blimp_paradigms"]:
        for variant, own in right.items():
            assert row[variant] == pytest.approx(np.mean(own[row["uid"]]), abs=1e-12)
    for variant, own in right.items():
        u1, u2, u3 = (np.mean(own[uid]) for uid in ("u1", "u2", "u3"))
        name = f"eval/blimp/{variant}"
        assert result.metrics[f"{name}/accuracy"] == pytest.approx((u1 + u2 + u3) / 3)
        assert result.metrics[f"{name}/p1"] == pytest.approx((u1 + u2) / 2)
        assert result.metrics[f"{name}/p2"] == pytest.approx(u3)
    # Means over paradigms, which here differ from means over pairs.
    assert len({row["pairs"] for row in result.tables["blimp_paradigms"]}) > 1


def test_the_first_word_counts_only_with_a_prefix():
    model, tokenizer = make_model(), SpaceTokenizer()
    windows = blimp.windows([Pair("u", "p", "f", "cat", "dogs", "0")], tokenizer=tokenizer)
    assert [w.scored for w in windows["no_bos"]] == [0, 0]
    assert [list(w.ids) for w in windows["eos_prefix"]] == [
        [0, *tokenizer.encode(" cat")],
        [0, *tokenizer.encode(" dogs")],
    ]
    metrics = run(model, [Pair("u", "p", "f", "cat", "dogs", "0")]).metrics
    swapped = run(model, [Pair("u", "p", "f", "dogs", "cat", "0")]).metrics
    assert metrics["eval/blimp/no_bos/accuracy"] == swapped["eval/blimp/no_bos/accuracy"] == 0
    name = "eval/blimp/eos_prefix/accuracy"
    assert {metrics[name], swapped[name]} == {0.0, 1.0}


def test_identical_sentences_tie_wrong_without_and_right_with_a_prefix():
    pairs = [Pair("u", "p", "f", t, t, str(i)) for i, t in enumerate(["the cat", "a old cat sees"])]
    result = run(make_model(), pairs)
    (row,) = result.tables["blimp_paradigms"]
    assert (row["no_bos"], row["eos_prefix"], row["ties"]) == (0.0, 1.0, 2)
    assert (row["no_bos_ties"], row["eos_prefix_ties"]) == (2, 2)


def test_ties_are_counted_of_each_variant():
    """A single token is context only without a prefix, so that both sentences have nothing."""
    pairs = [Pair("u", "p", "f", *t, "0") for t in (("cat", "dogs"), ("the cat", "the dogs"))]
    (row,) = run(make_model(), pairs).tables["blimp_paradigms"]
    assert (row["no_bos_ties"], row["eos_prefix_ties"], row["ties"]) == (1, 0, 0)
    windows = blimp.windows(pairs, tokenizer=SpaceTokenizer())
    one = blimp.evaluate(make_model(), pairs=pairs, windows={"no_bos": windows["no_bos"]})
    (row,) = one.tables["blimp_paradigms"]
    assert (row["no_bos_ties"], row["ties"], "eos_prefix_ties" in row) == (1, 1, False)


def test_pairs_that_differ_in_unknown_words_alone_tie():
    class Forgetful(SpaceTokenizer):
        def encode(self, text: str) -> list[int]:
            known = [word if word in WORDS else "who" for word in text.split()]  # who: its unk
            return super().encode(" " * text.startswith(" ") + " ".join(known))

    pairs = [Pair("u", "p", "f", "the wug sleeps", "the wugs sleeps", "0")]
    windows = blimp.windows(pairs, tokenizer=Forgetful())
    (row,) = blimp.evaluate(make_model(), pairs=pairs, windows=windows).tables["blimp_paradigms"]
    assert (row["no_bos"], row["eos_prefix"]) == (0.0, 1.0)
    assert (row["no_bos_ties"], row["eos_prefix_ties"]) == (1, 1)


def test_a_diverged_model_has_no_accuracy():
    model = make_model()
    with torch.no_grad():
        model.output_norm.weight.fill_(float("nan"))
    result = run(model, make_pairs(10))
    assert len(result.metrics) == 6  # of both variants: all, p1, p2
    assert all(math.isnan(value) for value in result.metrics.values())
    for row in result.tables["blimp_paradigms"]:
        assert math.isnan(row["no_bos"])
        assert math.isnan(row["eos_prefix"])


def test_a_score_that_is_not_a_number_spoils_the_means_over_it_and_no_other(monkeypatch):
    pairs = [
        Pair(uid, phenomenon, "syntax", "the cat sees", "the cat see", str(i))
        for i, (uid, phenomenon) in enumerate(
            [("u1", "p1"), ("u1", "p1"), ("u2", "p1"), ("u3", "p2")]
        )
    ]
    bare = [[-1, -2], [-2, -1], [-1, math.nan], [-math.inf, -math.inf]]
    spaced = [[-1, -2], [-2, -1], [math.nan, -1], [-math.inf, -math.inf]]
    monkeypatch.setattr(blimp, "score", lambda *_, **__: np.ravel([bare, spaced]).astype(float))
    result = run(make_model(), pairs)
    rows = {row["uid"]: row for row in result.tables["blimp_paradigms"]}
    for variant, tie in (("no_bos", 0.0), ("eos_prefix", 1.0)):
        assert (rows["u1"][variant], rows["u3"][variant]) == (0.5, tie)
        assert math.isnan(rows["u2"][variant])
        metrics = {m: result.metrics[f"eval/blimp/{variant}/{m}"] for m in ("accuracy", "p1", "p2")}
        assert metrics.pop("p2") == tie
        assert all(map(math.isnan, metrics.values()))


@pytest.mark.parametrize("tokens", [8, 100])
def test_decisions_do_not_depend_on_the_batches(monkeypatch, tokens):
    pairs, model = make_pairs(), make_model()
    result = run(model, pairs)
    monkeypatch.setattr(scoring, "BATCH_TOKENS", {"cpu": tokens})
    assert run(model, pairs) == result
    assert run(model, pairs[::-1]).metrics == pytest.approx(result.metrics)


def test_two_ranks_together_equal_one():
    pairs, model, shares = make_pairs(), make_model(), []

    def collect(tensor):
        shares.append(tensor.clone())
        return tensor

    for rank in range(2):
        run(model, pairs, rank=rank, world=2, reduce=collect)
    assert run(model, pairs, rank=0, world=2, reduce=lambda _: sum(shares)) == run(model, pairs)


def test_a_sentence_longer_than_the_model_is_one_line():
    pairs = [Pair("u", "p", "f", "the cat sees", "the cat sees the old dogs", "0")]
    with pytest.raises(ConfigError, match=r"^model\.max_seq_len must be >= 6 .*got 4.*valid: 6$"):
        run(make_model(max_seq_len=4), pairs)


def record(uid: str = "passive_1", **changed: object) -> dict[str, object]:
    base = {
        "sentence_good": "The cat sees.",
        "sentence_bad": "The cat see.",
        "field": "syntax",
        "linguistics_term": "argument_structure",
        "UID": uid,
        "pairID": "0",
    }
    return {**base, **changed}


def lines(*records: object) -> bytes:
    return b"".join(
        (r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records
    )


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, f"w:{path.suffix[1:]}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


FILES = {
    "passive_1.jsonl": lines(record(), record(pairID="1", sentence_good="Dogs sleep.")),
    "island.jsonl": lines(record("island", linguistics_term="island_effects"), b""),
}


def test_folder_repository_and_archives_give_the_same_pairs(tmp_path):
    inside = {f"blimp/data/{name}": content for name, content in FILES.items()}
    noise = {"blimp/data/._passive_1.jsonl": b"\0", "blimp/raw_results/summary.jsonl": b"{}\n"}
    places = [
        write(tmp_path / "flat", FILES),
        write(tmp_path / "repository", inside),
        write(
            tmp_path / "repository2" / "blimp",
            {n.removeprefix("blimp/"): c for n, c in inside.items()},
        ),
        pack(tmp_path / "a.tar.xz", inside | noise),
        pack(tmp_path / "b.tar.gz", inside),
        pack(tmp_path / "c.tar.gz", FILES),
    ]
    configs = [BlimpConfig(path=str(place)) for place in places]
    loaded = [blimp.load(config) for config in configs]
    assert [(p.uid, p.pair_id) for p in loaded[0]] == [
        ("island", "0"),
        ("passive_1", "0"),
        ("passive_1", "1"),
    ]
    assert all(pairs == loaded[0] for pairs in loaded)
    assert len({blimp.inspect(config) for config in configs}) == 1
    changed = write(tmp_path / "changed", FILES | {"island.jsonl": lines(record("island"))})
    assert blimp.inspect(BlimpConfig(path=str(changed))) != blimp.inspect(configs[0])


def test_zip_archives_and_the_hubs_files_give_the_same_pairs(tmp_path):
    """The hub has a folder for each paradigm, `pair_id` as a number, and more columns."""
    original = BlimpConfig(path=str(write(tmp_path / "flat", FILES)))
    with zipfile.ZipFile(tmp_path / "BLiMP.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in FILES.items():
            archive.writestr(f"blimp-master/data/{name}", content)
        archive.writestr("__MACOSX/data/._island.jsonl", b"\0")
    for name, content in FILES.items():
        rows = [json.loads(line) for line in content.splitlines() if line]
        for row in rows:
            row |= {"pair_id": int(row.pop("pairID")), "simple_LM_method": True}
        uid = name.removesuffix(".jsonl")
        for layout in ("train-00000-of-00001.parquet", "train/0000.parquet"):
            file = tmp_path / layout[:6] / uid / layout
            file.parent.mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows), file)
        write(tmp_path / "lines" / uid, {"train.jsonl": lines(*rows)})
    want = blimp.load(original)
    for place in ("BLiMP.zip", "train-", "train/", "lines"):
        config = BlimpConfig(path=str(tmp_path / place))
        assert blimp.load(config) == want, place
        assert blimp.inspect(config) == blimp.inspect(original)
        assert blimp.notes(config) == []
    shutil.move(tmp_path / "lines" / "island", tmp_path / "lines" / "peninsula")
    with pytest.raises(ConfigError, match="UID must be the file's name 'peninsula', got 'island'"):
        blimp.inspect(BlimpConfig(path=str(tmp_path / "lines")))
    (tmp_path / "cut.zip").write_bytes((tmp_path / "BLiMP.zip").read_bytes()[:-40])
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.parquet").write_bytes(b"PAR1")
    for place in ("cut.zip", "rows"):
        with pytest.raises(ConfigError, match=r"^eval\.blimp\.path[^\n]*readable"):
            blimp.inspect(BlimpConfig(path=str(tmp_path / place)))


def test_max_pairs_keeps_the_first_of_each_paradigm(tmp_path):
    write(tmp_path, FILES)
    loaded = blimp.load(BlimpConfig(path=str(tmp_path), max_pairs=1))
    assert [(p.uid, p.pair_id) for p in loaded] == [("island", "0"), ("passive_1", "0")]


def test_spellings_of_phenomenon_and_field_are_joined(tmp_path):
    odd = record(linguistics_term="s-selection", field="syntax/semantics")
    write(tmp_path, {"passive_1.jsonl": lines(odd)})
    (pair,) = blimp.load(BlimpConfig(path=str(tmp_path)))
    assert (pair.phenomenon, pair.field) == ("argument_structure", "syntax_semantics")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines(record(), b'{"sentence_good": "cut'), "passive_1.jsonl line 2: not JSON"),
        (lines(record(), b'{"a": "\xff"}'), "passive_1.jsonl line 2: not JSON"),
        (lines(b"3"), "passive_1.jsonl line 1: expected an object, got b'3'"),
        (
            lines({"sentence_good": "x"}),
            "line 1: expected a field 'sentence_bad', got sentence_good",
        ),
        (lines(record(pairID=[3])), "pair 1: 'pairID' must be a string, got [3]"),
        (lines(record(sentence_bad=" ")), "passive_1.jsonl: pair 0 must be two sentences"),
        (
            lines(record("other")),
            "passive_1.jsonl: UID must be the file's name 'passive_1', got 'other'",
        ),
        (b"", "passive_1.jsonl must hold at least one pair"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_file_is_one_line_that_names_file_and_line(tmp_path, content, message, packed):
    files = {"passive_1.jsonl": content}
    path = pack(tmp_path / "x.tar.xz", files) if packed else write(tmp_path / "x", files)
    with pytest.raises(ConfigError, match=r"^eval\.blimp\.path[^\n]*$") as error:
        blimp.inspect(BlimpConfig(path=str(path)))
    assert message in str(error.value)


def test_a_bad_path_or_archive_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar.xz").write_text("no archive")
    packed = pack(tmp_path / "whole.tar.xz", FILES).read_bytes()
    (tmp_path / "cut.tar.xz").write_bytes(packed[:-60])  # all members are there, the end is not
    (tmp_path / "half.tar.xz").write_bytes(packed[: len(packed) // 2])
    damaged = bytearray(pack(tmp_path / "whole.tar.gz", FILES).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.tar.gz").write_bytes(damaged)
    pack(tmp_path / "other.tar.gz", {"readme.txt": b"x"})
    cases = {
        "whole.tar.zx": "whole.tar.xz'?",
        "empty": "must hold <UID>.jsonl",
        "text.tar.xz": "must be a folder or a readable .tar.xz",
        "cut.tar.xz": "must be a folder or a readable .tar.xz",
        "half.tar.xz": "must be a folder or a readable .tar.xz",
        "damaged.tar.gz": "must be a folder or a readable .tar.xz",
        "other.tar.gz": "found none in",
    }
    for name, message in cases.items():
        with pytest.raises(ConfigError, match=r"^eval\.blimp\.path[^\n]*$") as error:
            blimp.inspect(BlimpConfig(path=str(tmp_path / name)))
        assert message in str(error.value)


@needs_blimp
def test_blimp_itself_has_67_paradigms_and_the_papers_12_phenomena():
    pairs = blimp.load(BlimpConfig(path=str(SHARED / "blimp_data.tar.xz")))
    assert set(Counter(p.uid for p in pairs).values()) == {1000}
    assert len({p.uid for p in pairs}) == 67
    assert {p.field for p in pairs} == {"morphology", "syntax", "semantics", "syntax_semantics"}
    same = Counter(p.uid for p in pairs if p.good == p.bad)
    assert same == {"passive_1": 2, "principle_A_case_2": 5}
    reference = json.loads((SHARED / "reference_accuracies.json").read_text())
    paradigms = Counter(phenomenon for _, phenomenon in {(p.uid, p.phenomenon) for p in pairs})
    assert paradigms == {k: v["paradigms"] for k, v in reference["phenomena"].items()}
    assert len(paradigms) == 12
