import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.identity import arm_id, config_from_json, config_to_json, run_id, scientific
from relora_core.config import get, walk


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
