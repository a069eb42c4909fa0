"""Log-probabilities of windows: against float64, for any batching and any number of ranks."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_core.config import ModelConfig
from relora_core.evals import scoring, tree
from relora_core.evals.base import Window
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


@pytest.fixture(params=[False, True], ids=["padded", "trees"])
def score(request):
    return functools.partial(scoring.score, share_prefixes=request.param)


def test_sums_equal_a_float64_model_without_padding(model, score):
    cases = windows(count=12) + windows(count=30, seed=1, alphabet=2)  # many shared prefixes
    # The same prefix, scored in one window and only context in another.
    cases += [Window(cases[0].ids, n) for n in range(len(cases[0].ids))]
    expected = [slow(model, w) for w in cases]
    np.testing.assert_allclose(score(model, cases), expected, atol=2e-4)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    batch_tokens=st.integers(1, 300),
    shared=st.booleans(),
    short=st.integers(1, 40),
)
def test_sums_do_not_depend_on_the_batches(model, seed, batch_tokens, shared, short):
    cases = windows(count=30, seed=seed, alphabet=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "SHORT", short)
        scores = scoring.score(model, cases, batch_tokens=batch_tokens, share_prefixes=shared)
    np.testing.assert_allclose(scores, scoring.score(model, cases), atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), alphabet=st.integers(1, 4))
def test_a_tree_holds_each_prefix_once_and_shows_it_to_itself_alone(seed, alphabet):
    cases = sorted((w.ids for w in windows(count=12, seed=seed, alphabet=alphabet)), key=bytes)
    trees = tree.build(cases)
    spans = list(tree.groups(cases))
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    width = trees.ids.shape[1]
    for group, (start, stop) in enumerate(spans):
        prefixes = {
            tuple(ids[: n + 1]): None for ids in cases[start:stop] for n in range(len(ids) - 1)
        }
        nodes = {int(node) for row in trees.path[start:stop] for node in row if node >= 0}
        assert len(nodes) == len(prefixes) <= max(tree.NODES, 32)
        assert all(node // width == group for node in nodes)
        for ids, path in zip(cases[start:stop], trees.path[start:stop], strict=True):
            steps = [int(node) % width for node in path if node >= 0]
            assert list(trees.ids[group, steps]) == list(ids[:-1])
            assert list(trees.depth[group, steps]) == list(range(len(ids) - 1))
            for n, node in enumerate(steps):
                assert set(np.flatnonzero(trees.mask[group, node])) == set(steps[: n + 1])


def test_adapters_count_in_a_tree(model):
    """The model that is trained, adapters and all, is what trees evaluate."""
    from relora_core.config import ReLoRAConfig
    from relora_core.methods.adapter import ReLoRALinear

    own = Decoder(model.config)
    own.load_state_dict(model.state_dict())
    for block in own.layers:
        block.attention.q_proj = ReLoRALinear(block.attention.q_proj, ReLoRAConfig(r=2))
        torch.nn.init.normal_(block.attention.q_proj.lora_A)
        torch.nn.init.normal_(block.attention.q_proj.lora_B)
    cases = windows(count=40, seed=7, alphabet=3)
    plain = scoring.score(own, cases)
    assert np.abs(plain - scoring.score(model, cases)).max() > 0.1
    np.testing.assert_allclose(scoring.score(own, cases, share_prefixes=True), plain, atol=2e-5)


def test_reduced_precision_is_near_and_leaves_the_body_alone(model, score):
    cases = [w for w in windows(count=40, seed=8) if w.scored]
    exact, rough = score(model, cases), score(model, cases, precision="bf16")
    assert 0 < np.abs(rough - exact).max() < 0.01 * np.abs(exact).max()
    assert model.de_embedding_proj.weight.dtype == torch.float32


def test_equal_windows_get_equal_sums(model, score):
    cases = windows(count=200, seed=3)
    scores = score(model, cases + cases[::-1], batch_tokens=64)
    assert (scores[:200] == scores[:199:-1]).all()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_add_up_to_one_rank_exactly(model, score, world):
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


def test_progress_ends_at_the_number_of_distinct_windows(model, score):
    calls = []
    cases = windows(count=20, seed=5)
    score(model, cases * 2, batch_tokens=64, progress=lambda *seen: calls.append(seen))
    distinct = len({(w.ids.tobytes(), w.scored) for w in cases if w.scored})
    dones = [done for done, _ in calls]
    assert len(calls) > 1
    assert dones == sorted(dones)
    assert calls[-1][0] == calls[-1][1] >= distinct


def test_an_evaluation_leaves_rng_modes_and_gradients_alone(score):
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
            self.device = torch.device("cpu")

        def log_probs(self, ids, at, targets, *, precision):
            assert not self.training
            raise RuntimeError("broken")

    model = Failing().train()
    with pytest.raises(RuntimeError, match="broken"):
        scoring.score(model, windows(count=2, seed=6))
    assert model.training
