"""Sums of log-probabilities of many sequences, in batches of which each rank takes its share.

Imports torch only when it scores: planning reads the evals' files, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Unpack

import numpy as np

from relora_core.evals.base import LanguageModel, Window, Work, pad

if TYPE_CHECKING:
    from torch import Tensor

BATCH_TOKENS = {"cpu": 1024, "cuda": 65536}
"""Tokens per forward pass; a CPU wants activations that stay in its caches."""
SHORT = 64
"""Tokens of a sequence that may share a tree of prefixes with others."""


def score(
    model: LanguageModel,
    windows: Sequence[Window],
    *,
    batch_tokens: int | None = None,
    share_prefixes: bool = False,
    precision: str = "fp32",
    **work: Unpack[Work],
) -> np.ndarray:
    """Sum of log p(scored tokens) of each window in nats, float64, shape (len(windows),).

    Equal windows are scored once, so they get equal sums; `share_prefixes` of short ones are
    computed once, too, by a model that can. With precision bf16 the head's matmuls are. Batches are
    the same for any number of ranks; rank r takes batches r, r + world, ..., and `reduce` brings
    the sums together.
    """
    import torch

    # Longest first, so that there is hardly any padding; short ones by content, which brings
    # together what begins alike.
    short = SHORT if share_prefixes and model.shares_prefixes else 0
    keys = [(min(short - len(w.ids), 0), w.ids.tobytes(), w.scored) for w in windows]
    index = {key: i for i, key in enumerate(keys)}
    order = sorted(index)
    unique = [windows[index[key]] for key in order]
    device = model.device
    budget = batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    batches = _plan(unique, budget=budget, short=short)
    rank, world = work.get("rank", 0), work.get("world", 1)
    reduce, progress = work.get("reduce"), work.get("progress")
    sums = torch.zeros(len(unique), dtype=torch.float64, device=device)
    # no_grad and not inference_mode: what a module caches here must still serve training.
    with _eval_mode(model), torch.no_grad():
        for start, stop, sums_of in batches[rank::world]:
            sums[start:stop] = sums_of(model, unique[start:stop], precision=precision)
            if progress is not None:
                progress(stop, len(unique))
    if reduce is not None:
        sums = reduce(sums)
    place = {key: i for i, key in enumerate(order)}
    return sums.cpu().numpy()[[place[key] for key in keys]]


def _plan(
    windows: Sequence[Window], *, budget: int, short: int
) -> list[tuple[int, int, Callable[..., Tensor]]]:
    """Batches: (start, stop, how they are computed). Prefixes are shared up to `short` tokens."""
    lengths = [len(w.ids) for w in windows if len(w.ids) > short]
    plan = [(*span, _padded_sums) for span in _batches(lengths, budget=budget)]
    if len(lengths) < len(windows):
        from relora_core.evals import tree  # imports torch

        first, size = len(lengths), max(1, budget // tree.NODES)
        groups = list(tree.groups([w.ids for w in windows[first:]]))
        parts = (groups[i : i + size] for i in range(0, len(groups), size))
        plan += [(first + part[0][0], first + part[-1][1], tree.sums) for part in parts]
    return plan


def _batches(lengths: Sequence[int], *, budget: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of at least one sequence, of at most `budget` padded tokens; lengths fall."""
    start = 0
    while start < len(lengths):
        stop = min(len(lengths), start + max(1, budget // max(1, lengths[start])))
        yield start, stop
        start = stop


@contextlib.contextmanager
def _eval_mode(model: LanguageModel) -> Iterator[None]:
    """Dropout off, and every module back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _padded_sums(model: LanguageModel, batch: Sequence[Window], *, precision: str) -> Tensor:
    """(B,) float64 sums."""
    import torch

    ids, scored = pad(batch)
    own, tokens = torch.from_numpy(scored).to(model.device), torch.from_numpy(ids).to(model.device)
    sums = torch.zeros(own.shape, dtype=torch.float64, device=model.device)
    if scored.any():
        targets = tokens[:, 1:][own]
        sums[own] = model.log_probs(tokens[:, :-1], own, targets, precision=precision).double()
    return sums.sum(dim=1)
