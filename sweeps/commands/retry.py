"""`retry`: launch failed and lost runs again, with their sweep's launcher."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence

from experiments.disk import inputs
from experiments.disk.output_dir import plan_folder
from experiments.disk.run_dir import RunDir
from experiments.disk.state import RunState
from experiments.disk.states import State
from experiments.environment import RUN
from relora_core import shell
from sweeps import launch
from sweeps.commands import selection
from sweeps.commands.selection import Run
from sweeps.planning.plan import load

HELP = "launch failed and lost runs again; they resume from their newest checkpoint"
EXAMPLES = """examples:
  python -m sweeps retry                          every failed or lost run
  python -m sweeps retry model-relora.r --cancelled
  python -m sweeps retry tiny-relora-r16 --diverged    begin it anew, from step 0
"""
NOT_RETRIED = {
    State.FINISHED: "they have their results",
    State.RUNNING: "they are at work",
    State.QUEUED: "they wait for their turn",
    State.PLANNED: "never started: the command that planned them runs them",
    State.CANCELLED: "--cancelled runs them, too",
    State.DIVERGED: "--diverged begins them anew",
    State.PRUNED: "their search has ended them; a grid that has them goes on",
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="SWEEP|RUN",
        help="sweep, run, arm, job, or part of a run_id (default: all)",
    )
    parser.add_argument("--cancelled", action="store_true", help="cancelled runs, too")
    parser.add_argument(
        "--diverged", action="store_true", help="diverged runs, too: anew, the old ones kept aside"
    )
    parser.add_argument(
        "--accept-changed",
        action="store_true",
        help="go on with data or eval texts that have changed since, and record that",
    )


def run(args: argparse.Namespace) -> int:
    """The launcher's exit code; 0 if there is nothing to do."""
    shell.require_one_process("retry")
    where = args.output_dir
    chosen = selection.resolve(where, args.words) if args.words else selection.runs_of(where)
    states = selection.survey(chosen)
    more = {s for s in (State.CANCELLED, State.DIVERGED) if getattr(args, s)}
    wanted = {State.FAILED, State.LOST} | more
    again = [one for one in chosen if _state(one, states) in wanted and one.sweep]
    _print_choice(chosen, again, states)
    if not again:
        print("nothing to retry")
        return 0
    check_inputs([one.dir for one in again], accept=args.accept_changed)
    for one in again:
        if states[one.run_id].state is State.DIVERGED:
            begin_anew(one.dir)
    return _relaunch(again, output_dir=where)


def check_inputs(runs: Sequence[RunDir], *, accept: bool) -> None:
    """ConfigError if a run would go on with other data than it was planned with.

    With `accept` no error: the change is recorded in the run.
    """
    changes: dict[str, list[inputs.Change]] = {}
    keys = {}
    for run_dir in runs:
        config = inputs.with_accepted(run_dir, run_dir.config())
        keys[run_dir.run_id] = key = repr((config.data, config.eval))
        if key not in changes:
            changes[key] = inputs.check(config, output_dir=run_dir.output_dir).changes
    if (changed := [c for of_key in changes.values() for c in of_key]) and not accept:
        distinct = list({(c.key, c.now): c for c in changed}.values())
        raise inputs.refusal(distinct, remedy="--accept-changed goes on with what is there now")
    for run_dir in runs:
        if own := changes[keys[run_dir.run_id]]:
            inputs.accept(run_dir, own, by="retry")
            for change in own:
                print(f"{run_dir.run_id}: taken as it is now: {change.what}")


def _state(run: Run, states: Mapping[str, RunState]) -> State:
    """Of a run; a lost one that the user had cancelled counts as cancelled."""
    state = states[run.run_id].state
    return State.CANCELLED if state is State.LOST and run.dir.cancel_path.exists() else state


def _print_choice(
    chosen: Sequence[Run], again: Sequence[Run], states: Mapping[str, RunState]
) -> None:
    """Print what is launched again, and why the rest is not."""
    for run in again:
        state = states[run.run_id]
        fresh = not state.step or state.state is State.DIVERGED
        what = "from step 0" if fresh else f"had reached step {state.step}"
        why = f" ({state.reason.partition('; `')[0]})" if state.reason else ""  # without the advice
        print(f"retry {run.name}: {state.state}, {what}{why}")
    of_no_sweep = f"of no sweep: `{RUN}` with its settings resumes it"
    rest = Counter(_state(run, states) for run in chosen if run not in again)
    for state, n in rest.items():
        print(f"not {n} {state}: {NOT_RETRIED.get(state, of_no_sweep)}")


def begin_anew(run_dir: RunDir) -> None:
    """Rename a diverged run's result, checkpoints and their evaluations, with the next free number.

    From its checkpoints it would diverge again. Its event log starts over by itself.
    """
    with run_dir.lock():
        result, checkpoints = run_dir.result_path, run_dir.checkpoints
        names = ("result-*.json", "checkpoints-*", "evals-*")
        taken = [path for name in names for path in result.parent.glob(name)]
        numbers = [path.stem.rpartition("-")[2] for path in taken]
        n = 1 + max((int(text) for text in numbers if text.isdecimal()), default=0)
        for folder in (checkpoints, run_dir.evals):
            if folder.exists():
                folder.rename(folder.with_name(f"{folder.name}-{n}"))
        result.rename(result.with_name(f"result-{n}.json"))  # last: until then it is as it was
        measured = ("loss", "tokens_per_s", "mfu", "mfu_6n", "eta_s", "error")
        run_dir.update_status(state=State.PLANNED, step=0, **dict.fromkeys(measured))


def _relaunch(runs: Sequence[Run], *, output_dir: str) -> int:
    sweeps: dict[str, list[str]] = {}
    for run in runs:
        sweeps.setdefault(run.sweep or "", []).append(run.run_id)
    codes = []
    for sweep, run_ids in sweeps.items():
        plan = load(plan_folder(output_dir, name=sweep) / "plan.json")
        codes.append(launch.relaunch(plan, run_ids, output_dir=output_dir))
    return max(codes)
