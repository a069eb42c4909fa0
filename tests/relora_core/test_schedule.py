import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora_core.schedule import lr_factor, restart_steps

STEPS = [0, 1, 1000, 1999, 2000, 2001, 2050, 2100, 3999, 4000, 4050, 4100, 10000, 19999]
TABLE = {
    # Factors of the published scheduler by horizon (w = F = 2000, R = 100, floor 0.1).
    ("relora", 20_000): [
        0, 0.0005, 0.5, 0.9995, 0, 0.009999, 0.499966, 0.999931, 0.972889,
        0, 0.485056, 0.970111, 0, 0.1,
    ],
    ("relora", 30_000): [
        0, 0.0005, 0.5, 0.9995, 0, 0.01, 0.499986, 0.999972, 0.988729,
        0, 0.493783, 0.987566, 0, 0.354798,
    ],
    ("relora", 200_000): [
        0, 0.0005, 0.5, 0.9995, 0, 0.01, 0.5, 0.999999, 0.999774,
        0, 0.499875, 0.99975, 0, 0.981774,
    ],
    ("full_rank", 20_000): [
        0, 0.0004, 0.4, 0.7996, 0.8, 0.8004, 0.82, 0.84, 0.914343,
        0.914286, 0.911429, 0.908571, 0.571429, 0.000057,
    ],
    ("full_rank", 200_000): [
        0, 0.0004, 0.4, 0.7996, 0.8, 0.8004, 0.82, 0.84, 0.99241,
        0.992405, 0.992152, 0.991899, 0.962025, 0.911397,
    ],
}  # fmt: skip


def paper(nano, method, horizon):
    return nano(
        method=method,
        train={"steps": 20_000},
        relora={"reset_frequency": 2000, "restart_warmup_steps": 100},
        schedule={
            "name": "cosine" if method == "relora" else "linear",
            "warmup_steps": 2000 if method == "relora" else 2500,
            "min_ratio": 0.1,
            "total_steps": horizon,
        },
    )


@pytest.mark.parametrize(("method", "horizon"), TABLE)
def test_factors_are_the_published_ones(nano, method, horizon):
    config = paper(nano, method, horizon)
    got = [round(lr_factor(k, config=config), 6) for k in STEPS]
    assert got == pytest.approx(TABLE[method, horizon], abs=1e-6)


def test_nine_restarts_in_the_papers_run(nano):
    assert restart_steps(paper(nano, "relora", None)) == list(range(2000, 20_000, 2000))
    assert restart_steps(paper(nano, "full_rank", None)) == []
    assert restart_steps(paper(nano, "lora", None)) == []


@given(
    steps=st.integers(1, 400),
    frequency=st.integers(1, 100),
    warmup=st.integers(0, 100),
    rewarm=st.integers(0, 100),
    floor=st.floats(0, 1),
    name=st.sampled_from(["cosine", "linear"]),
)
def test_the_factor_is_a_share_and_vanishes_only_where_it_should(
    steps, frequency, warmup, rewarm, floor, name
):
    from tests.conftest import nano_config

    config = nano_config(
        train={"steps": steps},
        relora={"reset_frequency": frequency, "restart_warmup_steps": min(rewarm, frequency)},
        schedule={"warmup_steps": min(warmup, frequency, steps), "min_ratio": floor, "name": name},
    )
    factors = [lr_factor(k, config=config) for k in range(steps)]
    assert all(0 <= f <= 1 for f in factors)
    if config.relora.restart_warmup_steps:
        assert all(factors[k] == 0 for k in restart_steps(config))
