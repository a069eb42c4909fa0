import dataclasses

import pytest

from relora_core.config import METHODS, ConfigError, RunConfig, nearest, validate, walk

BAD = [
    ({"relora": {"r": -1}}, "relora.r must be >= 0, got -1; nearest valid: 0"),
    ({"relora": {"r": 4096}}, "relora.r must be in [1, 16]"),
    (
        {"relora": {"prune_ratio": 1.5}},
        "relora.prune_ratio must be >= 0 and <= 1, got 1.5; nearest valid: 1",
    ),
    ({"relora": {"alpha": float("nan")}}, "relora.alpha must be > 0, got nan"),
    ({"relora": {"dropout": 1.0}}, "relora.dropout must be >= 0 and < 1, got 1.0"),
    ({"relora": {"target_modules": ["atention"]}}, "Did you mean 'attention'?"),
    ({"relora": {"target_modules": []}}, "relora.target_modules must name at least one of"),
    ({"relora": {"restart_warmup_steps": 5}}, "must be <= relora.reset_frequency=4, got 5"),
    (
        {"schedule": {"warmup_steps": 5}},
        "schedule.warmup_steps must be <= relora.reset_frequency=4",
    ),
    ({"schedule": {"name": "cosin"}}, "Did you mean 'cosine'?"),
    (
        {"method": "rlora"},
        f"method must be one of {', '.join(METHODS)}, got 'rlora'. Did you mean",
    ),
    ({"model": {"d_model": 30}}, "model.d_model must be a multiple of 2 * n_heads = 8"),
    ({"model": {"n_kv_heads": 3}}, "model.n_kv_heads must divide model.n_heads=4, got 3"),
    ({"train": {"micro_batch_size": 3}}, "must divide train.batch_size=4, got 3; nearest valid: 2"),
    ({"train": {"precision": "fp16"}}, "must be one of fp32, bf16, tf32, got 'fp16'"),
    ({"train": {"precision": "tf32"}}, "must be fp32 or bf16 with runtime.device=cpu (tf32 is a"),
    ({"data": {"seq_len": 4096}}, "data.seq_len must be <= model.max_seq_len=2048, got 4096"),
    ({"data": {"kind": "text"}}, "data.path must name a folder or file for data=text"),
    ({"seed": -1}, "seed must be >= 0"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_bad_values_are_refused_in_one_line(nano, changes, words):
    with pytest.raises(ConfigError) as caught:
        validate(nano(**changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_good_values_pass(nano):
    for method in ("full_rank", "lora", "relora"):
        validate(nano(method=method))


def test_knobs_of_other_methods_are_not_judged_across_fields(nano):
    validate(nano(method="full_rank", relora={"r": 4096}))
    validate(nano(method="lora", schedule={"warmup_steps": 10}))


def test_every_field_is_documented():
    """A line of documentation stands under each config field."""
    import ast
    import inspect

    from relora_core import config as module

    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef) or not node.name.endswith("Config"):
            continue
        body = node.body
        for this, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(this, ast.AnnAssign) and "Config" not in ast.unparse(this.annotation):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{node.name}.{ast.unparse(this.target)} has no line beneath it"


def test_walk_reaches_every_leaf(nano):
    config = nano()
    keys = {key for key, _, _ in walk(config)}
    assert {"seed", "relora.r", "eval.blimp.path", "train.lr"} <= keys
    assert not any(dataclasses.is_dataclass(v) for _, _, v in walk(config))
    assert isinstance(config, RunConfig)


def test_nearest_says_nothing_where_nothing_is_near():
    assert nearest("xyzzy", ["alpha", "r"]) == ""
