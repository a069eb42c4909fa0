"""The model scales of conf/model: published sizes, start and memory, without their weights."""

from __future__ import annotations

import math

import pytest
import torch

from experiments import schema, typos
from relora_core import costs
from relora_core.config import validate
from relora_core.model import Decoder

PUBLISHED = {  # parameters in all with the vocabulary of the source
    "tiny": (50_304, 11.3e6),
    "small": (50_304, 64.6e6),
    "medium": (50_304, 181.1e6),
    "large": (50_304, 569.8e6),
    "llama_60m": (32_000, 58.07e6),
    "llama_130m": (32_000, 134.11e6),
    "llama_350m": (32_000, 367.97e6),
    "llama_1b": (32_000, 1339.08e6),
}
"""Weiss et al. 2025 and pico (to 0.1 M); GaLore (to 0.01 M)."""
LLAMAS = [name for name in PUBLISHED if name.startswith("llama")]
OF_GALORE = ["full_rank", "relora", "lora", "galore", "fira", "apollo", "apollo_mini", "switchlora"]
OF_GALORE += ["sltrain", "low_rank"]


def config(name: str, *words: str):
    vocab = PUBLISHED.get(name, (50_304, 0))[0]
    given = [f"model={name}", f"model.vocab_size={vocab}", "method=full_rank", *words]
    return schema.compose(given)


def on_meta(run) -> Decoder:
    with torch.device("meta"):
        return Decoder(run.model)


def test_every_scale_has_a_published_size_or_is_ours():
    assert set(PUBLISHED) == set(typos.options("model")) - {"micro", "nano", "pico_192", "pico_288"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published_and_those_described(name):
    run = config(name)
    _, published = PUBLISHED[name]
    parameters = sum(p.numel() for p in on_meta(run).parameters())
    rounding = 0.005e6 if name in LLAMAS else 0.05e6
    assert abs(parameters - published) <= rounding
    assert parameters == costs.parameters(run).total


@pytest.mark.parametrize("name", ["pico_192", "pico_288"])
def test_the_sizes_between_keep_picos_proportions(name):
    tiny, run = config("tiny").model, config(name).model
    assert run.d_ff == 4 * run.d_model
    assert tiny.d_model < run.d_model < config("small").model.d_model
    same = ("n_layers", "n_heads", "n_kv_heads", "max_seq_len", "init_std")
    assert [getattr(run, key) for key in same] == [getattr(tiny, key) for key in same]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_keeps_the_bytes_described(name):
    """Weights, gradients and AdamW's moments of one step, counted on meta tensors."""
    run = config(name)
    model = on_meta(run)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    for parameter in model.parameters():  # our kernels have no meta versions for a backward
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    tensors = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    counted = sum(t.numel() * t.element_size() for t in tensors if t.ndim)
    memory = costs.memory_bytes(run)
    assert counted == memory["weights"] + memory["gradients"] + memory["moments"]


@pytest.mark.parametrize("name", LLAMAS)
def test_the_llamas_start_as_their_papers(name):
    run = config(name, "model.d_model=256", "model.d_ff=512", "model.n_layers=2",
                 "model.n_heads=8", "model.n_kv_heads=8", "model.vocab_size=2048")  # fmt: skip
    torch.manual_seed(0)
    for parameter in Decoder(run.model).parameters():
        if parameter.ndim == 2:
            spread = 5 * 0.02 / math.sqrt(2 * parameter.numel())
            assert abs(float(parameter.detach().std()) - 0.02) < spread
        else:
            assert torch.equal(parameter, torch.ones_like(parameter))


def test_without_the_knob_weights_are_picos():
    torch.manual_seed(0)
    model = Decoder(config("nano", "model.vocab_size=512").model)
    assert float(model.embedding_proj.weight.detach().std()) == pytest.approx(1, rel=0.02)
    q_proj = model.layers[0].attention.q_proj.weight
    assert float(q_proj.detach().abs().max()) <= 1 / math.sqrt(q_proj.shape[1])


@pytest.mark.parametrize(
    ("name", "model", "tokens_per_batch", "methods"),
    [
        ("lialin_60m", "llama_60m", 122_880, ["full_rank", "lora", "relora"]),
        ("lialin_130m", "llama_130m", 153_600, ["full_rank", "lora", "relora"]),
        ("galore_60m", "llama_60m", 512 * 256, OF_GALORE),
        ("galore_130m", "llama_130m", 512 * 256, OF_GALORE),
    ],
)
def test_a_published_recipe_has_its_model_and_batch_with_each_method(
    name, model, tokens_per_batch, methods
):
    for method in methods:
        run = schema.compose([f"experiment={name}", f"method={method}"])
        validate(run)
        assert run.model.name == model
        assert run.train.batch_size * run.data.seq_len == tokens_per_batch
    other = schema.compose([f"experiment={name}", "model=llama_350m"])
    assert other.model.name == "llama_350m"


@pytest.mark.parametrize("name", ["lialin_60m", "lialin_130m", "galore_60m", "galore_130m"])
def test_a_published_recipe_says_what_it_gave_and_what_differs(name):
    text = (typos.CONF / "experiment" / f"{name}.yaml").read_text()
    for field in ("Source:", "Published:", "Cost:", "Here not there:"):
        assert f"# {field}" in text
