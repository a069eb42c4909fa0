"""Parameters, FLOPs, memory and disk of a run from its shapes alone. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from relora_core.config import RunConfig, Shape, divisors, linear_shapes, method_config, muon_shapes


@dataclass(kw_only=True, slots=True)
class Parameters:
    """Number of parameters (Weiss et al. 2025, Table 1)."""

    total: int
    trainable: int
    by_group: dict[str, int]
    """embedding, head, norms, attention, swiglu (the linears' weights) and adapters (A, B, a
    trained s, a sparse part's values)."""


def _vocab(config: RunConfig) -> int:
    if config.model.vocab_size is None:
        raise ValueError("model.vocab_size is not set: it comes from the data")
    return config.model.vocab_size


def _entries(shapes: Iterable[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def parameters(config: RunConfig) -> Parameters:
    """Exact counts; weights that the method freezes are not trainable."""
    model, method = config.model, method_config(config)
    replaced = method.replaced_linears(config)
    linears = {n: s for n, s in linear_shapes(model).items() if n not in replaced}
    table = _vocab(config) * model.d_model
    groups = {
        "embedding": table,
        "head": table,
        "norms": (2 * model.n_layers + 1) * model.d_model,
        "attention": _entries(s for n, s in linears.items() if ".attention." in n),
        "swiglu": _entries(s for n, s in linears.items() if ".swiglu." in n),
        "adapters": _entries(method.added_parameters(config).values()),
    }
    total = sum(groups.values())
    frozen = _entries(method.frozen_linears(config).values())
    return Parameters(total=total, trainable=total - frozen, by_group=groups)


@dataclass(kw_only=True, slots=True)
class Flops:
    """Floating-point operations per token of a full-length sequence; a multiply-add counts two."""

    forward: int
    train: int
    """Forward, gradients of activations, gradients of the trainable weights."""


def flops_per_token(config: RunConfig, *, full_rank: bool = False) -> Flops:
    """Matmuls only; attention over the whole sequence as is customary (causality not deducted).

    Adapters count at their first rank. `full_rank`: in a phase that trains the weights of adapted
    linears, not their adapters, which take part in its passes all the same.
    """
    method = method_config(config)
    replaced = method.replaced_linears(config)
    matrices = [
        shape
        for name, shape in method.added_parameters(config).items()
        if len(shape) == 2 and name.rpartition(".")[0] not in replaced
    ]
    head = _vocab(config) * config.model.d_model
    used = head + _entries([*linear_shapes(config.model).values(), *matrices])
    attention = 4 * config.data.seq_len * config.model.d_model * config.model.n_layers
    forward = 2 * used + attention + method.pass_flops(config) // _pass_tokens(config)
    frozen = _entries(matrices if full_rank else method.frozen_linears(config).values())
    weight_gradients = 2 * (used - frozen)
    activation_gradients = 2 * used + 2 * attention
    activation_gradients += 2 * method.pass_flops(config) // _pass_tokens(config)
    return Flops(forward=forward, train=forward + activation_gradients + weight_gradients)


def flops_per_token_6n(config: RunConfig) -> int:
    """6 N + 12 L d T of training, whatever the method: Chowdhery et al. 2022 (PaLM), appendix B.

    N are the plain decoder's parameters without the embedding table, but with the head, as nanoGPT
    and nanochat count them; 12 L d T is attention over all T tokens of each sequence.
    """
    model = config.model
    n = _entries(linear_shapes(model).values()) + _vocab(config) * model.d_model
    n += (2 * model.n_layers + 1) * model.d_model  # norms
    return 6 * n + 12 * model.n_layers * model.d_model * config.data.seq_len


MEMORY_SHARE = 0.8
"""Of a GPU's memory, for what `memory_bytes` counts; kernels and their context need the rest."""


GPU_HEAD_ROWS, GPU_HEAD_COLUMNS, GPU_HEAD_BYTES = 8192, 50304, 2 << 30
"""The blocks of logits of `head.py` and, but for the rows, of `loss.py`, as they are on a GPU."""


def micro_batch(
    config: RunConfig, *, processes: int = 1, memory: int | None = None, compiled: bool = False
) -> int:
    """Sequences of a forward pass in each process.

    By train.micro_batch_tokens it is the smallest divisor of the process's share of a batch that
    has so many tokens, or all of it; where that does not fit into `memory` (bytes of a GPU; None:
    no limit), the largest that does, and at least 1. `compiled`: whether that GPU's blocks are.
    """
    share = max(config.train.batch_size // processes, 1)
    if not chooses_micro_batch(config):
        return config.train.micro_batch_size or share
    suffices = config.train.micro_batch_tokens or 0
    sizes = divisors(share)
    enough = next((n for n in sizes if n * config.data.seq_len >= suffices), share)
    fitting = [n for n in sizes if n <= enough and _fits(config, n, memory, compiled)]
    return max(fitting, default=1)


def chooses_micro_batch(config: RunConfig) -> bool:
    """Whether train.micro_batch_tokens decides."""
    train = config.train
    return train.micro_batch_size is None and train.micro_batch_tokens is not None


def _fits(config: RunConfig, micro: int, memory: int | None, compiled: bool) -> bool:
    if memory is None:
        return True
    config = replace(config, train=replace(config.train, micro_batch_size=micro))
    return memory_bytes(config, compiled=compiled)["total"] <= MEMORY_SHARE * memory


def _pass_tokens(config: RunConfig) -> int:
    """Tokens of a forward pass; a run in one process is supposed where nothing else is said."""
    return micro_batch(config) * config.data.seq_len


def memory_bytes(config: RunConfig, *, compiled: bool | None = None) -> dict[str, int]:
    """Estimated peak training memory of one process, by cause. Not a bound: kernels add theirs.

    On a CPU; with `compiled` on a GPU, whose blocks are compiled or not.
    """
    counted = parameters(config)
    model, tokens = config.model, _pass_tokens(config)
    width = 2 if config.train.precision == "bf16" else 4
    kv = model.n_kv_heads * (model.d_model // model.n_heads)
    method = method_config(config)
    # Saved for backward: per block norms, q, k, v rotated and not, attention, SwiGLU's three.
    saved = tokens * model.n_layers * (9 * model.d_model + 4 * kv + 4 * model.d_ff) * width
    saved += _entries(method.replaced_linears(config).values()) * width
    estimate = {
        "weights": 4 * (counted.total + _entries(method.buffers(config).values())),
        "gradients": 4 * counted.trainable,
        "moments": method.moment_bytes(config, trainable=counted.trainable),
        "activations": saved,
        "head": _logit_bytes(config, tokens, compiled) + 4 * _vocab(config) * model.d_model,
    }
    if compiled is not None and width == 2:
        multiplied = ("head", "attention", "swiglu", "adapters")
        estimate["bf16_weights"] = 2 * sum(counted.by_group[name] for name in multiplied)
    return {**estimate, "total": sum(estimate.values())}


def _logit_bytes(config: RunConfig, tokens: int, compiled: bool | None) -> int:
    """Of the block of logits in memory; a GPU's compiled head keeps it in the products' type, the
    other beside it one of float32."""
    vocab, width = _vocab(config), 2 if config.train.precision == "bf16" else 4
    if compiled is None:
        return 4 * min(tokens * vocab, 128 * 50304)
    rows = min(tokens, GPU_HEAD_ROWS)
    if compiled:
        return rows * vocab * width
    rows = min(rows, GPU_HEAD_BYTES // (vocab * width))
    return rows * (vocab * width + min(vocab, GPU_HEAD_COLUMNS) * 4)


TENSOR_BYTES = 95
"""What a tensor of a checkpoint takes beside its values: name, shape and place (safetensors)."""
STATE_BYTES = 815
"""Likewise of a parameter's state in optimizer.pt: two moments and a step count in a zip file."""
STATE_TENSOR_BYTES = 270
"""Likewise of any further tensor there."""
MUON_SAVES = 435
"""What of that Muon does without, which has one moment and no count."""
GENERATORS_BYTES = 14_200
"""rng.pt of one process."""


def checkpoint_bytes(config: RunConfig) -> int:
    """One checkpoint on disk at its largest: weights, moments, dynamics' reference weights."""
    counted, method = parameters(config), method_config(config)
    added, buffers, frozen = (
        method.added_parameters(config),
        method.buffers(config),
        method.frozen_linears(config),
    )
    plain = 3 + 9 * config.model.n_layers - len(method.replaced_linears(config))
    muon = muon_shapes(config)
    states = method.moment_bytes(config, trainable=counted.trainable)
    states += STATE_BYTES * (plain - len(frozen) + len(added))
    states += STATE_TENSOR_BYTES * method.state_tensors(config)
    states -= MUON_SAVES * len(muon.keys() - {f"{name}.weight" for name in frozen})
    if method.has_phases(config):
        alone = 8 * (counted.total - _entries(added.values())) + STATE_BYTES * plain
        alone -= sum(4 * math.prod(muon[name]) + MUON_SAVES for name in muon.keys() - added.keys())
        states = max(states, alone)
    weights = counted.total + _entries(buffers.values()) + sum(_reference_sizes(config))
    tensors = plain + len(added) + len(buffers)
    return 4 * weights + TENSOR_BYTES * tensors + states + GENERATORS_BYTES


def _reference_sizes(config: RunConfig) -> list[int]:
    """Sizes of the weights that a checkpoint keeps for `update_restart` of dynamics."""
    dynamics = config.dynamics
    if dynamics.every_steps is None or "update_restart" not in dynamics.what:
        return []
    kinds = {*dynamics.kinds, *(("v_proj", "o_proj") if "ov" in dynamics.kinds else ())}
    shapes = linear_shapes(config.model).items()
    return [o * i for name, (o, i) in shapes if name.rpartition(".")[2] in kinds]
