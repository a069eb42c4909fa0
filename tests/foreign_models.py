"""Tiny random models of transformers, saved with a tokenizer, and texts to evaluate them on."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed: pip install '.[transformers]'",
)
WORDS = "the a cat dog cats dogs sleeps sleep sees near under old that who was were"
VOCAB = 320
PAIRS = {
    "first_words": [("Cats sleep.", "Dogs sleep."), ("The cat sees.", "That dog sees.")],
    "later_words": [("The cat sleeps.", "The cat sleep."), ("Old dogs see.", "Old dogs sees.")],
    "same": [("The dog sleeps.", "The dog sleeps.")],
}
TEXTS = {"wiki": "the old cat that sleeps was near dogs ", "code": "a dog; under cats: "}


def save_tokenizer(folder: Path, *, bos: str | None = None, eos: str | None = "</s>") -> None:
    """Byte-level BPE of a few words; special tokens come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in (bos, eos) if token]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    made.save_pretrained(folder)


def make(kind: str, **changes: Any) -> Any:
    """A model with two layers of width 32; far from uniform, so that numbers say something."""
    import transformers as t

    common = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    llama = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama |= {"intermediate_size": 48, "max_position_embeddings": 64}
    grouped = llama | {"num_key_value_heads": 2}
    models = {
        "gpt2": (t.GPT2Config, t.GPT2LMHeadModel, gpt2),
        "gptj": (t.GPTJConfig, t.GPTJForCausalLM, gpt2 | {"rotary_dim": 4}),
        "llama": (t.LlamaConfig, t.LlamaForCausalLM, grouped),
        "headless": (t.LlamaConfig, t.LlamaModel, grouped),
        "neox": (t.GPTNeoXConfig, t.GPTNeoXForCausalLM, llama),
        "bert": (t.BertConfig, t.BertLMHeadModel, llama),
    }
    config, model, sizes = models[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = model(config(**(common | sizes | changes)))
        with torch.no_grad():
            for weight in made.parameters():
                if weight.ndim == 2:
                    weight.mul_(5)
            if kind == "gptj":
                made.lm_head.bias.normal_()
    return made.eval()


def save(folder: Path, kind: str, **changes: Any) -> Path:
    """A model folder; a Llama's tokenizer has a BOS, others' an EOS alone."""
    make(kind, **changes).save_pretrained(folder)
    save_tokenizer(folder, bos="<s>" if kind == "llama" else None)
    return folder


def save_texts(folder: Path) -> dict[str, str]:
    """BLiMP's and Paloma's files; eval key -> path."""
    for uid, pairs in PAIRS.items():
        fields = {"UID": uid, "field": "syntax", "linguistics_term": "s-selection"}
        lines = [
            json.dumps({"sentence_good": good, "sentence_bad": bad, "pairID": str(i), **fields})
            for i, (good, bad) in enumerate(pairs)
        ]
        (folder / "blimp").mkdir(parents=True, exist_ok=True)
        (folder / "blimp" / f"{uid}.jsonl").write_text("\n".join(lines))
    for source, text in TEXTS.items():
        file = folder / "paloma" / source / "val" / f"{source}.jsonl.gz"
        file.parent.mkdir(parents=True)
        lines = [
            json.dumps({"text": text * n}) for n in (1, 20)
        ]  # the second needs several windows
        file.write_bytes(gzip.compress("\n".join(lines).encode()))
    return {f"eval.{name}.path": str(folder / name) for name in ("blimp", "paloma")}
