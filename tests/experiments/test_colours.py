"""An arm's colour: told apart from others, of its family's hue, and for good."""

from __future__ import annotations

import colorsys
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from experiments.colours import OKABE_ITO, least_used, looks


def a_run(arm: int, *, model: str = "tiny", method: str = "relora") -> Any:
    config = {"model": {"name": model}, "method": method, "relora": {"r": arm}}
    return SimpleNamespace(arm_id=f"{model}-{method}-{arm}", config=config)


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


def apart(one: str, other: str) -> float:
    a, b = (360 * colorsys.rgb_to_hls(*(rgb(colour) / 255))[0] for colour in (one, other))
    return min((a - b) % 360, (b - a) % 360)


@given(st.lists(st.integers(1, 10), min_size=1, max_size=4))
def test_a_hue_per_model_and_no_colour_twice(sizes: list[int]) -> None:
    runs = [a_run(r, model=f"m{number}") for number, n in enumerate(sizes) for r in range(n)]
    colours = {arm_id: look.colour for arm_id, look in looks(runs).items()}
    assert len(set(colours.values())) == len(runs)
    for one, of_one in colours.items():
        for other, of_other in colours.items():
            assert (apart(of_one, of_other) < 23) == (one[:2] == other[:2])


@given(
    st.lists(
        st.builds(
            a_run,
            st.integers(0, 30),
            model=st.sampled_from(["tiny", "small"]),
            method=st.sampled_from(["relora", "lora", "full_rank", "galore", "a", "b"]),
        )
    ),
    st.data(),
)
def test_a_plan_that_grows_changes_no_look(runs: list[Any], data: Any) -> None:
    before = looks(runs[: data.draw(st.integers(0, len(runs)))])
    after = looks(runs)
    assert before.items() <= after.items()
    assert len({look.colour for look in after.values()}) == len({run.arm_id for run in runs})


def test_first_arms_of_families_have_colours_that_colour_blind_readers_tell_apart() -> None:
    runs = [a_run(r, method=str(number)) for number in range(8) for r in (4, 8)]
    assert [look.colour for look in looks(runs).values()][::2] == list(OKABE_ITO)


def test_colours_of_many_arms_of_one_hue_are_all_different() -> None:
    values = [rgb(look.colour) for look in looks(map(a_run, range(20))).values()]
    assert min(np.abs(a - b).max() for i, a in enumerate(values) for b in values[:i]) >= 6


def test_a_plan_of_an_earlier_version_has_colours() -> None:
    older: Any = SimpleNamespace(arm_id="a", config={"train": {"steps": 1}})
    runs = [older, a_run(1)]
    assert [look.colour for look in looks(runs).values()] == list(OKABE_ITO[:2])


def test_an_arm_of_no_sweep_takes_the_colour_that_fewest_have() -> None:
    first = least_used([])
    assert least_used([first.upper()]) != first
    colours: list[str] = []
    for _ in range(13):
        colours.append(least_used(colours))
    assert len(set(colours)) == 13
