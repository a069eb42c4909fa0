"""Which evals a run has, what planning learns of them, and that they run end to end."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from data_files import write_bpe, write_words

from relora_core import evals
from relora_core.config import (
    GRAMMAR_DOCUMENTS,
    ConfigError,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from relora_core.data.grammar import REGISTERS, GrammarTokenizer
from relora_core.evals import base, blimp
from relora_core.model import Decoder


def make_config(kind: str = "grammar", *, tokenizer: str | None = None) -> RunConfig:
    path = None if kind == "grammar" else "anywhere"
    config = RunConfig(
        model=ModelConfig(
            d_model=16,
            d_ff=32,
            n_layers=2,
            n_heads=4,
            max_seq_len=256,
            vocab_size=GrammarTokenizer().vocab_size,
        ),
        train=TrainConfig(steps=1, batch_size=1),
        data=DataConfig(kind=kind, path=path, tokenizer=tokenizer, seq_len=64),
    )
    config.eval.paloma.enabled = config.eval.blimp.enabled = True
    return config


def write_paloma(folder: Path, text: str) -> str:
    file = folder / "wiki" / "val" / "wiki.jsonl.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress(json.dumps({"text": text}).encode() + b"\n"))
    return str(folder)


def write_blimp(folder: Path, content: str) -> str:
    folder.mkdir()
    (folder / "u.jsonl").write_text(content)
    return str(folder)


def test_on_the_grammar_both_evals_run_on_its_own_texts():
    config = make_config()
    config.eval.paloma.max_documents = 3
    config.eval.blimp.max_pairs = 4
    config.eval.blimp.every_steps = 5
    assert evals.inspect(config) == {"paloma": None, "blimp": None}
    torch.manual_seed(0)
    model = Decoder(config.model)
    prepared = {e.name: e for e in evals.prepare(config, GrammarTokenizer())}
    assert {name: e.every_steps for name, e in prepared.items()} == {"paloma": None, "blimp": 5}

    paloma = prepared["paloma"].run(model)
    rows = paloma.tables["paloma_domains"]
    assert {(row["source"], row["documents"]) for row in rows} == {(r, 3) for r in REGISTERS}
    # Fresh weights know nothing: perplexity is near the vocabulary's size.
    vocab_size = GrammarTokenizer().vocab_size
    assert 0.5 * vocab_size < paloma.metrics["eval/paloma/perplexity"] < 2 * vocab_size
    assert 0.5 * vocab_size < paloma.metrics["eval/paloma/paper_perplexity"] < 2 * vocab_size

    pairs = prepared["blimp"].run(model)
    assert {row["pairs"] for row in pairs.tables["blimp_paradigms"]} == {4}
    phenomena = {n.split("/")[-1] for n in pairs.metrics if "/no_bos/" in n} - {"accuracy"}
    assert len(phenomena) == 12
    assert all(0 <= value <= 1 for value in pairs.metrics.values())


def test_limits_only_lower_the_grammars_counts():
    config = make_config()
    config.eval.paloma.max_documents = 10**6
    build = {e.name: e.build for e in evals.prepare(config, GrammarTokenizer())}
    documents = build["paloma"]().keywords["documents"]
    assert len(documents) == GRAMMAR_DOCUMENTS * len(REGISTERS)


def test_texts_are_tokenised_once_however_often_a_run_evaluates():
    calls = []

    class Counting(GrammarTokenizer):
        def encode_batch(self, texts):
            calls.append(len(texts))
            return super().encode_batch(texts)

    config = make_config()
    config.eval.paloma.max_documents = config.eval.blimp.max_pairs = 2
    model = Decoder(config.model)
    prepared = evals.prepare(config, Counting())
    assert calls == []
    first = [e.run(model) for e in prepared]
    once = len(calls)
    assert [e.run(model) for e in prepared] == first
    assert len(calls) == once > 0


def test_texts_are_encoded_some_characters_at_a_time(monkeypatch):
    given = []

    def encode_batch(texts: list[str]) -> list[list[int]]:
        given.append([len(t) for t in texts])
        return [[len(t)] for t in texts]

    monkeypatch.setattr(base, "PORTION", 10)
    texts = ["x" * n for n in (4, 6, 1, 12, 0, 3)]
    ids = base.encode(texts, SimpleNamespace(encode_batch=encode_batch))  # type: ignore[arg-type]
    assert [int(i[0]) for i in ids] == [4, 6, 1, 12, 0, 3]
    assert given == [[4, 6], [1], [12], [0, 3]]
    assert base.encode([], SimpleNamespace()) == []  # type: ignore[arg-type]


def test_windows_stay_within_the_positions_that_training_reached():
    config = make_config()
    (paloma,) = (e for e in evals.prepare(config, GrammarTokenizer()) if e.name == "paloma")
    assert paloma.build().keywords["max_len"] == config.data.seq_len < config.model.max_seq_len


def test_without_a_path_other_data_have_no_evals():
    config = make_config("pretokenized")
    assert evals.inspect(config) == {}
    assert evals.prepare(config, None) == []


def test_a_disabled_eval_is_not_even_looked_at():
    config = make_config()
    config.eval.blimp.enabled = False
    config.eval.blimp.path = "/nowhere"
    assert list(evals.inspect(config)) == ["paloma"]
    assert [e.name for e in evals.prepare(config, GrammarTokenizer())] == ["paloma"]


def test_text_needs_a_tokenizer(tmp_path):
    config = make_config("pretokenized")
    config.eval.paloma.path = write_paloma(tmp_path / "paloma", "Tom sleeps.")
    message = r"^data\.tokenizer must name a tokenizer, since eval\.paloma [^\n]*$"
    with pytest.raises(ConfigError, match=message):
        evals.inspect(config)
    with pytest.raises(ConfigError, match=message):
        evals.prepare(config, None)
    config.data.tokenizer = str(write_bpe(tmp_path / "tokenizer"))
    assert list(evals.inspect(config)) == ["paloma"]


PAIR = '{"sentence_good": "%s", "sentence_bad": "a b", "field": "f", "linguistics_term": "l", '
PAIR += '"UID": "u", "pairID": "0"}\n'


def words_without_unk(folder: Path) -> str:
    """Knows `a` and `b`; anything else is an error of its library."""
    file = write_words(folder, ["a", "b"]) / "tokenizer.json"
    record = json.loads(file.read_text())
    record["model"]["unk_token"] = "[UNK]"
    file.write_text(json.dumps(record))
    return str(folder)


def test_texts_that_a_tokenizer_cannot_encode_are_found_while_planning(tmp_path):
    config = make_config("text", tokenizer=words_without_unk(tmp_path / "tokenizer"))
    config.eval.paloma.path = write_paloma(tmp_path / "paloma", "a b")
    config.eval.blimp.path = write_blimp(tmp_path / "blimp", PAIR % "b a")
    assert set(evals.inspect(config)) == {"paloma", "blimp"}
    config.eval.paloma.path = write_paloma(tmp_path / "other", "a c")
    with pytest.raises(
        ConfigError, match=r"^eval\.paloma\.path=.*/other: .*'a c': .*\[UNK\]"
    ) as at:
        evals.inspect(config)
    assert "\n" not in str(at.value)
    config.eval.paloma.enabled = False
    config.eval.blimp.path = write_blimp(tmp_path / "pairs", PAIR % "c")
    with pytest.raises(ConfigError, match=r"^eval\.blimp\.path=.*/pairs: .*'c': .*UNK"):
        evals.inspect(config)


@pytest.mark.parametrize("knows_all", [True, False])
def test_what_would_end_the_last_evaluation_is_found_while_planning(tmp_path, knows_all):
    folder = tmp_path / "tokenizer"
    tokenizer = str(write_words(folder, ["a", "b"])) if knows_all else words_without_unk(folder)
    config = make_config("text", tokenizer=tokenizer)
    config.eval.paloma.path = write_paloma(tmp_path / "paloma", " ")
    with pytest.raises(ConfigError, match=r"^eval\.paloma.*domain wiki/wiki must hold tokens"):
        evals.inspect(config)
    config.eval.paloma.enabled = False
    config.eval.blimp.path = write_blimp(tmp_path / "blimp", PAIR % ("a " * 300).strip())
    with pytest.raises(
        ConfigError, match=r"model\.max_seq_len must be >= 300 .*nearest valid: 300"
    ):
        evals.inspect(config)
    config.model.max_seq_len = 300
    evals.inspect(config)


def test_a_sentence_without_tokens_is_found_while_planning(tmp_path):
    """Else two such sentences tie, which `eos_prefix` counts as right; one ends the evaluation."""
    file = write_bpe(tmp_path / "tokenizer") / "tokenizer.json"
    record = json.loads(file.read_text())
    record["pre_tokenizer"] = None  # it drops what is beyond ASCII now
    file.write_text(json.dumps(record))
    config = make_config("text", tokenizer=str(file))
    config.eval.blimp.path = write_blimp(tmp_path / "pairs", PAIR % r"\u732b \u72ac")
    with pytest.raises(
        ConfigError,
        match=r"^eval\.blimp\.path=.*/pairs: a sentence must hold tokens, got none of '猫 犬'$",
    ):
        evals.inspect(config)


def test_a_tokenizer_must_fit_the_model():
    config = make_config()
    tokenizer = GrammarTokenizer()
    config.model.vocab_size = tokenizer.vocab_size - 1
    with pytest.raises(
        ConfigError, match=rf"^model\.vocab_size must be >= {tokenizer.vocab_size} "
    ):
        evals.prepare(config, tokenizer)
    config.model.vocab_size = tokenizer.vocab_size
    assert len(evals.prepare(config, tokenizer)) == 2


def test_words_beyond_the_grammar_are_found_while_planning(tmp_path):
    config = make_config()
    config.eval.paloma.path = write_paloma(tmp_path / "paloma", "Quaternions abound.")
    with pytest.raises(
        ConfigError, match=r"^eval\.paloma\.path must hold words of the grammar[^\n]*"
    ):
        evals.inspect(config)


def test_pairs_of_the_grammar_may_come_from_a_folder(tmp_path):
    pair = blimp.grammar_pairs(1)[0]
    record = {
        "sentence_good": pair.good,
        "sentence_bad": pair.bad,
        "field": pair.field,
        "linguistics_term": pair.phenomenon,
        "UID": "u",
        "pairID": "0",
    }
    config = make_config()
    config.eval.blimp.path = write_blimp(tmp_path / "pairs", json.dumps(record) + "\n")
    assert len(evals.inspect(config)["blimp"] or "") == 64
    config.eval.blimp.path = write_blimp(tmp_path / "cut", json.dumps(record)[:-9] + "\n")
    with pytest.raises(ConfigError, match=r"^eval\.blimp\.path: u\.jsonl line 1: [^\n]*$"):
        evals.inspect(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paloma", "blimp"])
def test_reduced_precision_is_another_run_and_reaches_the_eval(name):
    from experiments.identity import scientific

    metrics = {}
    for precision in ("fp32", "bf16"):
        config = make_config()
        config.eval.paloma.max_documents, config.eval.blimp.max_pairs = 2, 200
        getattr(config.eval, name).precision = precision
        entry = scientific(config).get(f"eval.{name}.precision")
        assert entry == (None if precision == "fp32" else "bf16")  # older runs keep their names
        torch.manual_seed(0)
        model = Decoder(config.model)
        (evaluation,) = (e for e in evals.prepare(config, GrammarTokenizer()) if e.name == name)
        metrics[precision] = evaluation.run(model).metrics
    assert metrics["fp32"] != metrics["bf16"]
    for key, value in metrics["fp32"].items():
        assert metrics["bf16"][key] == pytest.approx(value, rel=0.05, abs=0.1)
