"""The layout of a run's folder, outputs/runs/<run_id>/. Not for: deciding a run's state.

config.json        frozen RunConfig, written once
status.json        state, step, heartbeat, attempts; replaced atomically
events.jsonl       the record: one Event per line, append-only, one writer
attempts/001.json  host, pid, start, code of each attempt;  attempts/001.log  its output
checkpoints/       step-00000060/ ... (relora_core/checkpoint.py)
result.json        final metrics, written when the run ended (finished or diverged)
error.txt          the newest attempt's traceback
mlflow.json        position of the sync (experiments/tracking/run_view.py)
lock               host, pid, process start and job of the attempt that is at work
trial.json         for runs of a search: which search and trial (sweeps/search/)
cancel             there if the user wants the run to end; a new launch removes it
changes.json       what the user accepted although it had changed (experiments/disk/inputs.py)
evals/<name>/      evaluations apart from training (experiments/run/evaluate.py)
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from experiments import json_files
from experiments.disk import flock, frozen
from experiments.disk.event_log import parse_event
from experiments.disk.process import is_alive, is_of_this_boot, process_start
from experiments.disk.states import State
from experiments.errors import RunLocked
from experiments.identity import config_from_json, config_to_json
from experiments.scheduler import current_job
from relora_core import atomic, shared
from relora_core.config import EVALS, RunConfig

LOCK = {"host": str, "pid": int, "started": float, "birth": str | None, "job_id": str | None}
LOCK |= {"flock": bool | None, "device": int | None}
ATTEMPT = {"host": str, "pid": int, "python": str, "commit": str, "tree_hash": str}
ATTEMPT |= {"code_hash": str, "cpu": str, "packages": dict[str, str], "gpus": list[Any]}
RESULT = {"state": str, "step": int, "metrics": dict[str, float]}
"""Types of the fields that are read from these files."""
SILENT_AFTER_S = 300.0
"""A running run that has written nothing for this long gets a note; its process may be dead."""


@dataclass(kw_only=True, slots=True)
class Status:
    """status.json: the state that the run last recorded."""

    state: State = State.PLANNED
    attempts: int = 0
    step: int = 0
    """Optimizer steps completed."""
    steps: int = 0
    """Optimizer steps in all."""
    loss: float | None = None
    """Newest logged training loss, nats per token."""
    tokens_per_s: float | None = None
    mfu: float | None = None
    """Share of the GPUs' peak, by the FLOPs of the method; None: no GPU, or its peak is unknown."""
    mfu_6n: float | None = None
    """The same by 6N + 12 L d T FLOPs per token."""
    eta_s: float | None = None
    """Seconds of training left at the newest rate."""
    phase: str = ""
    """`start`, `train`, `eval ...`, `checkpoint`."""
    heartbeat: float = 0.0
    """When the run last wrote its status, in seconds since the epoch."""
    host: str = ""
    pid: int = 0
    birth: str | None = None
    """Of the local launcher that queued it (`process.process_start`)."""
    job_id: str | None = None
    """Of the SLURM job that we submitted; None for any other process."""
    error: str | None = None
    """One line; the traceback is in error.txt."""

    def __post_init__(self) -> None:
        self.state = State(self.state)  # JSON holds a plain string


class RunDir:
    """One run's folder. Creating the object touches nothing on disk."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock: dict[str, Any] | None = None
        """The lock as this object has written it."""

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def output_dir(self) -> Path:
        """The folder that has the run in its `runs`, wherever it has been moved to."""
        return self.path.absolute().parents[1]

    config_path = property(lambda self: self.path / "config.json")
    status_path = property(lambda self: self.path / "status.json")
    events_path = property(lambda self: self.path / "events.jsonl")
    result_path = property(lambda self: self.path / "result.json")
    error_path = property(lambda self: self.path / "error.txt")
    mlflow_path = property(lambda self: self.path / "mlflow.json")
    cancel_path = property(lambda self: self.path / "cancel")
    trial_path = property(lambda self: self.path / "trial.json")
    changes_path = property(lambda self: self.path / "changes.json")
    evals = property(lambda self: self.path / "evals")
    checkpoints = property(lambda self: self.path / "checkpoints")
    attempts = property(lambda self: self.path / "attempts")

    def create(self, config: RunConfig) -> None:
        """Make the folder and freeze the config in it.

        An existing run keeps its config, except for paths of data that have been moved.
        """
        config = frozen.absolute(config)
        shared.make_folder(self.path)
        shared.make_folder(self.attempts)
        if not self.config_path.exists():
            with contextlib.suppress(FileExistsError):
                atomic.create_text(self.config_path, config_to_json(config))
        elif config.data.fingerprint:
            self._move_data(config)
        if not self.status_path.exists():
            self.write_status(Status(steps=config.train.steps))

    def _move_data(self, config: RunConfig) -> None:
        """Update paths in config.json whose data are the same by fingerprint."""
        with contextlib.suppress(OSError, json_files.Damaged, KeyError, TypeError):
            raw = json_files.read(self.config_path)
            changed = False
            for name in ("data", *(f"eval.{name}" for name in EVALS)):
                own: Any = raw
                new: Any = config
                for part in name.split("."):
                    own, new = own[part], getattr(new, part)
                same = own["fingerprint"] == new.fingerprint
                for key in ("path", "tokenizer"):
                    if same and key in own and own[key] and own[key] != getattr(new, key):
                        own[key], changed = getattr(new, key), True
            if changed:
                atomic.write_json(self.config_path, raw)

    def config(self) -> RunConfig:
        """The frozen config; Damaged if this version cannot read it."""
        in_output_dir = self.path.absolute().parent.name == "runs"
        try:
            config = config_from_json(self.config_path.read_text(encoding="utf-8"))
            return frozen.read(config, output_dir=self.output_dir if in_output_dir else None)
        except (ValueError, TypeError) as error:
            raise json_files.Damaged(
                f"{self.config_path} must be a config as this version writes it ({error})"
            ) from None

    def trial_tags(self) -> dict[str, Any]:
        """Search and number of the trial that asked for this run; empty if none did."""
        raw = _read_json(self.trial_path)
        return {"study": raw.get("study"), "trial": raw.get("number")} if raw else {}

    # status -------------------------------------------------------------------------------------
    def status(self) -> Status:
        """The newest status: `planned` if there is none, `failed` if the file is damaged.

        The same command goes on with a failed run, and its next status replaces the damaged one.
        """
        try:
            raw = json_files.read(self.status_path)
            return Status(**json_files.read_fields(Status, raw))
        except FileNotFoundError:
            return Status()
        except ValueError as error:
            why = "" if isinstance(error, json_files.Damaged) else f" ({error})"
            problem = f"status.json is damaged{why}; the same command goes on"
            return Status(state=State.FAILED, attempts=len(self.attempt_records()), error=problem)

    def write_status(self, status: Status) -> None:
        atomic.write_json(self.status_path, dataclasses.asdict(status))

    def update_status(self, **changes: Any) -> Status:
        """Change some fields of status.json and renew the heartbeat."""
        status = dataclasses.replace(self.status(), heartbeat=time.time(), **changes)
        self.write_status(status)
        return status

    # attempts -----------------------------------------------------------------------------------
    def next_attempt(self) -> int:
        """The next unused number of an attempt, even if status.json was lost."""
        had = [int(p.stem) for p in self.attempts.glob("*.json") if p.stem.isdigit()]
        return 1 + max(self.status().attempts, *had, 0)

    def log_path(self, attempt: int) -> Path:
        return self.attempts / f"{attempt:03d}.log"

    def write_attempt(self, attempt: int, record: dict[str, Any]) -> None:
        atomic.write_json(self.attempts / f"{attempt:03d}.json", record)

    def attempt_records(self) -> list[dict[str, Any]]:
        """Host, process and code of each attempt, oldest first."""
        records = [_read_json(path) for path in sorted(self.attempts.glob("*.json"))]
        return [
            record
            for record in records
            if record and json_files.has_types(record, ATTEMPT, partial=True)
        ]

    @contextlib.contextmanager
    def lock(
        self, *, is_dead: Callable[[dict[str, Any]], bool] = lambda holder: False
    ) -> Iterator[None]:
        """Lock the run; RunLocked if another process has it locked that may be alive.

        `is_dead` tells whether a holder on another host has certainly ended. An earlier start of
        this very job always has.
        """
        path = self.path / "lock"
        me: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "birth": process_start(os.getpid()),
            "job_id": current_job(),
            "flock": True,
            "device": self.path.stat().st_dev,
        }
        taken, held = False, None
        while not taken:
            with self._alone():  # two processes may see a stale lock: one would remove the new one
                holder = self.lock_holder()
                if holder is not None and not _same_job(holder, me) and not is_dead(holder):
                    raise RunLocked(self._who_has_it(holder))
                path.unlink(missing_ok=True)
                with contextlib.suppress(FileExistsError):
                    atomic.create_text(path, json.dumps(me))
                    if (held := flock.hold(path)) is None:  # the lock must not claim it
                        me["flock"] = False
                        atomic.write_text(path, json.dumps(me))
                    self._lock, taken = me, True
        try:
            yield
        finally:
            # A lock that stays counts as stale; an error here must not hide what ended the run.
            with contextlib.suppress(OSError):
                if self.is_mine():
                    path.unlink()
            if held is not None:
                flock.release(held)

    def _who_has_it(self, holder: dict[str, Any]) -> str:
        line = f"{self.run_id} is being run by process {holder['pid']} on {holder['host']}"
        if holder["host"] in ("?", socket.gethostname()):
            return line
        return f"{line}; if that has ended for certain, remove {self.path / 'lock'}"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one process of this host at a time in, if the file system supports locks."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def is_mine(self) -> bool:
        """Whether this process still has the lock: the scheduler may have started the run anew."""
        if self._lock is None or self._lock["pid"] != os.getpid():  # a fork's copy is not its own
            return False
        return _read_json(self.path / "lock") == self._lock

    def lock_holder(self) -> dict[str, Any] | None:
        """The process that works on the run, or None. Dead processes of this host do not count.

        Neither do those of containers on it, or of this machine under an earlier name: they held
        the lock's file open, of which the kernel knows if the disk is mounted once for all of them.
        """
        path = self.path / "lock"
        holder = _read_json(path)
        if not holder or not json_files.has_types(holder, LOCK) or not 0 < holder["pid"] < 2**31:
            # Damaged, or being written, or its writer died while writing (atomic.create_text).
            try:
                young = abs(time.time() - path.stat().st_mtime) < 10
            except FileNotFoundError:
                return None
            return {"host": "?", "pid": 0} if young else None
        birth = holder.get("birth")
        held = flock.is_held(path) if holder.get("flock") and is_of_this_boot(birth) else None
        other = holder["host"] != socket.gethostname()
        if other and (held is None or (not held and self._may_be_held_elsewhere(holder))):
            return holder
        at_work = held or is_alive(holder["pid"], birth=birth, started=holder["started"])
        return holder if at_work else None

    def _may_be_held_elsewhere(self, holder: dict[str, Any]) -> bool:
        """Whether a container with a mount of its own, as of FUSE, may hold the lock: this one does
        not show its flock, so that only silence tells of its death."""
        try:
            device, taken = self.path.stat().st_dev, (self.path / "lock").stat().st_mtime
        except FileNotFoundError:
            return False
        if device == holder.get("device"):  # to one kernel: the very mount
            return False
        # One that has just begun has not written yet. If the clock was set back, times seem to come
        # from the future.
        now, times = time.time(), (taken, self.status().heartbeat)
        return any(abs(now - written) < SILENT_AFTER_S for written in times)

    def torn(self) -> list[Path]:
        """Files that killed processes have left: half-written ones, and a dead process's lock."""
        lock = self.path / "lock"
        dead = [lock] if lock.exists() and self.lock_holder() is None else []
        return [*atomic.torn(self.path), *atomic.torn(self.attempts), *dead]

    # checkpoints --------------------------------------------------------------------------------
    def checkpoint_steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        names = [path.name[5:] for path in self.checkpoints.glob("step-*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def newest_step(self) -> int:
        """Step of the newest complete checkpoint; 0 if there is none."""
        return max(self.checkpoint_steps(), default=0)

    # events -------------------------------------------------------------------------------------
    def raw_events(self) -> Iterator[dict[str, Any]]:
        """Every event of events.jsonl, without damaged lines or a half-written last one."""
        try:
            with open(self.events_path, "rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    with contextlib.suppress(ValueError):
                        yield parse_event(line)
        except FileNotFoundError:
            return

    def events(self) -> list[dict[str, Any]]:
        """The events that count: of steps that several attempts did, those of the newest."""
        events: list[dict[str, Any]] = []
        for event in self.raw_events():
            if event["kind"] == "start":
                resumed = event["data"].get("resumed", False)
                events = [e for e in events if e["step"] <= event["step"]] if resumed else []
            events.append(event)
        return events

    def notes(self) -> list[str]:
        """Its attempts' notes on the data they read, one line each."""
        starts = [event["data"] for event in self.raw_events() if event["kind"] == "start"]
        return list(dict.fromkeys(str(note) for data in starts for note in data.get("notes", [])))

    # result -------------------------------------------------------------------------------------
    def result(self) -> dict[str, Any] | None:
        """{"state", "metrics", "step", ...} once the run has ended.

        A damaged one counts as missing: the run writes it again from its checkpoint and record.
        """
        result = _read_json(self.result_path)
        return result if result and json_files.has_types(result, RESULT, partial=True) else None

    def ended(self) -> State | None:
        """FINISHED or DIVERGED if the run has its result, whatever its status says."""
        recorded = (self.result() or {}).get("state")
        return next((state for state in State if state.done and state == recorded), None)

    def write_result(self, result: dict[str, Any]) -> None:
        atomic.write_json(self.result_path, result)


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is none, or it is damaged."""
    try:
        return json_files.read(path)
    except (FileNotFoundError, json_files.Damaged):
        return None


def _same_job(holder: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether a lock on another host is of this very job, which has since been requeued."""
    other = holder["host"] != me["host"]
    return other and me["job_id"] is not None and holder.get("job_id") == me["job_id"]
