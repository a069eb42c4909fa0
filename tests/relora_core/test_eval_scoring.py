"""Log-probabilities of windows: against float64, for any batching and any number of ranks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_core.config import ModelConfig
from relora_core.evals import Window, score
from relora_core.model import Decoder

VOCAB = 50


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=16, d_ff=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=32, vocab_size=VOCAB
    )
    decoder = Decoder(config)
    with torch.no_grad():
        decoder.de_embedding_proj.weight.mul_(4)  # far from uniform
    return decoder


def windows(*, count: int, seed: int = 0, alphabet: int = VOCAB) -> list[Window]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 33, size=count)
    ids = [rng.integers(0, alphabet, size=n).astype(np.int32) for n in lengths]
    return [Window(x, int(rng.integers(0, len(x)))) for x in ids]


def slow(model: Decoder, window: Window) -> float:
    """One sequence, no padding, float64 softmax over full logits of a float64 copy of the model."""
    double = Decoder(dataclasses.replace(model.config)).double().eval()
    double.load_state_dict(model.state_dict())
    ids = torch.from_numpy(window.ids).long()
    if window.scored == 0:
        return 0.0
    with torch.no_grad():
        hidden = double.hidden_states(ids[None, :-1])[0]
        table = (hidden @ double.de_embedding_proj.weight.T).log_softmax(dim=1)
    every = [table[t, ids[t + 1]].item() for t in range(len(ids) - 1)]
    return sum(every[len(every) - window.scored :])


def test_sums_equal_a_float64_model_without_padding(model):
    cases = windows(count=12) + windows(count=30, seed=1, alphabet=2)  # many shared prefixes
    # The same prefix, scored in one window and only context in another.
    cases += [Window(cases[0].ids, n) for n in range(len(cases[0].ids))]
    expected = [slow(model, w) for w in cases]
    np.testing.assert_allclose(score(model, cases), expected, atol=2e-4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), batch_tokens=st.integers(1, 300))
def test_sums_do_not_depend_on_the_batches(model, seed, batch_tokens):
    cases = windows(count=30, seed=seed, alphabet=3)
    np.testing.assert_allclose(
        score(model, cases, batch_tokens=batch_tokens), score(model, cases), atol=2e-5
    )


def test_equal_windows_get_equal_sums(model):
    cases = windows(count=200, seed=3)
    scores = score(model, cases + cases[::-1], batch_tokens=64)
    assert (scores[:200] == scores[:199:-1]).all()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_add_up_to_one_rank_exactly(model, world):
    cases = windows(count=40, seed=4)
    shares = []

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        shares.append(tensor.clone())
        return tensor

    for rank in range(world):
        score(model, cases, batch_tokens=64, rank=rank, world=world, reduce=collect)
    total = torch.stack(shares).sum(dim=0)
    reduced = score(model, cases, batch_tokens=64, rank=1, world=world, reduce=lambda _: total)
    assert (reduced == score(model, cases, batch_tokens=64)).all()
    assert all(0 < (share != 0).sum() < len(share) for share in shares)


def test_progress_ends_at_the_number_of_distinct_windows(model):
    calls = []
    cases = windows(count=20, seed=5)
    score(model, cases * 2, batch_tokens=64, progress=lambda *seen: calls.append(seen))
    distinct = len({(w.ids.tobytes(), w.scored) for w in cases if w.scored})
    dones = [done for done, _ in calls]
    assert len(calls) > 1
    assert dones == sorted(dones)
    assert calls[-1][0] == calls[-1][1] >= distinct


def test_an_evaluation_leaves_rng_modes_and_gradients_alone():
    torch.manual_seed(0)
    model = Decoder(ModelConfig(d_model=16, d_ff=32, n_layers=2, n_heads=4, vocab_size=VOCAB))
    model.layers[0].add_module("extra", torch.nn.Dropout(0.5))
    model.train()
    model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    score(model, windows(count=5))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    ids = torch.arange(6)[None]
    model(ids[:, :-1], ids[:, 1:]).backward()  # buffers made while evaluating still carry gradients
    assert model.embedding_proj.weight.grad is not None


def test_dropout_is_off_and_modes_return_after_a_failure():
    class Failing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def hidden_states(self, ids):
            assert not self.training
            raise RuntimeError("broken")

    model = Failing().train()
    with pytest.raises(RuntimeError, match="broken"):
        score(model, windows(count=2, seed=6))
    assert model.training
