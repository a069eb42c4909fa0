"""The paper's p-values come out again, and the other tests respect what is not independent."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.report.blimp_tests import BlimpTest, blimp_tests, crossed_test, proportion_test
from experiments.stats import compare, mean_interval

# Weiss et al. (2025), at 20,000 steps: accuracies of decoder and ReLoRA to four digits, and p.
PUBLISHED = {"tiny": (0.6504, 0.6236, 1.2e-24), "small": (0.7014, 0.6308, 7.4e-166)}
ROUNDED = 0.00005
accuracies = st.dictionaries(
    st.integers(0, 3),
    st.dictionaries(st.sampled_from("abcdefg"), st.just(math.nan) | st.floats(0, 1)),
    max_size=4,
)


def named(tests: list[BlimpTest]) -> dict[tuple[str, str], BlimpTest]:
    return {(test.unit, test.name): test for test in tests}


def scores(rows: object) -> dict[int, dict[str, float]]:
    return {s: {f"p{i}": float(v) for i, v in enumerate(r)} for s, r in enumerate(np.array(rows))}


# the paper's ------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", PUBLISHED)
def test_the_papers_p_values_from_its_accuracies(model: str) -> None:
    decoder, relora, p = PUBLISHED[model]
    tests = [
        proportion_test(relora + a * ROUNDED, decoder + b * ROUNDED)
        for a, b in product((-1, 1), repeat=2)
    ]
    ends = sorted(test.p for test in tests if test.p is not None)
    assert ends[0] < p < ends[-1]
    # Half a digit of an accuracy is worth this much of so small a p, and no more.
    assert ends[-1] / ends[0] < (2 if model == "tiny" else 5) ** 2


def published(shared_data) -> dict[str, tuple[dict[str, float], dict[str, float], float]]:
    saved = json.loads((shared_data / "paper_results.json").read_text())
    at_end = {m: v["eval"]["20000"]["by_uid"] for m, v in saved["models"].items()}
    return {
        model: (at_end[f"{model[0]}-rel"], at_end[f"{model[0]}-dec"], p)
        for model, p in (
            ("tiny", saved["z_test_saved_output"]["tiny_p"]),
            ("small", saved["z_test_saved_output"]["small_p"]),
        )
    }


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_papers_p_values_from_its_paradigms(shared_data, model: str) -> None:
    relora, decoder, p = published(shared_data)[model]
    paper, *rest = blimp_tests({0: relora}, {0: decoder})
    assert paper.p == pytest.approx(p, rel=1e-6)
    assert (paper.n, paper.side) == (67_000, "smaller")
    assert paper.low is not None
    assert all(test.p is None or test.p > 1e9 * p for test in rest)


def test_with_paradigms_as_unit_the_papers_tiny_gap_is_weak(shared_data) -> None:
    relora, decoder, _ = published(shared_data)["tiny"]
    tests = named(blimp_tests({0: relora}, {0: decoder}))
    # One-sided .015, so twice that; 40 of 67 favour the decoder, 25 ReLoRA, 2 neither.
    assert tests["paradigm", "paired t"].p == pytest.approx(2 * 0.0152687, rel=1e-4)
    assert tests["paradigm", "Wilcoxon signed rank"].p == pytest.approx(2 * 0.0109912, rel=1e-3)
    assert tests["paradigm", "sign test"].note == "25 better, 40 worse, 2 equal"
    assert tests["paradigm", "bootstrap"].low == pytest.approx(-0.052, abs=0.002)
    assert tests["seed", "paired t"].p is None


def test_proportions_by_hand() -> None:
    # z = (.6 - .7) / sqrt(.65 * .35 * 2 / 100) = -1.48250, below which a normal is .06911.
    test = proportion_test(0.6, 0.7, trials=100)
    assert test.statistic == pytest.approx(-1.48250, abs=1e-5)
    assert test.p == pytest.approx(0.06911, abs=1e-5)
    assert proportion_test(0.7, 0.6, trials=100).p == pytest.approx(0.93089, abs=1e-5)


@pytest.mark.parametrize(
    ("arm", "other"), [(0.0, 0.0), (1.0, 1.0), (0.0, 5e-324), (1.0, 1 - 1e-16)]
)
def test_no_variance_is_no_test(arm: float, other: float) -> None:
    test = proportion_test(arm, other)
    assert test.p is None
    assert test.note


# paradigms and seeds ----------------------------------------------------------------------------
def test_sign_test_by_hand() -> None:
    arm, reference = (
        scores([[0.7] * 8 + [0.5]]),
        scores([[*np.linspace(0.1, 0.6, 8), 0.5]]),
    )
    test = named(blimp_tests(arm, reference))["paradigm", "sign test"]
    assert test.p == pytest.approx(2 / 2**8)
    assert test.note == "8 better, 0 worse, 1 equal"


def test_the_last_bit_of_a_mean_over_seeds_breaks_no_tie() -> None:
    arm, reference = scores([[0.3, 0.3, 0.6, 0.8]]), scores([[0.1 + 0.2, 0.2, 0.5, 0.7]])
    assert arm[0]["p0"] != reference[0]["p0"]
    tests = named(blimp_tests(arm, reference))
    assert tests["paradigm", "sign test"].note == "3 better, 0 worse, 1 equal"


def test_more_sentences_of_a_paradigm_move_only_the_papers_test() -> None:
    arm, reference = scores([[0.6, 0.7, 0.65, 0.8]]), scores([[0.5, 0.72, 0.6, 0.7]])
    few, many = (blimp_tests(arm, reference, pairs=pairs) for pairs in (100, 10_000))
    assert few[0].p != many[0].p
    assert [test.p for test in few[1:]] == [test.p for test in many[1:]]


def test_over_seeds_it_is_the_paired_t_of_the_means_over_paradigms() -> None:
    random = np.random.default_rng(0)
    a, b = random.uniform(0.4, 0.9, (5, 8)), random.uniform(0.4, 0.9, (5, 8))
    test = named(blimp_tests(scores(a), scores(b)))["seed", "paired t"]
    plain = compare(dict(enumerate(a.mean(axis=1))), dict(enumerate(b.mean(axis=1))))
    assert (test.p, test.n) == (pytest.approx(plain.p), 5)
    assert (test.low, test.high) == (pytest.approx(plain.low), pytest.approx(plain.high))


def test_an_assumption_is_of_the_test_that_is_shown() -> None:
    values = np.random.default_rng(0).uniform(0.4, 0.9, (5, 8))
    for test in blimp_tests(scores(values), scores(values[::-1])):
        assert "bootstrap" not in test.assumes


def test_seeds_are_paired_by_name_not_by_order() -> None:
    a = {0: {"p": 0.5, "q": 0.6}, 1: {"p": 0.8, "q": 0.9}, 2: {"p": 0.6, "q": 0.7}}
    b = {2: {"q": 0.66, "p": 0.55}, 0: {"q": 0.57, "p": 0.48}, 1: {"q": 0.84, "p": 0.79}}
    test = named(blimp_tests(a, b))["seed", "paired t"]
    assert test.difference == pytest.approx((0.025 + 0.035 + 0.045) / 3)
    assert test.p is not None
    assert test.p < 0.05


def test_arms_without_common_seeds_are_not_paired() -> None:
    a, b = scores([[0.5, 0.6], [0.55, 0.7]]), scores([[0.4, 0.5], [0.6, 0.6]])
    tests = named(blimp_tests(a, {s + 5: row for s, row in b.items()}))
    assert ("seed", "Welch's t") in tests
    assert ("seed and paradigm", "t, seeds and paradigms crossed") not in tests


def test_one_common_seed_of_several_makes_no_pairs() -> None:
    """As in the table of that accuracy."""
    arm, other = scores([[0.5, 0.6], [0.6, 0.7], [0.7, 0.9]]), scores([[0.1, 0.2], [0.3, 0.5]])
    other = {0: other[0], 5: other[1]}
    test = named(blimp_tests(arm, other))["seed", "Welch's t"]
    means = [{s: sum(row.values()) / 2 for s, row in side.items()} for side in (arm, other)]
    expected = compare(*means)
    assert expected.kind == "welch"
    assert (test.difference, test.p) == (pytest.approx(expected.difference), expected.p)


def test_what_is_left_out_is_counted() -> None:
    arm = {0: {"p": 0.6, "q": 0.7, "x": math.nan}, 1: {"p": 0.5, "q": 0.9}, 2: {"p": math.nan}}
    reference = {0: {"p": 0.5, "q": 0.6, "x": 0.9}, 1: {"p": 0.6, "q": 0.7}, 3: {"p": 0.6}}
    for test in blimp_tests(arm, reference):
        assert "2 runs left out" in test.note
        assert "1 paradigm left out" in test.note


def test_nothing_in_common_gives_no_tests() -> None:
    assert blimp_tests({}, {0: {"p": 0.5}}) == []
    assert blimp_tests({0: {"q": 0.5}}, {0: {"p": 0.5}}) == []
    assert blimp_tests({0: {"p": math.nan}}, {0: {"p": 0.5}}) == []


def test_percentages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 65"):
        blimp_tests({0: {"p": 65.0}}, {0: {"p": 0.5}})


def test_crossed_by_hand() -> None:
    # Rows differ by 2, columns by 1, nothing else: MS_seed = 4, MS_paradigm = 1, MS_residual = 0.
    test = crossed_test(np.array([[0.0, 1.0], [2.0, 3.0]]))
    assert (test.difference, test.n) == (1.5, 4)
    assert test.statistic == pytest.approx(1.5 / math.sqrt(5 / 4))


def simulated(seed: int, *, by_seed: float, by_paradigm: float) -> np.ndarray:
    """(2000, 5 seeds, 20 paradigms) of differences around .02."""
    random = np.random.default_rng(seed)
    return (
        0.02
        + random.normal(0, by_seed, (2000, 5, 1))
        + random.normal(0, by_paradigm, (2000, 1, 20))
        + random.normal(0, 0.05, (2000, 5, 20))
    )


@pytest.mark.parametrize(("by_seed", "by_paradigm"), [(0.03, 0.1), (0.02, 0.02), (0.05, 0.0)])
def test_crossed_intervals_cover_the_truth(by_seed: float, by_paradigm: float) -> None:
    intervals = [crossed_test(d) for d in simulated(1, by_seed=by_seed, by_paradigm=by_paradigm)]
    covered = np.mean([t.low <= 0.02 <= t.high for t in intervals if t.low is not None and t.high])
    assert 0.93 < covered < 0.985  # the variance is rounded up where its estimate falls short


def test_paradigms_alone_cover_too_little_where_seeds_differ() -> None:
    draws = simulated(2, by_seed=0.03, by_paradigm=0.03)
    intervals = [mean_interval(d.mean(axis=0).tolist()) for d in draws]
    covered = np.mean([t.low <= 0.02 <= t.high for t in intervals if t.low is not None and t.high])
    assert covered < 0.85  # what "silent on other seeds" warns of


@settings(max_examples=2 * settings.default.max_examples)
@given(accuracies, accuracies)
def test_no_accuracies_break_it(arm, reference) -> None:
    for test in blimp_tests(arm, reference, pairs=10):
        assert test.assumes
        assert test.p is None or 0 <= test.p <= 1
        assert test.low is None or test.low <= test.difference <= test.high
        assert test.p is not None or test.note or test.name == "bootstrap"
