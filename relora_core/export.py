"""A run's model as a plain `LlamaForCausalLM` folder, and pico's or Llama's weights as ours.

Reads and writes the files themselves, so transformers is not needed. Not for: finding the run
(`experiments`), nor for going on with training (`checkpoint.py`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from relora_core import shared
from relora_core.checkpoint import weight_files
from relora_core.config import ConfigError, ModelConfig, RunConfig
from relora_core.data import HFTokenizer, load_tokenizer
from relora_core.data.base import DataError, Tokenizer
from relora_core.data.places import expand
from relora_core.methods import build_method
from relora_core.methods.adapter import ReLoRALinear
from relora_core.model import Decoder

if TYPE_CHECKING:
    import tokenizers

OUTSIDE = {
    "embedding_proj": "model.embed_tokens",
    "output_norm": "model.norm",
    "de_embedding_proj": "lm_head",
}
BLOCK = {
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "swiglu.w_0": "mlp.gate_proj",
    "swiglu.w_1": "mlp.up_proj",
    "swiglu.w_2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "swiglu_norm": "post_attention_layernorm",
}
PICO_KEYS = {
    "d_model": "d_model",
    "d_ff": "activation_hidden_dim",
    "n_layers": "n_layers",
    "n_heads": "attention_n_heads",
    "n_kv_heads": "attention_n_kv_heads",
    "max_seq_len": "max_seq_len",
    "rope_theta": "position_emb_theta",
    "norm_eps": "norm_eps",
    "vocab_size": "vocab_size",
}
LLAMA_KEYS = {
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
}

LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
"""What Llama's class takes where an older config.json is silent."""


# a run --------------------------------------------------------------------------------------------
def export_run(config: RunConfig, *, checkpoint: Path, folder: Path) -> list[str]:
    """Write the model of a checkpoint as `write_llama` does, with the run's tokenizer.

    Returns what the user should know, a line each. ConfigError where `folder` is not empty,
    DataError where the checkpoint does not fit the config.
    """
    check_target(folder)
    notes: list[str] = []
    files, eos_id = _run_tokenizer(config, notes=notes)
    state = merged_state(config, checkpoint=checkpoint)
    write_llama(folder, model=config.model, state=state, eos_id=eos_id, texts=files)
    return notes


def merged_state(config: RunConfig, *, checkpoint: Path) -> dict[str, Tensor]:
    """The plain decoder's weights at a checkpoint, adapters merged (W + s B A), in float32."""
    with torch.random.fork_rng(devices=[]):
        model = Decoder(config.model)
        method = build_method(config)
        method.adapt(model)
    loaded = {n: t for file in weight_files(checkpoint) for n, t in _read_tensors(file).items()}
    for name, module in model.named_modules():
        if isinstance(module, ReLoRALinear):
            module.fit_(loaded, f"{name}.")
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    _check(loaded, expected, where=str(checkpoint))
    model.load_state_dict(loaded)
    method.load_state_dict(json.loads((checkpoint / "progress.json").read_text())["method"])
    state = model.state_dict()
    state |= {f"{name}.weight": weight for name, weight in method.effective_weights(model)}
    return {name: state[name].float() for name in _shapes(config.model)}


def check_target(folder: Path) -> None:
    """ConfigError unless `folder` is new, or a folder with nothing in it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"DIR must be a new or empty folder, got the file {str(folder)!r}")
    if names := sorted(p.name for p in folder.iterdir()):
        raise ConfigError(
            f"DIR must be a new or empty folder, got {str(folder)!r} that holds {names[0]!r}"
            + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        )


def write_llama(
    folder: Path,
    *,
    model: ModelConfig,
    state: Mapping[str, Tensor],
    eos_id: int | None,
    texts: Mapping[str, str],
) -> None:
    """Our `state` as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    `texts` are further files by name, such as a tokenizer's. The folder appears by one rename.
    """
    folder = expand(folder).resolve()
    check_target(folder)
    # Without a prompt a text begins as documents do in training: after the end of another one.
    generation = {"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": eos_id}
    configs = {
        "config.json": llama_config(model, eos_id=eos_id),
        "generation_config.json": generation if eos_id is not None else {},
    }
    files = {name: json.dumps(value, indent=2) + "\n" for name, value in configs.items()}
    weights = {name: t.contiguous() for name, t in to_llama(state, model=model).items()}
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shared.make_folder(folder.parent)
    temporary.mkdir()
    shared.share(temporary)
    try:
        for name, text in (files | dict(texts)).items():
            (temporary / name).write_text(text, encoding="utf-8")
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "model.safetensors").chmod(0o666 & ~shared.UMASK)  # else 0600
        shared.share_all(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def llama_config(model: ModelConfig, *, eos_id: int | None) -> dict[str, Any]:
    """config.json of the same architecture in Llama's words."""
    sizes = {theirs: getattr(model, ours) for ours, theirs in LLAMA_KEYS.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "head_dim": model.d_model // model.n_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,  # where transformers before 5 looks
        "bos_token_id": None,  # null is not the same as absent: Llama's defaults are 1 and 2
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "dtype": "float32",
    }


# weights ------------------------------------------------------------------------------------------
def to_llama(state: Mapping[str, Tensor], *, model: ModelConfig) -> dict[str, Tensor]:
    """Our state dict in Llama's names, q and k in the row order that its RoPE expects.

    We rotate adjacent rows (2j, 2j + 1) of a head, Llama rows (j, j + head_dim / 2).
    """
    _check(state, _shapes(model), where="the model")
    return {
        theirs: _regroup(state[ours], heads=_heads(ours, model), inner=(-1, 2))
        for ours, theirs in _names(model).items()
    }


def from_llama(state: Mapping[str, Tensor], *, model: ModelConfig) -> dict[str, Tensor]:
    """Inverse of `to_llama`, bit for bit. DataError where names or shapes are not the model's."""
    ours = {theirs: name for name, theirs in _names(model).items()}
    weights = {n: t for n, t in state.items() if not n.endswith("rotary_emb.inv_freq")}
    renamed = {ours.get(name, name): tensor for name, tensor in weights.items()}
    _check(renamed, _shapes(model), where="the Llama model")
    return {
        name: _regroup(tensor, heads=_heads(name, model), inner=(2, -1))
        for name, tensor in renamed.items()
    }


def from_pico(
    state: Mapping[str, Tensor], *, model: ModelConfig, scale: float | None = None
) -> dict[str, Tensor]:
    """Our state dict from pico-decoder's, or from relora-pico's with its adapters merged.

    Names are ours, possibly behind `pico_decoder.` or `pico.`; an adapted linear has also
    `A_lora.weight` (r, in), `B_lora.weight` (out, r) and, where its scale is trained, `s`, used as
    tanh(s). `scale` is alpha / r elsewhere.
    """
    plain = {re.sub(r"^pico(_decoder)?\.", "", name): t for name, t in state.items()}
    merged = {n: t for n, t in plain.items() if not re.search(r"\.([AB]_lora\.weight|s)$", n)}
    for name in plain:
        if not name.endswith(".A_lora.weight"):
            continue
        linear = name.removesuffix(".A_lora.weight")
        s = plain[f"{linear}.s"].tanh() if f"{linear}.s" in plain else scale
        if s is None:
            raise DataError(f"{name} needs a scale: expected relora.lora_alpha in config.json")
        product = plain[f"{linear}.B_lora.weight"] @ plain[name]
        merged[f"{linear}.weight"] = merged[f"{linear}.weight"] + s * product
    _check(merged, _shapes(model), where="the pico model")
    return merged


def _names(model: ModelConfig) -> dict[str, str]:
    """Our parameter -> Llama's."""
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in OUTSIDE.items()}
    for i in range(model.n_layers):
        for ours, theirs in BLOCK.items():
            names[f"layers.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    return names


def _heads(name: str, model: ModelConfig) -> int | None:
    """Number of heads if RoPE rotates the rows of this parameter, else None."""
    if name.endswith("q_proj.weight"):
        return model.n_heads
    return model.n_kv_heads if name.endswith("k_proj.weight") else None


def _regroup(weight: Tensor, *, heads: int | None, inner: tuple[int, int]) -> Tensor:
    """Transpose a head's rows seen as a matrix of shape `inner`."""
    if heads is None:
        return weight
    return weight.unflatten(0, (heads, *inner)).transpose(1, 2).flatten(0, 2)


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in Decoder(model).state_dict().items()}


def _check(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, where: str
) -> None:
    """DataError at the first tensor that is missing, unknown or of another shape."""
    for name in [*shapes, *state]:
        shape = tuple(state[name].shape) if name in state else "nothing"
        expected = shapes.get(name, "nothing")
        if shape != expected:
            raise DataError(f"{where}: expected {name} to be {expected}, got {shape}")


# foreign checkpoints ------------------------------------------------------------------------------
def read_model(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Shape and weights (ours, float32) of a pico-decoder, relora-pico or Llama folder.

    ConfigError where the folder is none; DataError where the model is not of this architecture.
    """
    files = sorted(folder.glob("*.safetensors"))
    path = folder / "config.json"
    if not files or not path.is_file():
        raise ConfigError(
            f"SOURCE must be a folder with config.json and *.safetensors, got {str(folder)!r}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{path} is not JSON") from None
    state = {n: t.float() for file in files for n, t in _read_tensors(file).items()}
    if config.get("model_type") == "llama":
        model = _llama_shape(config, path=path)
        embedding = state.get("model.embed_tokens.weight")
        if config.get("tie_word_embeddings") and embedding is not None:
            state["lm_head.weight"] = embedding.clone()
        return model, from_llama(state, model=model)
    model = ModelConfig(name=folder.name, **_take(config, PICO_KEYS, path=path))
    relora = config.get("relora")
    scale = relora["lora_alpha"] / relora["r"] if relora else None
    return model, from_pico(state, model=model, scale=scale)


def import_model(source: Path, *, folder: Path, tokenizer: str | None) -> list[str]:
    """Write `read_model(source)` as `write_llama` does; returns notes.

    `tokenizer` is what data.tokenizer may be; without one the source's own is taken, if any.
    """
    check_target(folder)
    model, state = read_model(source)
    if tokenizer is None and (source / "tokenizer.json").is_file():
        tokenizer = str(source)
    if tokenizer is None:
        write_llama(folder, model=model, state=state, eos_id=None, texts={})
        return ["no tokenizer was written: SOURCE has none; --tokenizer names one"]
    hf_tokenizer = HFTokenizer(tokenizer)
    if hf_tokenizer.vocab_size > (model.vocab_size or 0):
        raise ConfigError(
            f"--tokenizer must have at most {model.vocab_size} ids (the rows of SOURCE's head), "
            f"got {hf_tokenizer.vocab_size} in {tokenizer!r}"
        )
    notes: list[str] = []
    files = _tokenizer_texts(hf_tokenizer, model=model, notes=notes)
    write_llama(folder, model=model, state=state, eos_id=hf_tokenizer.eos_id, texts=files)
    return notes


def _llama_shape(config: dict[str, Any], *, path: Path) -> ModelConfig:
    given = {name: value for name, value in config.items() if value is not None}
    sizes = _take(LLAMA_DEFAULTS | given, LLAMA_KEYS, path=path, without=("n_kv_heads",))
    sizes["n_kv_heads"] = given.get(LLAMA_KEYS["n_kv_heads"], sizes["n_heads"])
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    actual = {
        "hidden_act": config.get("hidden_act", "silu"),
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "head_dim": config.get("head_dim") or sizes["d_model"] // sizes["n_heads"],
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
    }
    expected = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": sizes["d_model"] // sizes["n_heads"],
        "rope_type": "default",
    }
    for key, value in expected.items():
        if actual[key] != value:
            raise DataError(f"{path}: {key} must be {value!r}, got {actual[key]!r}")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    return ModelConfig(name=path.parent.name, rope_theta=theta, **sizes)


def _take(
    config: dict[str, Any], keys: Mapping[str, str], *, path: Path, without: tuple[str, ...] = ()
) -> dict[str, Any]:
    wanted = {ours: theirs for ours, theirs in keys.items() if ours not in without}
    for theirs in wanted.values():
        if theirs not in config:
            raise DataError(
                f"{path}: expected a pico-decoder's or Llama's config, without {theirs}"
            )
    return {ours: config[theirs] for ours, theirs in wanted.items()}


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise DataError(f"{file} cannot be read: {' '.join(str(error).split())}") from None


# tokenizers ---------------------------------------------------------------------------------------
def _run_tokenizer(config: RunConfig, *, notes: list[str]) -> tuple[dict[str, str], int | None]:
    """(files by name, EOS id) of the run's tokenizer; no files where the data name none."""
    tokenizer = load_tokenizer(config.data)
    if tokenizer is None:
        notes.append("no tokenizer was written: the run's data.tokenizer is not set")
        return {}, config.data.eos_id
    return _tokenizer_texts(tokenizer, model=config.model, notes=notes), tokenizer.eos_id


def _tokenizer_texts(
    tokenizer: Tokenizer, *, model: ModelConfig, notes: list[str]
) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json that encode as `tokenizer` does.

    The class is the one that takes tokenizer.json as it is; others rebuild parts of it.
    """
    backend = _backend(tokenizer)
    if backend.num_special_tokens_to_add(is_pair=False):
        backend.post_processor = None  # type: ignore[assignment]  # training never added any
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # what is generated follows the last token of each text
        "model_max_length": model.max_seq_len,
    }
    eos = backend.id_to_token(tokenizer.eos_id)
    if tokenizer.eos_id in backend.get_added_tokens_decoder():
        config |= {"eos_token": eos, "pad_token": eos}
    else:  # declaring a word as special would cut it out of longer words
        notes.append(f"the end of a document is the ordinary token {eos!r}: no eos_token was named")
    return {
        "tokenizer.json": backend.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }


def _backend(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer._tokenizer
    return _grammar_backend()


def _grammar_backend() -> tokenizers.Tokenizer:
    """`GrammarTokenizer` for the tokenizers library; decoding attaches marks, in lower case."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    from relora_core.data.grammar import EOS, EOS_ID, VOCAB_SIZE, GrammarTokenizer

    decode = GrammarTokenizer().decode
    words = {decode([i]).lower(): i for i in range(VOCAB_SIZE) if i != EOS_ID}
    backend = Tokenizer(models.WordLevel({EOS: EOS_ID, **words}))  # an unknown word is an error
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Python's white space has four control characters more than the library's.
            pre_tokenizers.Split(Regex(r"[\s\x1c-\x1f]+"), "removed"),
            pre_tokenizers.Split(Regex("[.,:?]"), "isolated"),
        ]
    )
    attach = [decoders.Replace(f" {mark}", mark) for mark in ".,:?"]
    spaced = decoders.WordPiece(prefix="##", cleanup=False)  # a space before all words but one
    backend.decoder = decoders.Sequence([spaced, decoders.Fuse(), *attach])
    backend.add_special_tokens([EOS])
    return backend
