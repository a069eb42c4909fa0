"""`logs`: what a run prints, from its own attempts or from its SLURM job."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from experiments.disk.output_dir import jobs_folder
from relora_core.config import ConfigError
from sweeps.commands import selection
from sweeps.commands.selection import Observer, Run
from sweeps.slurm.submission import read_submissions

HELP = "what a run prints"
EXAMPLES = """examples:
  python -m sweeps logs tiny-relora-r16 -f        follow it to its end (any part of its run_id)
  python -m sweeps logs tiny-relora-r16 --attempt 1
  python -m sweeps logs tiny-relora-r16 --slurm   what its SLURM job printed, set-up lines too
"""
POLL_S = 0.5


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="name, arm or job, or part of a run_id")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    parser.add_argument("--attempt", type=int, metavar="N", help="number of the attempt (newest)")
    parser.add_argument("--slurm", action="store_true", help="the output of its SLURM job")


def run(args: argparse.Namespace) -> int:
    """Print, or with --follow print until the run has ended, over its attempts."""
    if args.slurm and args.attempt is not None:
        raise ConfigError(f"--attempt must be left out with --slurm, got {args.attempt}")
    run = selection.one_run(args.output_dir, args.run)
    log = _Log(run, output_dir=Path(args.output_dir), slurm=args.slurm, attempt=args.attempt)
    path = log.newest()
    if args.follow and (path or log.in_flight()):
        for text in log.follow():
            sys.stdout.write(text)
            sys.stdout.flush()
        return 0
    if path is None:
        raise ConfigError(_no_log(run, slurm=args.slurm))
    sys.stdout.write(path.read_text(encoding="utf-8", errors="replace"))
    return 0


def _no_log(run: Run, *, slurm: bool) -> str:
    state = selection.survey([run])[run.run_id]
    if slurm:
        return f"--slurm must name a run whose SLURM job has begun, {run.run_id} is {state.state}"
    return f"RUN must have been started by a sweep, {run.run_id} ({state.state}) has no log yet" + (
        "; -f waits for it" if state.state.in_flight else ""
    )


class _Log:
    """The files that a run prints to, and whether there will be more."""

    def __init__(self, run: Run, *, output_dir: Path, slurm: bool, attempt: int | None) -> None:
        self.run, self.output_dir, self.slurm, self.attempt = run, output_dir, slurm, attempt
        self._observer = Observer()

    def newest(self) -> Path | None:
        """Of the requested or newest attempt; SLURM's file if there is no attempt yet."""
        logs = self.run.dir.attempts.glob("*.log")
        numbers = sorted(int(path.stem) for path in logs if path.stem.isdigit())
        if (wanted := self.attempt) is not None and wanted not in numbers:
            nearest = min(numbers, key=lambda number: abs(number - wanted), default=None)
            raise ConfigError(
                f"--attempt must be one of {', '.join(map(str, numbers)) or 'none yet'}, got "
                f"{wanted}" + (f"; nearest valid: {nearest}" if numbers else "")
            )
        if numbers and not self.slurm:
            return self.run.dir.log_path(self.attempt or numbers[-1])
        return slurm_log(self.run, output_dir=self.output_dir)

    def in_flight(self) -> bool:
        """Whether the run may still write to its log; SLURM is asked before the answer is no."""
        run_id = self.run.run_id
        if self._observer.look([self.run])[run_id].state.in_flight:
            return True
        return self._observer.look([self.run], ask=True)[run_id].state.in_flight

    def follow(self) -> Iterator[str]:
        """Everything from the newest log on, then from those of further attempts."""
        path, read = self.newest(), 0
        while True:
            in_flight = self.in_flight()  # before the read, so that no line is missed
            newer = self.newest()
            if path is not None:
                text, read = _read_from(path, read)
                yield text
            if newer != path and newer is not None:
                if path is not None:
                    yield f"==> {newer.name} <==\n"
                path, read = newer, 0
            elif not in_flight:
                return
            else:
                time.sleep(POLL_S)


def _read_from(path: Path, offset: int) -> tuple[str, int]:
    with open(path, "rb") as file:
        file.seek(offset)
        text = file.read()
    return text.decode(errors="replace"), offset + len(text)


def slurm_log(run: Run, *, output_dir: Path) -> Path | None:
    """What the run's newest job printed (named by submitit); None before it begins."""
    own, logs = run.dir.status().job_id, []
    for sweep in run.sweeps:
        folder = jobs_folder(output_dir, name=sweep)
        for one in read_submissions(folder):
            jobs = {"train": one.job_ids().get(run.run_id)}
            jobs["search"] = own if own in one.task_ids() else None  # it names no runs
            if job_id := jobs.get(one.kind):
                logs.append((one.created, folder / one.submission / f"{job_id}_0_log.out"))
    return max(((at, path) for at, path in logs if path.exists()), default=(0, None))[1]
