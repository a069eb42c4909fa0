"""MLflow kept up to date in a thread: how often, what is heard of it, and how it ends."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from experiments.tracking.tracker import Pass, Tracker
from sweeps import tracking


class Passes:
    """Stands in for a tracker's passes; each waits until `another` is called."""

    def __init__(self, problem: str | None = None) -> None:
        self.problem = problem
        self.finals: list[bool] = []
        self._begun, self._go_on = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, sweeps: object, *, states: object, final: bool) -> list[Pass]:
        self.finals.append(final)
        self._begun.release()
        self._go_on.acquire()
        place = {"uri": "", "experiment": "", "sweep": None}
        return [Pass(**place, names={}, colours={}, problem=self.problem)]

    def await_begin(self) -> None:
        assert self._begun.acquire(timeout=60)

    def let_go_on(self, count: int = 1) -> None:
        self._go_on.release(count)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    made = Passes()
    monkeypatch.setattr(Tracker, "bring_up_to_date", staticmethod(made))
    return made


def test_the_last_pass_is_final_and_may_be_the_only_one_heard_of(
    passes: Passes, tmp_path: Path
) -> None:
    heard: list[Sequence[Pass]] = []
    with tracking.keep_up_to_date(
        tmp_path, None, every_s=0.0, report=heard.append, report_all=False
    ):
        for _ in range(3):
            passes.await_begin()
            passes.let_go_on()
        passes.await_begin()  # the fourth is at work when the body ends
        passes.let_go_on(2)
    assert passes.finals == [False] * 4 + [True]
    assert len(heard) == 1


def test_each_pass_is_heard_of_meanwhile(passes: Passes, tmp_path: Path) -> None:
    heard: list[Sequence[Pass]] = []
    with tracking.keep_up_to_date(tmp_path, None, every_s=0.0, report=heard.append):
        for _ in range(2):
            passes.await_begin()
            passes.let_go_on()
        passes.await_begin()
        passes.let_go_on(2)
    assert len(heard) == len(passes.finals) == 4


def test_after_ctrl_c_there_is_no_last_pass(
    passes: Passes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tracking, "INTERRUPTED_S", 0.01
    )  # the pass at work does not end until it may
    before = set(threading.enumerate())

    def interrupted() -> None:
        with tracking.keep_up_to_date(tmp_path, None, every_s=0.0, report=lambda _: None):
            passes.await_begin()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    passes.let_go_on(100)
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert passes.finals == [False]


def test_a_store_with_a_problem_is_asked_less_and_less_often(
    passes: Passes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes.problem, pauses = "unreachable", []
    asked = threading.Event()

    class Clock(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout is not None and threading.current_thread() is not threading.main_thread():
                pauses.append(timeout)
                if len(pauses) == 6:
                    asked.set()
                    return super().wait(60)
                return self.is_set()
            return super().wait(timeout)

    monkeypatch.setattr(tracking.threading, "Event", Clock)
    passes.let_go_on(100)
    with tracking.keep_up_to_date(tmp_path, None, every_s=5.0, report=lambda _: None):
        assert asked.wait(60)
    assert pauses == [10.0, 20.0, 40.0, 60.0, 60.0, 60.0]
