"""Models of transformers: log-probabilities against their own logits, weights, and bad input."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from relora_core import foreign
from relora_core.config import BlimpConfig, ConfigError
from relora_core.evals import blimp, paloma
from relora_core.evals.base import Window
from relora_core.evals.scoring import score
from tests.foreign_models import PAIRS, VOCAB, make, needs_transformers, save, save_texts

pytestmark = needs_transformers
KINDS = ("gpt2", "llama")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Kind -> what `load` makes of its folder."""
    kept = {}

    def load(kind: str) -> foreign.Loaded:
        if kind not in kept:
            folder = save(tmp_path_factory.mktemp(kind), kind)
            kept[kind] = foreign.load(str(folder), name=kind)
        return kept[kind]

    return load


def straightforward(model, ids) -> np.ndarray:
    """log p of ids[1:], a sequence at a time, from all logits of a float64 copy: (T - 1,)."""
    ids = torch.as_tensor(np.asarray(ids, dtype=np.int64))
    with torch.no_grad():
        table = model.double()(input_ids=ids[None]).logits[0].log_softmax(dim=1)
    return table[:-1].gather(1, ids[1:, None])[:, 0].numpy()


# scores -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [*KINDS, "neox", "gptj"])
def test_scores_are_those_of_the_models_own_logits(loaded, kind):
    """In batches of any size and in trees, whether or not the head can be used apart."""
    rng = np.random.default_rng(0)
    lengths, alphabets = rng.integers(2, 60, size=24), [VOCAB, 2] * 12  # of two: many begin alike
    drawn = [rng.integers(0, m, size=n) for m, n in zip(alphabets, lengths, strict=True)]
    windows = [Window(ids.astype(np.int32), max(1, len(ids) // 2)) for ids in drawn]
    own = make(kind)
    want = [straightforward(own, w.ids)[len(w.ids) - 1 - w.scored :].sum() for w in windows]
    model = loaded(kind).model
    assert model.split == (kind != "gptj")  # its head has a bias
    uniform = [-w.scored * np.log(VOCAB) for w in windows]
    assert np.abs(np.subtract(want, uniform)).max() > 3  # far from it
    assert model.shares_prefixes == (kind != "gptj")
    for batch_tokens, shared in ((1, False), (200, False), (None, True), (None, False)):
        scores = score(model, windows, batch_tokens=batch_tokens, share_prefixes=shared)
        np.testing.assert_allclose(scores, want, atol=5e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_blimp_both_ways_against_sums_written_out(loaded, kind, tmp_path):
    save_texts(tmp_path)
    pairs = blimp.load(BlimpConfig(path=str(tmp_path / "blimp")))
    one, own = loaded(kind), make(kind)
    windows = blimp.windows(pairs, tokenizer=one.tokenizer)
    table = blimp.evaluate(one.model, pairs=pairs, windows=windows).tables["blimp_paradigms"]
    encode = one.tokenizer.encode
    start = encode("<s>" if kind == "llama" else "</s>")
    assert len(start) == 1
    for row in table:
        texts = PAIRS[row["uid"]]
        bare = [[straightforward(own, encode(t)).sum() for t in pair] for pair in texts]
        after = [[straightforward(own, start + encode(f" {t}")).sum() for t in p] for p in texts]
        assert row["no_bos"] == np.mean([good > bad for good, bad in bare])
        assert row["eos_prefix"] == np.mean([good >= bad for good, bad in after])
        assert row["ties"] == sum(good == bad for good, bad in texts)


@pytest.mark.parametrize("kind", KINDS)
def test_perplexities_against_sums_written_out(loaded, kind):
    """A document of one window, and of three with their context; 16 tokens at most."""
    one, own = loaded(kind), make(kind)
    texts = ["the cat sleeps", "old dogs that sleep near cats under the dog was seen " * 3]
    ids = [np.array(one.tokenizer.encode(text), dtype=np.int32) for text in texts]
    assert len(ids[0]) < 16 < 32 < len(ids[1]) < 48
    documents = [paloma.Document("s", "s", text, "") for text in texts]
    start = one.tokenizer.start_id
    result = paloma.evaluate(
        one.model,
        documents=documents,
        ids=ids,
        eos_id=one.tokenizer.eos_id,
        prefix=start,
        max_len=16,
    )
    nats, rest = -straightforward(own, [start, *ids[0]]).sum(), ids[1]
    nats -= straightforward(own, [start, *rest[:16]]).sum()
    nats -= straightforward(own, rest[15:32]).sum()
    nats -= straightforward(own, rest[-17:])[-(len(rest) - 32) :].sum()
    count, size = sum(map(len, ids)), sum(len(text.encode()) for text in texts)
    metrics = result.metrics
    assert metrics["eval/paloma/perplexity"] == pytest.approx(np.exp(nats / count), rel=1e-5)
    assert metrics["eval/paloma/bits_per_byte"] == pytest.approx(nats / size / np.log(2), rel=1e-5)


def test_texts_begin_after_the_bos_and_documents_end_with_the_eos(loaded):
    llama, gpt2 = (loaded(kind).tokenizer for kind in ("llama", "gpt2"))
    assert (llama.start_id, llama.eos_id) == (llama.encode("<s>")[0], llama.encode("</s>")[0])
    assert llama.start_id != llama.eos_id
    assert gpt2.start_id == gpt2.eos_id == gpt2.encode("</s>")[0]
    pair = blimp.Pair("u", "p", "f", "the cat", "the dog", "0")
    for window in blimp.windows([pair], tokenizer=llama)["eos_prefix"]:
        assert window.ids[0] == llama.start_id
        assert window.scored == len(window.ids) - 1


# weights ----------------------------------------------------------------------------------------
def weights(one: foreign.Loaded, config) -> dict[str, torch.Tensor]:
    return dict(foreign.ForeignWeights(config).effective_weights(one.model))


def test_linears_have_our_names_and_the_shape_out_by_in(loaded, nano):
    llama, own = weights(loaded("llama"), nano()), make("llama").model.layers[1]
    assert len(llama) == 2 * 7
    assert torch.equal(llama["layers.1.attention.v_proj"], own.self_attn.v_proj.weight)
    assert torch.equal(llama["layers.1.swiglu.w_2"], own.mlp.down_proj.weight)
    gpt2, block = weights(loaded("gpt2"), nano()), make("gpt2").transformer.h[1]
    assert len(gpt2) == 2 * 6
    assert torch.equal(gpt2["layers.1.attention.v_proj"], block.attn.c_attn.weight[:, 64:].T)
    assert torch.equal(gpt2["layers.1.attention.o_proj"], block.attn.c_proj.weight.T)
    assert torch.equal(gpt2["layers.1.swiglu.w_2"], block.mlp.c_proj.weight.T)


def test_values_of_each_head_are_found_where_heads_take_turns(loaded, nano):
    """GPT-NeoX: what v_proj gives equals the values that the model's own attention takes."""
    one, block = loaded("neox"), make("neox").gpt_neox.layers[0]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    fused = (x @ block.attention.query_key_value.weight.T).view(5, 4, 3 * 8)
    values = fused[:, :, 16:].flatten(1)
    ours = x @ weights(one, nano())["layers.0.attention.v_proj"].T
    torch.testing.assert_close(ours, values)


# identity ---------------------------------------------------------------------------------------
def test_the_fingerprint_is_of_weights_settings_and_tokenizer(tmp_path):
    import transformers

    one = save(tmp_path / "one", "gpt2")
    first = foreign.load(str(one), name="x").fingerprint
    moved = save(tmp_path / "moved", "gpt2")
    assert foreign.load(str(moved), name="y").fingerprint == first
    other = transformers.AutoModelForCausalLM.from_pretrained(one)
    with torch.no_grad():
        other.transformer.ln_f.bias[3] += 1e-3
    other.save_pretrained(moved)
    assert foreign.load(str(moved), name="x").fingerprint != first
    save(tmp_path / "set", "gpt2", layer_norm_epsilon=1e-3)
    assert foreign.load(str(tmp_path / "set"), name="x").fingerprint != first


# bad input --------------------------------------------------------------------------------------
def edited(folder: Path, **changes: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_the_fingerprint_is_of_the_code_that_a_model_brings(tmp_path, monkeypatch):
    """Where transformers puts it: a package that it makes of the model's folder."""
    package = tmp_path / "transformers_modules" / "theirs"
    package.mkdir(parents=True)
    (package / "modeling.py").write_text("class Own:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("transformers_modules.theirs.modeling")
    model, tokenizer = make("gpt2"), SimpleNamespace(digest="t")
    plain = foreign.fingerprint(model, tokenizer=tokenizer)
    model.__class__ = type("Brought", (module.Own, type(model)), {"__module__": module.__name__})
    monkeypatch.setattr(inspect, "getfile", lambda made: str(package / "modeling.py"))
    first = foreign.fingerprint(model, tokenizer=tokenizer)
    (package / "helper.py").write_text("SIGN = -1\n")
    assert len({plain, first, foreign.fingerprint(model, tokenizer=tokenizer)}) == 3


def without(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


def unset(folder: Path) -> Path:
    model = make("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    save(folder, "gpt2")
    model.save_pretrained(folder)
    return folder


def foreign_code(folder: Path) -> Path:
    save(folder, "gpt2")
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    auto = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    return edited(folder, model_type="own", auto_map=auto)


BAD = {
    "no such folder": (lambda f: f / "absent" / "x", "no such path"),
    "no model": (lambda f: f, "without a config.json"),
    "not causal": (lambda f: save(f, "bert"), "must be causal, got BertLMHeadModel"),
    "no head": (lambda f: save(f, "headless"), "without lm_head.weight"),
    "nan": (unset, "finite logits"),
    "another kind": (lambda f: edited(save(f, "gpt2"), model_type="t5"), "model_type='t5'"),
    "no weights": (lambda f: without(save(f, "gpt2"), "model.safetensors"), "got '"),
    "no tokenizer": (
        lambda f: without(save(f, "gpt2"), "tokenizer.json", "tokenizer_config.json"),
        "must have a tokenizer, got none",
    ),
    "own code": (foreign_code, "--trust-remote-code runs it"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, tmp_path):
    make_it, words = BAD[case]
    source = make_it(tmp_path)
    with pytest.raises(ConfigError) as caught:
        foreign.load(str(source), name="x")
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("MODEL must")
    assert words in line
    assert len(line) < 600
    assert not (tmp_path / "ran").exists()


def test_a_hub_name_is_pinned_to_a_commit_or_says_why_not(monkeypatch):
    asked = []

    def commit(name, revision, *, repo_type):
        asked.append((name, revision, repo_type))
        if name != "gpt2":
            raise LookupError("the hub has none of that name")
        return "c0ffee"

    monkeypatch.setattr(foreign, "commit_of", commit)
    place = foreign._place("gpt2", revision="v1")
    assert place == {"pretrained_model_name_or_path": "gpt2", "revision": "c0ffee"}
    assert asked == [("gpt2", "v1", "model")]
    with pytest.raises(ConfigError, match=r"got 'gtp2': no such local path, and the hub has none"):
        foreign._place("gtp2", revision=None)


def test_without_transformers_the_line_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(foreign, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[transformers\]'"):
        foreign.load(str(tmp_path), name="x")


def test_a_pass_makes_no_more_logits_than_it_may(loaded, monkeypatch):
    """Where the head cannot be used apart; a GPU's batches are of 65,536 tokens."""
    model, seen = loaded("gptj").model, []
    logits = model.logits
    monkeypatch.setattr(foreign, "PASS_LOGITS", 4 * VOCAB * 64)
    monkeypatch.setattr(model, "logits", lambda ids: (seen.append(ids.numel()), logits(ids))[1])
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, VOCAB, size=n).astype(np.int32) for n in range(2, 30)]
    windows = [Window(ids, max(1, len(ids) // 2)) for ids in drawn]
    alone = score(model, windows, batch_tokens=1)
    seen.clear()
    together = score(model, windows, batch_tokens=65536)
    assert 1 < len(seen) < len(windows)
    assert max(seen) <= 64
    np.testing.assert_allclose(together, alone, atol=5e-4, rtol=1e-5)
