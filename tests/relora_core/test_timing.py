"""Steps that are timed: those of training, few, alike on all ranks, and nothing left behind."""

import pytest

import relora_core.timing as timing
from experiments.identity import config_to_json
from relora_core import costs
from relora_core.config import ConfigError
from relora_core.data.grammar import VOCAB_SIZE
from relora_core.timing import PASSES, TIMED, WARM_UP, time_steps
from relora_core.train import accumulate_gradients
from tests import warm


@pytest.fixture
def updates(monkeypatch):
    """Counts the updates whose gradients `train` accumulates, and the passes of each."""
    passes = []

    def counted(*args, micro_batches, **options):
        passes.append(micro_batches)
        return accumulate_gradients(*args, micro_batches=micro_batches, **options)

    monkeypatch.setattr("relora_core.train.accumulate_gradients", counted)
    return passes


@pytest.fixture
def config(nano, monkeypatch):
    """Of a run whose steps are too short to count by seconds, unless a test wants that."""
    monkeypatch.setattr(timing, "LEAST_S", 0.0)

    def make(**changes):
        return nano(model={"vocab_size": VOCAB_SIZE}, **changes)

    return make


def test_it_times_steps_of_training_and_writes_nothing(config, updates, tmp_path):
    setting = config(checkpoint={"every_steps": 1}, dynamics={"every_steps": 1})
    setting.eval.paloma.enabled = setting.eval.blimp.enabled = True
    one = time_steps(setting, folder=tmp_path / "run", cache_dir=tmp_path / "cache")
    assert len(updates) == WARM_UP + TIMED
    assert (one.steps, one.tokens, one.world) == (TIMED, TIMED * 4 * 16, 1)
    assert one.seconds > 0
    assert not any(path.is_file() for path in (tmp_path / "run").rglob("*"))


def test_steps_that_take_long_are_fewer(config, updates, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "MOST_S", 1e-9)
    one = time_steps(config(), folder=tmp_path / "run", cache_dir=tmp_path)
    assert (one.steps, one.tokens) == (1, 4 * 16)
    assert len(updates) == WARM_UP + 1


@pytest.mark.parametrize(
    ("step_s", "count"), [(0.0, 1000), (0.001, 1000), (0.01, 300), (1.0, 10), (7.0, 8), (99.0, 1)]
)
def test_there_are_more_short_steps_and_fewer_long_ones(step_s, count):
    assert timing._count(step_s) == count


@pytest.mark.parametrize(
    ("train", "passes"),
    [
        ({"batch_size": 60, "micro_batch_size": 3}, 5),  # of 20, the largest divisor up to 8
        ({"batch_size": 64, "micro_batch_size": 2}, PASSES),
        ({"batch_size": 6, "micro_batch_size": 2}, 3),
        ({"batch_size": 1024, "micro_batch_tokens": 64}, PASSES),
    ],
    ids=str,
)
def test_a_step_has_few_passes_of_the_runs_own_size(config, updates, tmp_path, train, passes):
    setting = config(train=train)
    one = time_steps(setting, folder=tmp_path / "run", cache_dir=tmp_path)
    assert set(updates) == {passes}
    assert one.tokens == TIMED * passes * costs.micro_batch(setting) * 16


def test_the_low_rank_is_timed_not_the_phase_before_it(config, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "TIMED", 2)
    seen = []
    monkeypatch.setattr(timing, "train", lambda config, **options: seen.append(config))
    with pytest.raises(AssertionError):
        time_steps(
            config(relora={"warm_start_steps": 8}), folder=tmp_path / "run", cache_dir=tmp_path
        )
    assert seen[0].relora.warm_start_steps == 0


def test_what_training_refuses_is_raised(config, tmp_path):
    with pytest.raises(ConfigError, match="must divide"):
        time_steps(
            config(train={"batch_size": 4, "micro_batch_size": 3}),
            folder=tmp_path / "run",
            cache_dir=tmp_path,
        )


RANK = """
import os, sys
from pathlib import Path
import relora_core.timing as timing
from experiments.identity import config_from_json
from relora_core.timing import time_steps

folder = Path(sys.argv[1])
timing.LEAST_S, timing.MOST_S = 0.0, 1e-9 if os.environ["RANK"] == "1" else 1e9
config = config_from_json((folder / "config.json").read_text())
one = time_steps(config, folder=folder / "run", cache_dir=folder)
print(one.steps, one.tokens, one.world)
"""


@pytest.mark.slow
def test_all_ranks_stop_after_the_step_that_rank_0_says(config, tmp_path):
    (tmp_path / "config.json").write_text(config_to_json(config()))
    done = warm.ranks(2, ["-c", RANK, tmp_path], cwd=tmp_path)
    assert [rank.returncode for rank in done] == [0, 0], done
    assert [rank.stdout.split() for rank in done] == [[str(TIMED), str(TIMED * 4 * 16), "2"]] * 2
