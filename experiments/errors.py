"""Errors as a user sees them: one line and an exit code.

Not for: what is recorded of a failed run (`run/runner.py`).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from relora_core import shared
from relora_core.config import ConfigError
from relora_core.data.base import DataError


class RunLocked(RuntimeError):
    """Another living process is at work on this run."""


def one_line(error: BaseException, *, resumes: bool = False) -> str:
    """An error as one line for tables and terminals; `resumes`: what Ctrl-C ended can go on."""
    if isinstance(error, (ConfigError, DataError, RunLocked)):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted" + ("; the same command resumes it" if resumes else "")
    if isinstance(error, OSError) and (line := shared.explain(error)):
        return line
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]


def fail(line: str, *, code: int) -> NoReturn:
    """Print one line and exit: 2 for the user's mistake, 1 for anything else."""
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(code)


@contextlib.contextmanager
def reporting(*, resumes: bool = False) -> Iterator[None]:
    """Context in which an error ends the process with one line, without a traceback; `resumes` as
    of `one_line`."""
    try:
        yield
    except ConfigError as error:
        fail(str(error), code=2)
    except BrokenPipeError:  # `| head` has read its lines and ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (DataError, RunLocked, OSError) as error:
        fail(one_line(error), code=1)
    except KeyboardInterrupt as error:
        fail(one_line(error, resumes=resumes), code=130)
