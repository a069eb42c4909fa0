"""Models that were not trained here: any causal language model that transformers loads.

`ForeignModel` is what evals ask for, `evaluate` measures one as training measures its own. Needs
transformers, which nothing else here does. Not for: weights that become ours (`export.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from relora_core import gpu, native
from relora_core.config import ConfigError, EvaluatedConfig, ModelConfig
from relora_core.data.places import commit_of, expand, first_line, path_error
from relora_core.data.tokenizer import EOS_NAMES, HFTokenizer
from relora_core.dynamics import Recorder
from relora_core.evals import prepare, tree
from relora_core.events import Event, Sink
from relora_core.loss import target_log_probs
from relora_core.measures import Measures, Stop
from relora_core.methods.base import Method
from relora_core.train import make_accelerator

EXPECTED = "a folder or hub name of a causal language model that transformers loads"
PROBE = (2, 8)
"""Sequences and tokens of the input on which a model is tried before it is trusted."""
LONGEST = 2048
"""Input of a model that names no longest one."""
LOGITS = 64 << 20
"""Bytes of float32 logits that are normalised at a time."""
PASS_LOGITS = 4 << 30
"""Bytes of them that a pass over several sequences makes at most: one of 65,536 tokens, as on a
GPU, would make 67 GB with a vocabulary of 256,000."""


# the model ----------------------------------------------------------------------------------------
class ForeignModel(nn.Module):
    """A causal model of transformers as an `evals.base.LanguageModel`.

    What a model allows is tried on a few ids. `split`: its logits are its final states times its
    head; then only positions that are scored reach the head, and no row of the vocabulary ever
    exists. Elsewhere a batch's logits do, as the model gives them. `shares_prefixes`: it also
    takes positions and a mask for each node of a tree.
    """

    def __init__(self, inner: Any, *, config: ModelConfig) -> None:
        super().__init__()
        self.inner, self.config = inner, config
        self.max_seq_len = config.max_seq_len
        self.split = self._has_plain_head()
        self.shares_prefixes = self.split and self._takes_trees()

    @property
    def device(self) -> torch.device:
        return next(self.inner.parameters()).device

    def logits(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, V)."""
        return self.inner(input_ids=ids).logits

    def hidden_states(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, C), of which the head makes logits."""
        return self.inner.base_model(input_ids=ids)[0]

    def prefix_states(self, ids: Tensor, *, depth: Tensor, mask: Tensor) -> Tensor:
        """As `evals.tree.PrefixModel`."""
        added = torch.zeros(mask.shape, device=ids.device)
        added.masked_fill_(~mask, torch.finfo(added.dtype).min)
        return self.inner.base_model(
            input_ids=ids, position_ids=depth, attention_mask=added[:, None]
        )[0]

    def head(self, precision: str) -> Tensor:
        """Weight (V, C) for matmuls in `precision`, fp32 or bf16."""
        weight = self.inner.get_output_embeddings().weight.detach()
        return weight.bfloat16() if precision == "bf16" else weight

    def log_probs(
        self, ids: Tensor, at: Tensor, targets: Tensor, *, precision: str = "fp32"
    ) -> Tensor:
        """As `evals.base.LanguageModel`; bf16 is for a head that can be used apart."""
        if self.split:
            return target_log_probs(self.hidden_states(ids)[at], self.head(precision), targets)
        size = max(1, PASS_LOGITS // (4 * (self.config.vocab_size or 1) * ids.shape[1]))
        places = at.split(size)
        own = targets.split([int(place.sum()) for place in places])
        passes = zip(ids.split(size), places, own, strict=True)
        return torch.cat([self._pass_log_probs(*one) for one in passes])

    def _pass_log_probs(self, ids: Tensor, at: Tensor, targets: Tensor) -> Tensor:
        """As `log_probs`, in one pass, from all logits."""
        rows = self.logits(ids)[at]  # (N, V)
        size = max(1, LOGITS // (4 * rows.shape[1]))
        parts = zip(rows.split(size), targets.split(size), strict=True)
        own = [x.float().log_softmax(dim=1).gather(1, y[:, None])[:, 0] for x, y in parts]
        return torch.cat(own) if own else torch.zeros(0, device=rows.device)

    @torch.no_grad()
    def _has_plain_head(self) -> bool:
        """Whether `hidden_states` and `head` give the model's own log-probabilities.

        Not with a bias, a scale or a soft cap on the logits.
        """
        ids, head = self.probe(), self.inner.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            return False
        try:
            hidden = self.hidden_states(ids[:, :-1])
            apart = target_log_probs(hidden.flatten(0, 1), self.head("fp32"), ids[:, 1:].flatten())
        except Exception:  # whatever a model of any kind does when its parts are called
            return False
        whole = self.logits(ids[:, :-1]).float().log_softmax(dim=-1)
        own = whole.gather(2, ids[:, 1:, None]).flatten()
        return torch.allclose(apart, own, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def _takes_trees(self) -> bool:
        """Whether `prefix_states` are the states of sequences that begin alike."""
        ids = self.probe()[:1, :-1].repeat(3, 1)
        half = ids.shape[1] // 2
        ids[1, half:], ids[2, 1:] = ids[0, half:].flip(0), ids[0, 1:].flip(0)
        rows = sorted((row.cpu().numpy() for row in torch.cat((ids, ids[:, :1]), dim=1)), key=bytes)
        trees = tree.build(rows)
        parts = (trees.ids, trees.depth, trees.mask)
        nodes, depth, mask = (torch.from_numpy(part).to(ids.device) for part in parts)
        try:
            states = self.prefix_states(nodes, depth=depth, mask=mask).flatten(0, 1)
        except Exception:  # of any kind: it is not made for that
            return False
        want = torch.stack(
            [self.hidden_states(torch.from_numpy(r[None, :-1]).to(ids.device))[0] for r in rows]
        )
        own = states[torch.from_numpy(trees.path).to(ids.device)]
        scale = want.abs().max()
        return own.shape == want.shape and bool((own - want).abs().max() < 1e-4 * scale)

    def probe(self) -> Tensor:
        """A few ids (B, T + 1) in a fixed order."""
        rows, length = PROBE[0], min(PROBE[1], self.max_seq_len) + 1
        drawn = torch.randint(
            self.config.vocab_size or 2,
            (rows, length),
            generator=torch.Generator().manual_seed(0),
        )
        return drawn.to(self.device)


@torch.no_grad()
def check(model: ForeignModel, *, source: str) -> None:
    """ConfigError unless logits are finite and those of a position depend on no later id."""
    ids = model.probe()[:, :-1]
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % (model.config.vocab_size or 2)
    one, two = model.logits(ids), model.logits(other)
    if not one.isfinite().all():
        raise ConfigError(f"MODEL must give finite logits, got nan or infinity from {source!r}")
    scale = one.abs().max().clamp(min=1e-6)
    if ((one - two)[:, :-1].abs().max() if ids.shape[1] > 1 else 0) > 1e-3 * scale:
        raise ConfigError(
            f"MODEL must be causal, got {type(model.inner).__name__} in {source!r}: its logits "
            "change with ids that come later"
        )


# loading ------------------------------------------------------------------------------------------
class ForeignTokenizer(HFTokenizer):
    """The tokenizer that transformers loads for a model. No special token is ever added."""

    def __init__(self, auto: Any, *, source: str) -> None:
        backend = getattr(auto, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"MODEL must have a tokenizer that can be written as tokenizer.json, got "
                f"{type(auto).__name__} in {source!r}"
            )
        self.start_id = auto.eos_token_id if auto.bos_token_id is None else auto.bos_token_id
        vocabulary = self._take(backend.to_str().encode(), source=source)
        if vocabulary.keys() <= {*auto.all_special_tokens}:  # made up where there are no files
            raise ConfigError(f"MODEL must have a tokenizer, got none in {source!r}")
        ends = [auto.eos_token_id, self.start_id, *map(self._tokenizer.token_to_id, EOS_NAMES)]
        end = next((id_ for id_ in ends if id_ is not None), None)
        if end is None:
            raise ConfigError(
                f"MODEL must have a tokenizer with a token that begins or ends a text, got none in "
                f"{source!r}"
            )
        self.eos_id = end
        self.start_id = end if self.start_id is None else self.start_id


@dataclass(kw_only=True, slots=True)
class Loaded:
    """A model from elsewhere, and all that is known of it."""

    model: ForeignModel
    tokenizer: ForeignTokenizer
    architecture: str
    parameters: int
    fingerprint: str


def load(
    source: str, *, name: str, revision: str | None = None, remote_code: bool = False
) -> Loaded:
    """Read a model in float32, and its tokenizer; ConfigError, one line, where that cannot be.

    Code that a model brings along runs only with `remote_code`.
    """
    if find_spec("transformers") is None:
        raise ConfigError(
            "transformers must be installed to evaluate models from elsewhere: "
            "pip install '.[transformers]' in the checkout"
        )
    place = _place(source, revision=revision)
    with _quietly():
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(**place, trust_remote_code=remote_code)
            _check_kind(config, source=source, remote_code=remote_code)
            auto = transformers.AutoTokenizer.from_pretrained(
                **place, trust_remote_code=remote_code
            )
            made: Any = transformers.AutoModelForCausalLM.from_pretrained(
                **place,
                trust_remote_code=remote_code,
                dtype=torch.float32,
                output_loading_info=True,
            )
            inner, report = made
        except ConfigError:
            raise
        except Exception as error:  # of any library and kind
            raise _unloadable(error, source=source) from None
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise ConfigError(
            f"MODEL must hold every weight of {type(inner).__name__}, got {source!r} without {some}"
        )
    inner.config.use_cache = False
    tokenizer = ForeignTokenizer(auto, source=source)
    sizes = model_sizes(inner, name=name)
    if tokenizer.vocab_size > (sizes.vocab_size or 0):
        raise ConfigError(
            f"MODEL must have a row of its head for each of its tokenizer's {tokenizer.vocab_size} "
            f"ids, got {sizes.vocab_size} in {source!r}"
        )
    model = ForeignModel(inner.eval(), config=sizes)
    check(model, source=source)
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        architecture=type(inner).__name__,
        parameters=sum(p.numel() for p in inner.parameters()),
        fingerprint=fingerprint(inner, tokenizer=tokenizer),
    )


def _place(source: str, *, revision: str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained`: a folder, a commit of the hub, or the copy kept of one."""
    folder = expand(source)
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"--revision must be left out for the folder {source!r}")
        if not (folder / "config.json").is_file():
            raise ConfigError(f"MODEL must be {EXPECTED}, got {source!r} without a config.json")
        return {"pretrained_model_name_or_path": str(folder), "local_files_only": True}
    if folder.is_file() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise path_error("MODEL", source=source, expected=EXPECTED)
    place: dict[str, Any] = {
        "pretrained_model_name_or_path": source,
        "revision": revision or "main",
    }
    try:  # one commit for all files
        place["revision"] = commit_of(source, revision, repo_type="model")
    except LookupError as error:
        from huggingface_hub import try_to_load_from_cache

        kept = try_to_load_from_cache(source, "config.json", revision=revision)
        if not isinstance(kept, str):
            raise path_error("MODEL", source=source, expected=EXPECTED, why=str(error)) from None
        place["local_files_only"] = True
    return place


def _check_kind(config: Any, *, source: str, remote_code: bool) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    own = remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not own and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"MODEL must be {EXPECTED}, got {source!r} of model_type={config.model_type!r}, which "
            "is none"
        )


def _unloadable(error: Exception, *, source: str) -> ConfigError:
    if "trust_remote_code" in str(error):
        return ConfigError(
            f"MODEL must be of a kind that transformers knows, got {source!r} that brings code of "
            "its own; --trust-remote-code runs it"
        )
    return ConfigError(f"MODEL must be {EXPECTED}, got {source!r}: {first_line(error)[:300]}")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' bars and warnings: what matters of them is an error here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def model_sizes(inner: Any, *, name: str) -> ModelConfig:
    """Sizes in our words; what a model does not name is taken from its weights or is 1."""
    theirs = inner.config.get_text_config()

    def size(*names: str, default: int) -> int:
        values = (getattr(theirs, name, None) for name in names)
        return next((value for value in values if isinstance(value, int) and value > 0), default)

    head = inner.get_output_embeddings().weight
    width = size("hidden_size", default=head.shape[1])
    heads = size("num_attention_heads", default=1)
    return ModelConfig(
        name=name,
        d_model=width,
        d_ff=size("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=4 * width),
        n_layers=size("num_hidden_layers", default=1),
        n_heads=heads,
        n_kv_heads=size("num_key_value_heads", default=heads),
        max_seq_len=size("max_position_embeddings", default=LONGEST),
        vocab_size=head.shape[0],
    )


def fingerprint(inner: nn.Module, *, tokenizer: HFTokenizer) -> str:
    """sha256 of all that numbers depend on: weights in float32, architecture, the model's own code
    if it brings any, tokenizer."""
    total = hashlib.sha256()
    written = inner.config.to_dict()  # type: ignore[operator,union-attr]
    about = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
    kept = {key: value for key, value in written.items() if key not in about}
    total.update(json.dumps([kept, tokenizer.digest], sort_keys=True, default=str).encode())
    for file in _own_code(inner):
        total.update(file.read_bytes())
    for key, tensor in sorted(inner.state_dict().items()):
        total.update(json.dumps([key, list(tensor.shape)]).encode())
        total.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return total.hexdigest()


def _own_code(inner: nn.Module) -> list[Path]:
    """Files of code that came with the model, which transformers copies to one folder."""
    made = type(inner)
    if not made.__module__.startswith("transformers_modules."):
        return []
    return sorted(Path(inspect.getfile(made)).parent.glob("*.py"))


# its weights --------------------------------------------------------------------------------------
KINDS = {
    **{name: f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **dict.fromkeys(
        ("out_proj", "attn.c_proj", "attention.dense", "self_attention.dense", "self_attn.dense"),
        "attention.o_proj",
    ),
    "gate_proj": "swiglu.w_0",
    **dict.fromkeys(("up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h"), "swiglu.w_1"),
    **dict.fromkeys(("down_proj", "mlp.c_proj", "fc2", "fc_out", "dense_4h_to_h"), "swiglu.w_2"),
}
"""End of a linear's name -> ours. An MLP without a gate has a w_1 and a w_2."""
SIDE_BY_SIDE = {"c_attn": ("gpt2",), "qkv_proj": ("phi3",)}
"""Linears that hold q, k and v, all heads of each, and the model_types where they do."""
BY_HEAD = {"query_key_value": ("gpt_neox", "bloom")}
"""Likewise, q, k and v of the first head, then of the second."""


class ForeignWeights(Method):
    """The linears of a model from elsewhere by our names, for `dynamics.Recorder`."""

    def effective_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        assert isinstance(model, ForeignModel)
        kind = model.inner.config.get_text_config().model_type
        for name, module in model.inner.named_modules():
            weight, numbers = getattr(module, "weight", None), re.findall(r"\.(\d+)\.", name)
            # Experts have two numbers: there are many of them where we have one.
            if not isinstance(weight, Tensor) or weight.ndim != 2 or len(numbers) != 1:
                continue
            if type(module).__name__ == "Conv1D":  # GPT-2's linear, (in, out)
                weight = weight.T
            for part, own in _parts(name, weight.detach(), kind=kind, config=model.config):
                yield f"layers.{numbers[0]}.{part}", own


def _parts(
    name: str, weight: Tensor, *, kind: str, config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """(our name, matrix) of what a linear with a weight (out, in) holds; nothing if unknown."""
    *_, last = parts = name.split(".")
    if ours := KINDS.get(".".join(parts[-2:]), KINDS.get(last)):
        yield ours, weight
        return
    sizes = [config.n_heads, config.n_kv_heads, config.n_kv_heads]
    if kind in SIDE_BY_SIDE.get(last, ()) and weight.shape[0] % sum(sizes) == 0:
        matrices = weight.split([n * (weight.shape[0] // sum(sizes)) for n in sizes])
    elif kind in BY_HEAD.get(last, ()):
        by_head = weight.unflatten(0, (config.n_heads, 3, -1))  # (H, 3, hd, in)
        matrices = by_head.transpose(0, 1).flatten(1, 2)
    else:
        return
    yield from zip([f"attention.{x}_proj" for x in "qkv"], matrices, strict=True)


# measuring ----------------------------------------------------------------------------------------
def evaluate(config: EvaluatedConfig, *, loaded: Loaded, sink: Sink, stop: Stop) -> str:
    """Dynamics of the weights and the config's evals, as training emits them at its end:
    `finished`, or `interrupted` if `stop` was true between two batches."""
    with gpu.settings(config):
        return _evaluate(config, loaded=loaded, sink=sink, stop=stop)


def _evaluate(config: EvaluatedConfig, *, loaded: Loaded, sink: Sink, stop: Stop) -> str:
    accelerator = make_accelerator(config)
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    kernels = None
    if accelerator.device.type == "cpu":
        kernels = native.choose(config.runtime.kernels)
    model = loaded.model.to(accelerator.device)
    recorder = Recorder(config, model=model, method=ForeignWeights(config))
    begun = {"resumed": False, "world": 1, "kernels": kernels}
    sink.emit(Event(kind="start", step=0, data=begun))
    measure = Measures(
        config,
        accelerator=accelerator,
        model=model,
        evals=prepare(config, loaded.tokenizer),
        recorder=recorder,
        sink=sink,
        stop=stop,
    )
    measure.dynamics(0)
    return "finished" if measure.evaluate(0) else "interrupted"
