"""What ends a command is one line, which promises nothing that the command does not keep."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from experiments import __main__ as commands
from experiments.errors import RunLocked, reporting


def _interrupt(*_: Any, **__: Any) -> NoReturn:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["describe"], "error: interrupted\n"),
        (["show", "x"], "error: interrupted\n"),
        (["evaluate", "x"], "error: interrupted; the same command resumes it\n"),
    ],
)
def test_ctrl_c_promises_to_resume_only_what_can_be_resumed(
    words: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("describe", "find_run", "_evaluate"):
        monkeypatch.setattr(commands, name, _interrupt)
    monkeypatch.setattr(commands.schema, "compose", _interrupt)
    with pytest.raises(SystemExit) as ended:
        commands.main(words)
    assert (ended.value.code, capsys.readouterr().err) == (130, line)


def test_a_run_that_another_process_has_is_named_without_a_class(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended, reporting():
        raise RunLocked("nano-s0 is being run by process 7 on host")
    line = "error: nano-s0 is being run by process 7 on host\n"
    assert (ended.value.code, capsys.readouterr().err) == (1, line)
