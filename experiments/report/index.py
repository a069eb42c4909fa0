"""A page over all sweeps of an output folder: what they are, how far, and what their reports say.

    output_dir/sweeps/index.html

Not for: writing those reports (`page.py`), of which it links the last ones.
"""

from __future__ import annotations

import html
import re
import time
from collections.abc import Mapping
from pathlib import Path

from experiments.disk.output_dir import plan_folder
from experiments.disk.plans import SweepRecord, question, read_sweep, sweep_names
from experiments.disk.state import RunState, state_of
from experiments.disk.states import State
from experiments.json_files import READ_ERRORS
from experiments.report.document import html_page
from relora_core import atomic
from relora_core.config import ConfigError

HEADINGS = ("sweep", "arms", "finished", "question", "headline result", "report")


def write(output_dir: Path | str, *, states: Mapping[str, RunState] | None = None) -> Path:
    """Write the page and return its path; ConfigError if there is no sweep.

    `states` as for `gather`.
    """
    names = sweep_names(output_dir)
    if not names:
        raise ConfigError(f"--html-index needs a sweep, and {output_dir} has none")
    rows = "\n".join(_row(output_dir, name, states or {}) for name in names)
    heads = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    body = (
        f'<p class="note">Written {time.strftime("%Y-%m-%d %H:%M %Z")}. A headline is that of the '
        "report when it was written.</p>\n"
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody>'
        "</table></div>"
    )
    path = plan_folder(output_dir, name="index.html")
    atomic.write_text(path, html_page(f"Sweeps in {Path(output_dir).absolute().name}", body))
    return path


def _row(output_dir: Path | str, name: str, states: Mapping[str, RunState]) -> str:
    try:
        record = read_sweep(output_dir, name)
        arms, finished = str(len(record.arms)), _finished(record, states)
        asked = question(name, record.overrides, [run.experiment for run in record.runs]) or ""
    except READ_ERRORS as error:
        arms, finished, asked = "", "", " ".join(str(error).split())
    report = plan_folder(output_dir, name=name) / "report" / "report.html"
    link = f'<a href="{html.escape(name)}/report/report.html">report</a>' if report.exists() else ""
    texts = [name, arms, finished, asked, headline(report.with_suffix(".md"))]
    return (
        "<tr>"
        + "".join(f"<td>{html.escape(text)}</td>" for text in texts)
        + f"<td>{link}</td></tr>"
    )


def _finished(record: SweepRecord, states: Mapping[str, RunState]) -> str:
    """`3 of 6`; a run whose files are damaged has not finished."""
    done = 0
    for run in record.runs:
        try:
            done += (states.get(run.run_id) or state_of(run.dir)).state == State.FINISHED
        except READ_ERRORS:
            continue
    return f"{done} of {len(record.runs)}"


def headline(report: Path) -> str:
    """The first sentence of a report's answer; empty without one."""
    try:
        text = report.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    answer = text.partition("\n## Answer\n")[2].partition("\n## ")[0]
    lines = (line.strip() for line in answer.splitlines())
    line = next((line for line in lines if line and not line.endswith(":")), "")
    return re.sub(r" Whether neighbours differ.*", "", line).removeprefix("- ")
