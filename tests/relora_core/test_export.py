"""Exported folders through transformers; names there and back; one line per bad input."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.optim import Optimizer

from experiments.__main__ import main
from experiments.disk.run_dir import RunDir
from relora_core import checkpoint, export
from relora_core.checkpoint import Progress
from relora_core.config import ConfigError, ModelConfig
from relora_core.data import grammar
from relora_core.data.base import DataError
from relora_core.methods import REGISTRY, build_method
from relora_core.methods.base import Method
from relora_core.model import Decoder
from tests.conftest import nano_config

RUN = "nano-run"


def random_ids(vocab_size: int, *, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab_size, (3, 30), generator=torch.Generator().manual_seed(seed))


def trained(config, *, steps: int) -> tuple[Decoder, Method, Optimizer]:
    """After updates on random rows, restarts included."""
    torch.manual_seed(config.seed)
    model = Decoder(config.model)
    method = build_method(config)
    method.adapt(model)
    optimizer = method.build_optimizer(model)
    method.set_phase(0, model)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = config.train.lr
        rows = random_ids(config.model.vocab_size, seed=step)
        model(rows[:, :-1], rows[:, 1:]).backward()
        method.before_update(step, model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(step + 1, model, optimizer)
        method.set_phase(step + 1, model)
    return model.eval(), method, optimizer


def save_run(output: Path, config, *, steps: int = 6) -> Decoder:
    """A run directory with one checkpoint of `trained`; returns its model."""
    model, method, optimizer = trained(config, steps=steps)
    run_dir = RunDir(output / "runs" / RUN)
    run_dir.create(config)
    progress = Progress(step=steps, method=method.state_dict())
    with checkpoint.Writer(run_dir.checkpoints, keep_last=2) as writer:
        writer.save(model=model, optimizer=optimizer, progress=progress, rng=[])
    return model


def grammar_config(nano, **changes):
    sizes = {"vocab_size": grammar.VOCAB_SIZE, "rope_theta": 500.0, "max_seq_len": 64}
    return nano(**{"model": sizes, "relora": {"dropout": 0.2}, **changes})


def llama_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model) is transformers.LlamaForCausalLM
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("method", REGISTRY)
def test_exported_logits_are_the_runs(nano, tmp_path, method):
    """6 steps with a restart after 4: B is not zero, and W holds a merge."""
    config = grammar_config(nano, method=method)
    model = save_run(tmp_path, config)
    adapters = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    assert bool(adapters) == (method in ("lora", "relora", "switchlora", "sltrain"))
    assert all(p.abs().max() > 1e-3 for p in adapters.values())
    before = torch.get_rng_state()
    folder = tmp_path / "out" / "model"
    assert main(["export", RUN, str(folder), "--output-dir", str(tmp_path)]) == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.name for p in folder.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    ids = random_ids(grammar.VOCAB_SIZE)
    with torch.no_grad():
        ours = model.logits(ids)
    torch.testing.assert_close(llama_logits(folder, ids), ours, atol=1e-5, rtol=0)
    assert ours.std() > 0.3  # so that 1e-5 says something
    _, state = export.read_model(folder)
    plain = Decoder(config.model)
    plain.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(plain.logits(ids), ours, atol=1e-5, rtol=0)


def test_config_says_what_transformers_would(nano, tmp_path):
    """Read back, nothing falls to a default of Llama's that is not the model's."""
    model = grammar_config(nano).model
    (tmp_path / "config.json").write_text(json.dumps(export.llama_config(model, eos_id=0)))
    read = transformers.LlamaConfig.from_pretrained(tmp_path)
    want = transformers.LlamaConfig(
        vocab_size=grammar.VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_theta=500.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    )
    written, expected = read.to_dict(), want.to_dict()
    written.pop("rope_theta", None)  # for older readers
    assert written == expected


@given(
    heads=st.sampled_from([(4, 1), (4, 2), (6, 3), (2, 2)]),
    half=st.integers(1, 5),
    layers=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_to_llama_and_back_is_bit_exact(heads, half, layers, seed):
    n_heads, n_kv_heads = heads
    shape = ModelConfig(
        d_model=2 * half * n_heads,
        d_ff=7,
        n_layers=layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=11,
        max_seq_len=8,
    )
    torch.manual_seed(seed)
    state = Decoder(shape).state_dict()
    llama = export.to_llama(state, model=shape)
    back = export.from_llama(llama, model=shape)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    again = export.to_llama(back, model=shape)
    assert all(torch.equal(again[name], tensor) for name, tensor in llama.items())


def test_rows_of_a_head_go_to_the_halves():
    """By hand: head_dim 6, two heads. New row j is old 2j, new row 3 + j is old 2j + 1."""
    shape = ModelConfig(d_model=12, d_ff=4, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=5)
    state = Decoder(shape).state_dict()
    rows = torch.arange(12.0)[:, None].expand(12, 12).contiguous()
    state["layers.0.attention.q_proj.weight"] = rows
    state["layers.0.attention.v_proj.weight"] = rows[:6].contiguous()
    llama = export.to_llama(state, model=shape)
    q = llama["model.layers.0.self_attn.q_proj.weight"][:, 0].tolist()
    assert q == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert torch.equal(llama["model.layers.0.self_attn.v_proj.weight"], rows[:6])


@pytest.mark.parametrize("method", ["relora", "full_rank"])
def test_the_runs_own_numbers_survive_read_model(nano, tmp_path, method):
    config = grammar_config(nano, method=method)
    save_run(tmp_path, config)
    (step,) = checkpoint.complete(tmp_path / "runs" / RUN / "checkpoints")
    export.export_run(config, checkpoint=step, folder=tmp_path / "llama")
    shape, state = export.read_model(tmp_path / "llama")
    assert dataclasses.replace(shape, name="nano") == config.model
    merged = export.merged_state(config, checkpoint=step)
    assert state.keys() == merged.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in merged.items())


def test_a_checkpoint_from_before_the_scale_was_remembered_is_merged(nano, tmp_path):
    config = grammar_config(nano, relora={"scaling": "trainable", "after_merge": "restore"})
    save_run(tmp_path, config)
    (step,) = checkpoint.complete(tmp_path / "runs" / RUN / "checkpoints")
    now = export.merged_state(config, checkpoint=step)
    file, *_ = checkpoint.weight_files(step)
    saved = load_file(file)
    old = {name: t for name, t in saved.items() if not name.endswith("master_scalar")}
    assert len(old) < len(saved)
    save_file(old, file)
    before = export.merged_state(config, checkpoint=step)
    assert all(torch.equal(before[name], tensor) for name, tensor in now.items())


# tokenizers ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def exported_grammar(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grammar")
    save_run(folder, grammar_config(nano_config, method="full_rank"), steps=1)
    main(["export", RUN, str(folder / "llama"), "--output-dir", str(folder)])
    return transformers.AutoTokenizer.from_pretrained(folder / "llama")


def test_exported_tokenizer_encodes_as_the_grammars(exported_grammar):
    ours = grammar.GrammarTokenizer()
    texts = [t for name in grammar.REGISTERS for t in grammar.documents(name, 20, seed=3)]
    pairs = grammar.minimal_pairs(pairs_per_paradigm=5, seed=2)
    texts += [f" {record['sentence_bad']}" for record in pairs]
    texts += ["", " ", "THE king\u00a0sleeps ,.: The\x1cboy?\n"]
    assert exported_grammar(texts)["input_ids"] == ours.encode_batch(texts)
    assert exported_grammar.eos_token_id == ours.eos_id
    for text in texts[:20]:
        ids = ours.encode(text)
        assert exported_grammar.decode(ids) == text.lower()
        assert exported_grammar.decode([*ids, ours.eos_id], skip_special_tokens=True).strip()


def test_exported_tokenizer_pads_left(exported_grammar):
    one, two = exported_grammar(["the king", "the king sleeps"], padding=True)["input_ids"]
    assert one == [exported_grammar.pad_token_id, *two[:2]]


def test_an_exported_model_generates_without_a_prompt(exported_grammar):
    model = transformers.AutoModelForCausalLM.from_pretrained(exported_grammar.name_or_path)
    ids = model.generate(max_new_tokens=5, do_sample=False)
    assert ids[0, 0] == exported_grammar.eos_token_id
    assert 1 < ids.shape[1] <= 6
    prompts = exported_grammar(["the king", "the"], padding=True, return_tensors="pt")
    prompts.pop("token_type_ids", None)
    two = model.generate(**prompts, max_new_tokens=4, do_sample=False)
    alone = model.generate(prompts["input_ids"][1:, 1:], max_new_tokens=4, do_sample=False)
    assert two[1, 1:].tolist() == alone[0].tolist()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_exported_files_have_the_mode_that_the_umask_asks_for(tmp_path, monkeypatch, umask):
    model = ModelConfig(name="a", d_model=8, d_ff=8, n_layers=1, n_heads=2, n_kv_heads=1)
    model.vocab_size = 8
    monkeypatch.setattr(export.shared, "UMASK", umask)
    before = os.umask(umask)
    try:
        state = Decoder(model).state_dict()
        export.write_llama(tmp_path / "out", model=model, state=state, eos_id=0, texts={"a": ""})
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}
    assert "model.safetensors" in modes


@given(st.text(alphabet=st.sampled_from("the king.,:?TK\u212a \t\n\x1d\u2003\u0130s"), max_size=40))
@settings(max_examples=2 * settings.default.max_examples)
def test_exported_tokenizer_refuses_what_the_grammars_refuses(exported_grammar, text):
    try:
        expected = grammar.GrammarTokenizer().encode(text)
    except DataError:
        with pytest.raises(Exception, match="UNK"):
            exported_grammar.encode(text)
    else:
        assert exported_grammar.encode(text) == expected


def word_tokenizer(folder: Path, *, eos_special: bool) -> Path:
    """A tokenizer.json that adds <s>, truncates and pads: none of which a run's tokenizer does."""
    words = ["<s>", "<eos>", "the", "king", "sleeps"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "<eos>"] if eos_special else ["<s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_exported_tokenizer_adds_cuts_and_pads_nothing(nano, tmp_path):
    source = word_tokenizer(tmp_path / "tokenizer", eos_special=True)
    data = {"kind": "pretokenized", "path": "x", "tokenizer": str(source)}
    save_run(tmp_path, nano(model={"vocab_size": 128}, data=data), steps=1)
    main(["export", RUN, str(tmp_path / "llama"), "--output-dir", str(tmp_path)])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert theirs("the king sleeps<eos>the king")["input_ids"] == [2, 3, 4, 1, 2, 3]
    assert (theirs.eos_token_id, theirs.bos_token_id) == (1, None)


def test_an_ordinary_word_as_eos_is_not_cut_out_of_others(nano, tmp_path, capsys):
    source = word_tokenizer(tmp_path / "tokenizer", eos_special=False)
    data = {"kind": "pretokenized", "path": "x", "tokenizer": str(source), "eos_id": 2}
    save_run(tmp_path, nano(model={"vocab_size": 128}, data=data), steps=1)
    main(["export", RUN, str(tmp_path / "llama"), "--output-dir", str(tmp_path)])
    assert "ordinary token 'the'" in capsys.readouterr().out
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert theirs("theking the")["input_ids"] == [0, 2]
    assert transformers.LlamaConfig.from_pretrained(tmp_path / "llama").eos_token_id == 2


def test_real_tokenizer_is_exported_id_for_id(nano, tmp_path, shared_data):
    data = {"kind": "pretokenized", "path": "x", "tokenizer": str(shared_data / "tokenizer")}
    config = nano(method="full_rank", model={"vocab_size": 50304, "d_model": 8}, data=data)
    save_run(tmp_path, config, steps=0)
    main(["export", RUN, str(tmp_path / "llama"), "--output-dir", str(tmp_path)])
    original = Tokenizer.from_file(str(shared_data / "tokenizer" / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    text = (shared_data / "README.md").read_text() + " <|endoftext|>|||IP_ADDRESS||| \t  x\u212b"
    assert theirs(text)["input_ids"] == original.encode(text, add_special_tokens=False).ids
    assert theirs.eos_token_id == 50279


# pico ---------------------------------------------------------------------------------------------
PICO = ModelConfig(
    name="pico", d_model=24, d_ff=40, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=64
)


def save_pico(folder: Path, state: dict[str, torch.Tensor], **extra: object) -> Path:
    config = {theirs: getattr(PICO, ours) for ours, theirs in export.PICO_KEYS.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "pico_decoder"} | config | extra))
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("prefix", ["", "pico.", "pico_decoder."])
def test_pico_decoder_weights_give_their_logits_as_a_llama(tmp_path, prefix):
    torch.manual_seed(0)
    model = Decoder(PICO)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    source = save_pico(tmp_path / "pico", state)
    assert main(["import-pico", str(source), str(tmp_path / "llama")]) == 0
    ids = random_ids(64)
    with torch.no_grad():
        ours = model.logits(ids)
    torch.testing.assert_close(llama_logits(tmp_path / "llama", ids), ours, atol=1e-5, rtol=0)
    shape, _ = export.read_model(source)
    assert shape == PICO


@pytest.mark.parametrize("trained_scale", [False, True])
def test_relora_picos_adapters_are_merged(tmp_path, trained_scale):
    """Its layer gives W x + s B A x, with s = alpha / r, or tanh of a parameter."""
    generator = torch.Generator().manual_seed(0)
    plain = Decoder(PICO).state_dict()
    state = {f"pico_decoder.{name}": tensor for name, tensor in plain.items()}
    linear = "layers.1.swiglu.w_2"
    a = torch.randn(3, 40, generator=generator)
    b = torch.randn(24, 3, generator=generator)
    state |= {
        f"pico_decoder.{linear}.A_lora.weight": a,
        f"pico_decoder.{linear}.B_lora.weight": b,
    }
    if trained_scale:
        state[f"pico_decoder.{linear}.s"] = torch.tensor([0.3])
    source = save_pico(tmp_path / "pico", state, relora={"r": 3, "lora_alpha": 12})
    _, tensors = export.read_model(source)
    x = torch.randn(5, 40, generator=generator)
    scale = torch.tanh(torch.tensor(0.3)).item() if trained_scale else 4.0
    want = x @ plain[f"{linear}.weight"].T + scale * (x @ a.T) @ b.T
    torch.testing.assert_close(x @ tensors[f"{linear}.weight"].T, want, atol=1e-4, rtol=0)
    others = {n: t for n, t in plain.items() if n != f"{linear}.weight"}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in others.items())


def test_transformers_own_llama_loads_here(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        rope_theta=777.0,
        tie_word_embeddings=True,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "llama")
    shape, state = export.read_model(tmp_path / "llama")
    assert shape.rope_theta == 777.0
    ours = Decoder(shape)
    ours.load_state_dict(state)
    ids = random_ids(64)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", ["absent", "null"])
def test_a_llama_of_before_grouped_queries_loads_here(tmp_path, heads):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=6)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    for key in ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "head_dim"):
        del record[key]
    if heads == "null":
        record["num_key_value_heads"] = None
    (tmp_path / "config.json").write_text(json.dumps(record))
    shape, state = export.read_model(tmp_path)
    assert (shape.n_kv_heads, shape.max_seq_len, shape.norm_eps) == (6, 2048, 1e-6)
    ours = Decoder(shape)
    ours.load_state_dict(state)
    ids = random_ids(64)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, atol=1e-5, rtol=0)


# bad input ----------------------------------------------------------------------------------------
def fails(arguments: list[str], capsys) -> str:
    """The only line that a failing command prints."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, error = capsys.readouterr()
    assert stop.value.code in (1, 2)
    assert out == ""
    assert error.count("\n") == 1
    return f"{stop.value.code} {error}"


def test_bad_commands_end_with_one_line_and_write_nothing(nano, tmp_path, capsys):
    config = grammar_config(nano)
    save_run(tmp_path, config, steps=2)
    place = ["--output-dir", str(tmp_path)]
    full = tmp_path / "full"
    full.mkdir()
    (full / "keep").write_text("x")
    target = tmp_path / "new"

    message = fails(["export", RUN, str(full), *place], capsys)
    assert message.startswith("2 error: DIR must be a new or empty folder, got")
    assert "'keep'" in message
    assert "got the file" in fails(["export", RUN, str(full / "keep"), *place], capsys)
    message = fails(["export", RUN, str(target), "--step", "5", *place], capsys)
    assert message.startswith("2 error: --step must be one of nano-run's checkpoints 2, got 5;")
    assert "Did you mean 'nano-run'?" in fails(["export", "nanorun", str(target), *place], capsys)

    RunDir(tmp_path / "runs" / "young").create(config)
    message = fails(["export", "young", str(target), *place], capsys)
    assert message.startswith("2 error: RUN must have a checkpoint, got young (planned) without")

    weights = next((tmp_path / "runs" / RUN / "checkpoints").glob("step-*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be read" in fails(["export", RUN, str(target), *place], capsys)
    state = Decoder(config.model).state_dict()
    save_file(state, weights)
    assert "lora_A to be (4, 32), got nothing" in fails(
        ["export", RUN, str(target), *place], capsys
    )
    message = fails(["import-pico", str(full), str(target)], capsys)
    assert message.startswith("2 error: SOURCE must be a folder with config.json and")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "runs"]


def test_an_empty_folder_is_filled(nano, tmp_path):
    config = grammar_config(nano, method="full_rank")
    save_run(tmp_path, config, steps=1)
    (tmp_path / "empty").mkdir()
    assert main(["export", RUN, str(tmp_path / "empty"), "--output-dir", str(tmp_path)]) == 0
    assert (tmp_path / "empty" / "config.json").is_file()


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full_disk)
    state = Decoder(PICO).state_dict()
    with pytest.raises(OSError, match="No space"):
        export.write_llama(tmp_path / "x", model=PICO, state=state, eos_id=None, texts={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"head_dim": 8}, "head_dim must be 4, got 8"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type must be 'default', got 'llama3'"),
        ({"hidden_size": 30}, "expected embedding_proj.weight to be"),
        ({"model_type": "gpt2"}, "without d_model"),
    ],
)
def test_another_architecture_is_one_line(tmp_path, change, message):
    state = Decoder(PICO).state_dict()
    folder = tmp_path / "x"
    export.write_llama(folder, model=PICO, state=state, eos_id=None, texts={})
    config = json.loads((folder / "config.json").read_text())
    if "hidden_size" in change:
        config.pop("head_dim")
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(DataError) as error:
        export.read_model(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tokenizer_larger_than_the_head_is_refused(tmp_path, shared_data):
    source = save_pico(tmp_path / "pico", Decoder(PICO).state_dict())
    with pytest.raises(ConfigError, match="--tokenizer must have at most 64 ids"):
        export.import_model(
            source, folder=tmp_path / "new", tokenizer=str(shared_data / "tokenizer")
        )
    assert not (tmp_path / "new").exists()
