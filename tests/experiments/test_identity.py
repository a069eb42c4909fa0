import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.identity import arm_id, config_from_json, config_to_json, run_id, scientific
from relora_core.config import get, walk

# Ids that runs on people's disks have. None may ever change.
IDS = [
    ({}, "nano-relora-r4-t4-grammar-s0-6a1b8eea2a835955"),
    ({"seed": 7}, "nano-relora-r4-t4-grammar-s7-e0081d908861a0a2"),
    ({"method": "full_rank"}, "nano-fullrank-grammar-s0-84af881f36eb1a07"),
    (
        {"method": "lora", "relora": {"r": 4, "alpha": 8.0}},
        "nano-lora-r4-grammar-s0-77e91532402fe266",
    ),
    ({"method": "lora", "relora": {"r": 0}}, "nano-lora-r0-grammar-s0-e849a86cdfab81c0"),
    (
        {"method": "galore", "galore": {"r": 4, "update_gap": 3}},
        "nano-galore-r4-grammar-s0-00df41cb212949d3",
    ),
    (
        {"method": "switchlora", "switchlora": {"r": 4, "interval": 20}},
        "nano-switchlora-r4-i20-d0.1-f5-grammar-s0-c5083b183eab425d",
    ),
    (
        {"method": "sparse", "sparse": {"density": 0.2, "update_gap": 3}},
        "nano-sparse-d0.2-grammar-s0-f3c0377a0fbbdc60",
    ),
    (
        {"method": "sltrain", "sltrain": {"r": 4, "delta": 0.1}},
        "nano-sltrain-r4-d0.1-grammar-s0-b0e2fbda42cb8c64",
    ),
    (
        {"method": "fira", "fira": {"r": 4, "update_gap": 3}},
        "nano-fira-r4-grammar-s0-d9d07e6e2a134967",
    ),
    (
        {"method": "fira", "fira": {"r": 4, "residual": "code", "norm_growth": None}},
        "nano-fira-r4-grammar-s0-769bbb5d3ab3026e",
    ),
    (
        {"method": "apollo", "apollo": {"r": 4, "update_gap": 3}},
        "nano-apollo-r4-grammar-s0-455284c57d4658ab",
    ),
    (
        {"method": "apollo", "apollo": {"r": 1, "scaling": "tensor", "scale": 128.0}},
        "nano-apollo-r1-grammar-s0-4ad817444d03b525",
    ),
    ({"relora": {"prune_ratio": 0.5}}, "nano-relora-r4-t4-grammar-s0-2fcd66f107f5eadb"),
    ({"relora": {"joint_mask": False}}, "nano-relora-r4-t4-grammar-s0-d44810a28eb86a8e"),
    (
        {"relora": {"optimizer_state": "magnitude", "prune_ratio": 0.99, "joint_mask": False}},
        "nano-relora-r4-t4-grammar-s0-eda4777353a36f2b",
    ),
    ({"relora": {"optimizer_state": "keep"}}, "nano-relora-r4-t4-grammar-s0-5b36e3131e7793ce"),
    (
        {"relora": {"init_a": "zero", "warm_start_steps": 2}},
        "nano-relora-r4-t4-grammar-s0-3d32779821409cbd",
    ),
    (
        {"relora": {"scaling": "trainable", "alpha": 5.0}},
        "nano-relora-r4-t4-grammar-s0-c30c1fbdc7a18468",
    ),
    (
        {"relora": {"scaling": "rslora", "dropout": 0.1}},
        "nano-relora-r4-t4-grammar-s0-28de4333927a1756",
    ),
    (
        {"relora": {"target_modules": ["swiglu", "attention"]}},
        "nano-relora-r4-t4-grammar-s0-8d8849a021d0b778",
    ),
    (
        {"relora": {"first_restart": 3, "reset_frequency": 3}},
        "nano-relora-r4-t3-grammar-s0-fe4abe083069abcc",
    ),
    (
        {"relora": {"rank_schedule": [[2, 4]], "restart_groups": 2}},
        "nano-relora-r4-t4-grammar-s0-12b57deb99cfdacd",
    ),
    (
        {"relora": {"adaptive_rank_energy": 0.9, "nested_rank": True}},
        "nano-relora-r4-t4-grammar-s0-b3986054ee84132b",
    ),
    (
        {"method": "full_rank", "train": {"optimizer": "muon"}},
        "nano-fullrank-muon-grammar-s0-d2d70dcf2c9e40d9",
    ),
    (
        {"schedule": {"name": "linear", "min_ratio": 0.1}},
        "nano-relora-r4-t4-grammar-s0-a2131634827ade61",
    ),
    ({"schedule": {"total_steps": 99}}, "nano-relora-r4-t4-grammar-s0-3394086ad243a4cf"),
    (
        {"train": {"lr": 0.001, "grad_clip": 1.0, "precision": "bf16"}},
        "nano-relora-r4-t4-grammar-s0-87b1d1b7e15a2008",
    ),
    (
        {
            "data": {
                "kind": "text",
                "path": "x",
                "tokenizer": "y",
                "fingerprint": "f",
                "shuffle_rows": True,
            }
        },
        "nano-relora-r4-t4-text-s0-4a18b0464b522b00",
    ),
    (
        {"data": {"kind": "pretokenized", "path": "x", "vocab_size": 64, "eos_id": 0}},
        "nano-relora-r4-t4-pretokenized-s0-c496c7be3feb3668",
    ),
    (
        {
            "eval": {
                "paloma": {"enabled": True, "every_steps": 2},
                "blimp": {"enabled": True, "precision": "bf16"},
            }
        },
        "nano-relora-r4-t4-grammar-s0-e7d671632c570bb8",
    ),
    (
        {"dynamics": {"every_steps": 2, "what": ["weight", "gradient"]}},
        "nano-relora-r4-t4-grammar-s0-4b0e1bf3963393e8",
    ),
]


@pytest.mark.parametrize(("change", "name"), IDS)
def test_no_run_is_ever_renamed(nano, change, name):
    config = nano(**{section: values for section, values in change.items() if section != "eval"})
    for eval_name, values in change.get("eval", {}).items():
        for key, value in values.items():
            setattr(getattr(config.eval, eval_name), key, value)
    assert run_id(config) == name


def test_seeds_share_an_arm_and_not_a_run(nano):
    one, two = nano(seed=1), nano(seed=2)
    assert arm_id(one) == arm_id(two)
    assert run_id(one) != run_id(two)


@pytest.mark.parametrize(
    "change",
    [
        {"output_dir": "elsewhere"},
        {"tracking": {"uri": "http://127.0.0.1:1"}},
        {"runtime": {"threads": 7}},
        {"checkpoint": {"every_steps": 3}},
        {"train": {"micro_batch_size": 2}},
        {"sweep": {"name": "x"}},
        {"data": {"path": "moved"}},
    ],
)
def test_where_it_runs_is_outside(nano, change):
    assert run_id(nano()) == run_id(nano(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"relora": {"r": 5}},
        {"train": {"lr": 0.011}},
        {"data": {"fingerprint": "f"}},
        {"method": "lora"},
        {"schedule": {"total_steps": 99}},
        {"eval": {}},
    ],
)
def test_what_it_computes_is_inside(nano, change):
    other = nano(**change)
    if change == {"eval": {}}:
        other.eval.blimp.enabled = True
    assert run_id(nano()) != run_id(other)


def test_knobs_of_unselected_methods_are_outside(nano):
    assert run_id(nano(method="full_rank")) == run_id(nano(method="full_rank", relora={"r": 9}))
    assert run_id(nano(method="lora")) == run_id(nano(method="lora", relora={"reset_frequency": 9}))
    assert run_id(nano(method="lora")) != run_id(nano(method="lora", relora={"r": 9}))


def test_knobs_of_an_optimizer_that_is_not_chosen_are_outside(nano):
    changes = [{"momentum": 0.5}, {"nesterov": False}, {"ns_steps": 3}, {"lr_ratio": 9.0}]
    for change in [*changes, {"adjust_lr": "original"}]:
        assert run_id(nano()) == run_id(nano(muon=change))
        muon = {"optimizer": "muon"}
        assert run_id(nano(train=muon)) != run_id(nano(train=muon, muon=change))


def test_knobs_of_evals_that_are_off_are_outside(nano):
    config = nano()
    other = nano()
    other.eval.blimp.every_steps = 5
    assert run_id(config) == run_id(other)
    config.eval.blimp.enabled = other.eval.blimp.enabled = True
    assert run_id(config) != run_id(other)


def test_a_knob_added_later_renames_nothing(nano, monkeypatch):
    """At the value that means "as before" it is left out of the hash; at any other it is inside."""
    config = nano()
    key = "relora.dropout"
    field = next(f for k, f, _ in walk(config) if k == key)
    keys_before = scientific(config)
    monkeypatch.setattr(field, "metadata", {**field.metadata, "as_before": get(config, key)})
    without = scientific(config)
    assert set(keys_before) - set(without) == {key}
    config.relora.dropout = 0.25
    assert scientific(config)[key] == 0.25


def test_a_changed_default_aliases_nothing(nano):
    """The digest covers values, not differences to defaults."""
    assert all(k in scientific(nano()) for k in ("train.weight_decay", "relora.prune_ratio"))


@given(seed=st.integers(0, 2**31 - 1), lr=st.floats(1e-9, 1.0), r=st.integers(1, 16))
def test_frozen_configs_come_back_equal(seed, lr, r):
    from tests.conftest import nano_config

    config = nano_config(seed=seed, train={"lr": lr}, relora={"r": r})
    again = config_from_json(config_to_json(config))
    assert again == config
    assert run_id(again) == run_id(config)


def test_integers_in_json_become_floats_where_the_knob_is_one(nano):
    values = json.loads(config_to_json(nano()))
    values["relora"]["alpha"] = 8
    again = config_from_json(json.dumps(values))
    assert isinstance(again.relora.alpha, float)
    assert run_id(again) == run_id(nano())


def test_unknown_keys_in_a_frozen_config_are_refused(nano):
    values = dataclasses.asdict(nano())
    values["relora"]["rr"] = 1
    with pytest.raises(ValueError, match=r"unknown key relora\.rr"):
        config_from_json(json.dumps(values))


def test_ids_are_file_names(nano):
    config = nano(model={"name": "../we ird"})
    assert "/" not in run_id(config)
    assert not run_id(config).startswith(".")
