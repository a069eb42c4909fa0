"""method=lora relora.r=0: the blocks' linears stay as drawn; embedding, head and norms learn."""

import pytest
import torch
from training import build, one_step

from relora_core import checkpoint, costs
from relora_core.config import ConfigError, linear_shapes, validate
from relora_core.data.grammar import VOCAB_SIZE
from relora_core.events import NullSink
from relora_core.export import export_run, read_model
from relora_core.methods import build_method
from relora_core.model import Decoder
from relora_core.train import train


def frozen(nano, **changes):
    return nano(method="lora", relora={"r": 0, "dropout": 0.1}, **changes)


def test_the_body_stays_and_all_else_moves(nano):
    model, _, optimizer = build(frozen(nano))
    before = {name: p.clone() for name, p in model.named_parameters()}
    for seed in range(2):
        one_step(model, optimizer, seed)
    body = {f"{name}.weight" for name in linear_shapes(frozen(nano).model)}
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(before) - body


def test_modules_left_out_of_the_targets_are_trained(nano):
    config = nano(method="lora", relora={"r": 0, "full_rank_modules": ["w_2"]})
    model, _, _ = build(config)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".w_" in n}
    assert trained == {n for n, _ in model.named_parameters() if "w_2" in n}


def test_the_counts_are_the_models(nano):
    config = frozen(nano)
    model, method, _ = build(config)
    counted = costs.parameters(config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert list(method.adapter_factors(model)) == []


def test_a_run_keeps_the_body_of_its_seed_and_ends_in_a_plain_model(nano, tmp_path):
    measured = {"every_steps": 2, "what": ["weight", "gradient", "update_proxy", "update_total"]}
    config = frozen(nano, model={"vocab_size": VOCAB_SIZE}, train={"steps": 4}, dynamics=measured)
    train(config, checkpoints=tmp_path / "checkpoints", cache_dir=tmp_path, sink=NullSink())
    [*_, newest] = checkpoint.complete(tmp_path / "checkpoints")
    export_run(config, checkpoint=newest, folder=tmp_path / "exported")
    _, exported = read_model(tmp_path / "exported")
    torch.manual_seed(config.seed)
    drawn = Decoder(config.model).state_dict()
    assert exported.keys() == drawn.keys()
    body = {f"{name}.weight" for name in linear_shapes(config.model)}
    assert {name for name, tensor in drawn.items() if torch.equal(exported[name], tensor)} == body


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "relora", "relora": {"r": 0}}, "relora.r must be >= 1 with method=relora"),
        ({"method": "lora", "relora": {"r": 0, "warm_start_steps": 2}}, "warm_start_steps must be"),
    ],
)
def test_what_needs_adapters_is_refused(nano, changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(nano(**changes))


def test_no_adapter_is_made(nano):
    model, _, _ = build(frozen(nano))
    assert not any("lora_" in name for name, _ in model.named_parameters())
    assert build_method(frozen(nano)).restarts(4) is False
