"""events.jsonl, written and parsed: one event a line."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

from experiments import json_files
from relora_core import shared
from relora_core.events import Event

if TYPE_CHECKING:
    from experiments.disk.run_dir import RunDir

EVENT = {"kind": str, "step": int, "metrics": dict[str, float], "data": dict[str, Any]}


def parse_event(line: bytes) -> dict[str, Any]:
    """The event of a line of events.jsonl; ValueError if it is none."""
    event = {"metrics": {}, "data": {}, **json_files.parse(line)}
    if not json_files.has_types(event, EVENT):
        raise ValueError("no event")
    return event


class EventLog:
    """Appends Events to events.jsonl with the attempt's number; each line is flushed at once."""

    def __init__(self, run_dir: RunDir, attempt: int) -> None:
        self.attempt = attempt
        self._file = shared.open_file(run_dir.events_path, "a+", encoding="utf-8")
        self._end_torn_line()

    def _end_torn_line(self) -> None:
        """End the half line that a kill while writing has left, so that it spoils no other."""
        size = self._file.seek(0, os.SEEK_END)
        if size:
            with open(self._file.name, "rb") as file:
                file.seek(size - 1)
                torn = file.read(1) != b"\n"
            if torn:
                self._file.write("\n")
                self._file.flush()

    def emit(self, event: Event) -> None:
        if event.kind == "phase":  # of interest only while it lasts
            return
        record = {"attempt": self.attempt, **dataclasses.asdict(event)}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
