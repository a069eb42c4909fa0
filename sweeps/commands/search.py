"""`python -m sweeps search NAME`: results of a search, as tables and as files in its folder."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from experiments.disk.output_dir import plan_folder
from experiments.environment import RUN
from experiments.run.sinks import clock
from relora_core import atomic, shared
from relora_core.config import ConfigError, nearest
from sweeps import display
from sweeps.planning.provenance import different_code

if TYPE_CHECKING:
    from sweeps.search.response import Arm
    from sweeps.search.results import Best, Results, TrialRow

HELP = "results of a search: trials, the best, importances, plots"
EXAMPLES = """examples:
  python -m sweeps search lr_and_rank                        table, best setting, files and plots
  python -m sweeps search lr_and_rank --trial 7              its runs and its command line
  python -m sweeps search lr_and_rank --json                 everything, for scripts; writes nothing
  python -m sweeps search lr_and_rank --write-experiment lr  the best as conf/experiment/lr.yaml
  python -m sweeps search lr_and_rank --rebuild              a lost journal, from the runs' folders
  python -m sweeps search lr_and_rank --accept-changed       go on with data that have changed
  python -m sweeps search method_lr                          each arm's best, and how it responds
  python -m sweeps search method_lr --arm lora               one arm, as a search of its own
"""
MOST_REASONS = 10
"""Most reasons of failures that are printed; trials.csv has all."""
COLOURS = {"complete": "green", "running": "cyan", "fail": "red", "pruned": "yellow"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of the search (its sweep.name)")
    parser.add_argument("--json", action="store_true", help="everything, for scripts")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="trials in the table")
    parser.add_argument("--arm", metavar="NAME", help="one arm of a search that has several")
    parser.add_argument("--trial", type=int, metavar="N", help="one trial: runs, command line")
    parser.add_argument(
        "--rebuild", action="store_true", help="first make the journal anew from the runs' folders"
    )
    parser.add_argument(
        "--accept-changed",
        action="store_true",
        help="go on with data or eval texts that have changed since, and record that",
    )
    parser.add_argument(
        "--write-experiment",
        metavar="FILE",
        help="write the best trial (or --trial) as an experiment: a name in conf/experiment, or "
        "a new .yaml file",
    )


def run(args: argparse.Namespace) -> int:
    """Show and write; 1 if every trial failed."""
    folder = find_search(args.output_dir, name=args.name)
    from sweeps.search import arms, results  # Optuna, SciPy: the other commands need neither
    from sweeps.search.study import Study, rebuild

    folders = arms.arm_folders(folder)
    if args.arm is not None:
        folder = find_arm(args.arm, folders, name=args.name)
        folders = {args.arm: folder}
    if args.accept_changed:
        return accept(list(folders.values()))
    if args.rebuild:
        for one in folders.values():
            rebuild(one)
    if None not in folders and args.arm is None:
        return show_arms(args, folder)
    study = Study.open(folder)
    summary = results.read(study)
    if args.trial is not None:
        check_trial(args.trial, summary)
    if args.write_experiment:
        write_experiment(
            args.write_experiment, summary, trial=args.trial, output_dir=args.output_dir
        )
    elif args.json:
        _print_json(dataclasses.asdict(summary))
    elif args.trial is not None:
        _print(trial_lines(summary, number=args.trial, output_dir=args.output_dir))
    else:
        show(summary, top=args.top)
        if summary.trials and (line := shared.find_obstacle(folder)):
            print(f"best, trials.csv and plots were not written: {line}")
        elif summary.trials:
            written, left_out = results.write(summary, study=study.optuna, folder=folder)
            _print([*left_out, f"{len(written)} files: best, trials.csv and plots in {folder}"])
    if summary.all_failed:
        print(f"error: all {len(summary.counted)} trials of {summary.name} failed", file=sys.stderr)
    return 1 if summary.all_failed else 0


def find_search(output_dir: Path | str, *, name: str) -> Path:
    """The folder of the study, or of the arms' studies; ConfigError if there is no such search."""
    files = [plan_folder(output_dir, name="").glob(f"*/study/{n}.json") for n in ("study", "arms")]
    folders = sorted(path.parent for paths in files for path in paths)
    names = [path.parent.name for path in folders]
    if name not in names:
        some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ConfigError(
            f"NAME must be one of the searches in {output_dir} ({some or 'none yet'}), got "
            f"{name!r}.{nearest(name, names)}"
        )
    return folders[names.index(name)]


def find_arm(arm: str, folders: Mapping[str | None, Path], *, name: str) -> Path:
    """The folder of an arm's study; ConfigError if the search has no such arm."""
    if arm not in folders:
        names = [str(one) for one in folders if one is not None]
        valid = f"one of the arms of {name} ({', '.join(names)})" if names else "left out"
        raise ConfigError(f"--arm must be {valid}, got {arm!r}.{nearest(arm, names)}")
    return folders[arm]


def accept(folders: Sequence[Path]) -> int:
    """Accept what the trials read as it is now, and print what has changed."""
    from sweeps.search import reads

    changes = {change.what: change for folder in folders for change in reads.accept(folder)}
    _print([f"taken as it is now: {what}" for what in changes] or ["nothing has changed"])
    if changes:
        _print(["the search's own command goes on with it"])
    return 0


def check_trial(number: int, summary: Results) -> None:
    """ConfigError unless there is a trial of this number."""
    numbers = [row.number for row in summary.trials]
    if number not in numbers:
        some = f"0 to {max(numbers)}" if numbers else "that of a trial, and there is none yet"
        raise ConfigError(f"--trial must be {some}, got {number}")


def write_experiment(
    word: str, summary: Results, *, trial: int | None, output_dir: Path | str
) -> None:
    """Write the best or the given trial as an experiment file; ConfigError if there is not one."""
    from sweeps.search import recipe, results

    numbers = [best.number for best in summary.best] if trial is None else [trial]
    if len(numbers) != 1:
        which = ", ".join(map(str, numbers)) or "none is finished and feasible"
        raise ConfigError(f"--write-experiment needs --trial N, one of the best: {which}")
    path = recipe.experiment_path(word)
    text = results.experiment_text(
        summary, number=numbers[0], name=path.stem, output_dir=output_dir
    )
    if text is None:
        raise ConfigError(f"--write-experiment needs the run directories of trial {numbers[0]}")
    shared.make_folder(path.parent)
    atomic.write_text(path, text)
    print(f"trial {numbers[0]} is {path}: {RUN} experiment={path.stem}")


# arms -------------------------------------------------------------------------------------------
def show_arms(args: argparse.Namespace, folder: Path) -> int:
    """Show and write each arm's best and how it responds; 1 if all trials of all arms failed."""
    from sweeps.search import response, response_files

    for option in ("trial", "write_experiment"):
        if getattr(args, option) is not None:
            flag = f"--{option.replace('_', '-')}"
            raise ConfigError(f"{flag} needs --arm NAME in a search with arms")
    arms = response.read(folder)
    failed = all(arm.results.all_failed for arm in arms)
    if args.json:
        raw = {arm.name: dataclasses.asdict(arm.results) | {"edges": arm.edges} for arm in arms}
        _print_json({"name": args.name, "arms": raw})
        return int(failed)
    _print(arm_lines(arms, name=args.name))
    display.make_console().print(arm_table(arms))
    _print(edge_lines(arms))
    notes = dict.fromkeys(note for arm in arms for note in arm.results.notes)
    codes = [code for arm in arms for code in arm.results.codes]
    notes |= dict.fromkeys(different_code(codes, what="trials"))
    _print([f"note: {note}" for note in notes])
    if line := shared.find_obstacle(folder):
        print(f"bests, tables and the figure were not written: {line}")
    else:
        written, left_out = response_files.write(arms, folder)
        what = "arms.csv, response.csv and plots/response.png"
        _print([*left_out, f"{len(written)} files: {what} in {folder}"])
    if failed:
        print(f"error: all trials of {args.name} failed", file=sys.stderr)
    return int(failed)


def arm_lines(arms: Sequence[Arm], *, name: str) -> Iterator[str]:
    """How far the search is, and whether arms have different numbers of trials."""
    done, n_trials = sum(arm.done for arm in arms), sum(arm.n_trials for arm in arms)
    yield f"{name}: {done} of {n_trials} trials of {len(arms)} arms have ended"
    if len({arm.done for arm in arms}) > 1:
        yield f"arms are not tuned alike yet: {', '.join(f'{a.name} {a.done}' for a in arms)}"


def arm_table(arms: Sequence[Arm]) -> Table:
    """A row for each arm, best first: its best trial's value, with interval, and settings."""
    goal = arms[0].results.goals[0]
    sign = 1.0 if goal.direction == "minimize" else -1.0
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("arm", overflow="fold")
    for head in ("trials", f"best {goal.metric}", "95 % interval"):
        table.add_column(head, justify="right", overflow="fold")
    table.add_column("settings", overflow="fold")
    table.add_column("edge")

    def rank(arm: Arm) -> float:
        return math.inf if arm.best is None else sign * arm.best.values[goal.metric]

    for arm in sorted(arms, key=rank):
        best = arm.best
        ends = best.intervals.get(goal.metric) if best else None
        settings = best.params.items() if best else ()
        table.add_row(
            Text(arm.name),
            f"{arm.done}/{arm.n_trials}",
            _cell(best.values[goal.metric] if best else None),
            "-" if ends is None else f"{ends[0]:.5g} to {ends[1]:.5g}",
            Text("  ".join(f"{key}={_short(value)}" for key, value in settings)),
            Text("edge", style="bold red") if arm.edges else "",
        )
    return table


def edge_lines(arms: Sequence[Arm]) -> Iterator[str]:
    """Where a better value may lie beyond what was tried, and what to do then."""
    edges = [f"{arm.name}: the best {edge}" for arm in arms for edge in arm.edges]
    yield from edges
    if edges:
        yield (
            "a best at an edge may not be the best: widen the interval for all arms, raise "
            "search.n_trials, and the same command goes on"
        )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# one study --------------------------------------------------------------------------------------
def show(summary: Results, *, top: int) -> None:
    """Counts, the best, the table, importances, failures: most important first."""
    console = display.make_console()
    counts = ", ".join(f"{n} {state}" for state, n in summary.counts.items())
    asked = f"{len(summary.counted)} of {summary.n_trials} trials" + (
        f": {counts}" if counts else ""
    )
    asked += f"; {len(summary.learnt)} learnt from {_sources(summary)}" if summary.learnt else ""
    _print([f"{summary.name}: {asked}", *_headline(summary)])
    if summary.counted or summary.learnt:
        console.print(trial_table(summary, top=top))
    _print([*_tail(summary), *failure_lines(summary), *(f"note: {note}" for note in summary.notes)])


def _sources(summary: Results) -> str:
    return ", ".join(dict.fromkeys(str(row.learnt_from) for row in summary.learnt))


def _headline(summary: Results) -> Iterator[str]:
    if summary.best and len(summary.goals) > 1:
        yield f"Pareto front: {len(summary.best)} trials that none beats in every objective"
    elif summary.best:
        yield from best_lines(summary.best[0])
    elif summary.counts.get("complete"):
        yield "no best trial: none is within the constraints and ended with a number"
    elif not summary.all_failed:
        yield "no trial is finished yet"


def best_lines(best: Best) -> Iterator[str]:
    """The best trial's values, and how to run it again."""
    seeds = f"{len(best.seeds)} seed" + ("s" if len(best.seeds) != 1 else "")
    for metric, value in best.values.items():
        text = f"best: trial {best.number}, {metric} {value:.6g} ({seeds}"
        if metric in best.intervals:
            low, high = best.intervals[metric]
            text += f", 95 % interval {low:.6g} to {high:.6g}"
        yield text + (f", learnt from {best.learnt_from})" if best.learnt_from else ")")
    if best.command:
        yield f"  {best.command}"


def trial_table(summary: Results, *, top: int) -> Table:
    """The `top` best trials, those of the Pareto front first; `*` marks the best."""
    rows = _ranked(summary)
    keys = list(dict.fromkeys(key for row in summary.trials for key in row.params))
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("trial", justify="right")
    table.add_column("state")
    for head in (*(goal.metric for goal in summary.goals), *_heads(keys), "steps", "seeds", "time"):
        table.add_column(head, justify="right", overflow="fold")
    marked = {best.number for best in summary.best}
    for row in rows[: max(top, 0)]:
        table.add_row(
            f"{'* ' if row.number in marked else ''}{row.number}",
            Text(_state(row), style=COLOURS.get(row.state, "")),
            *(_cell(value) for value in row.values or [None] * len(summary.goals)),
            *(_cell(row.params.get(key)) for key in keys),
            "-" if row.state == "learnt" else f"{row.step}/{row.steps}",
            str(len(row.runs)),
            clock(row.seconds),
        )
    if len(rows) > top:
        table.caption, table.caption_justify = f"... and {len(rows) - top} more trials", "left"
    return table


def _heads(keys: list[str]) -> list[str]:
    """Column heads: the last part of a key if that is unique."""
    short = [key.rpartition(".")[2] for key in keys]
    return [s if short.count(s) == 1 else key for s, key in zip(short, keys, strict=True)]


def _ranked(summary: Results) -> list[TrialRow]:
    """The best, other good trials by the first objective, then the rest by their states."""
    front = {best.number: place for place, best in enumerate(summary.best)}
    sign = 1.0 if summary.goals[0].direction == "minimize" else -1.0
    order = ("complete", "learnt", "running", "pruned", "refused", "fail")

    def rank(row: TrialRow) -> tuple[Any, ...]:
        value = sign * row.values[0] if row.values and row.good else math.inf
        first = front.get(row.number, len(front))
        return first, not row.good, value, order.index(row.state), row.number

    return sorted(summary.counted + summary.learnt, key=rank)


def _state(row: TrialRow) -> str:
    return "infeasible" if row.state in ("complete", "learnt") and not row.feasible else row.state


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _tail(summary: Results) -> Iterator[str]:
    for metric, shares in summary.importances.items():
        listed = ", ".join(f"{key} {share:.0%}" for key, share in shares.items())
        yield f"importances for {metric} (PED-ANOVA: what sets the best tenth apart): {listed}"
    if summary.saved_steps:
        full = summary.pruned_steps + summary.saved_steps
        share = summary.saved_steps / all_steps(summary)
        yield (
            f"pruning: {summary.counts['pruned']} trials took {summary.pruned_steps} of {full} "
            f"steps; {summary.saved_steps} saved ({share:.0%} of the search)"
        )


def all_steps(summary: Results) -> int:
    """Steps of all trials, had none been pruned."""
    return sum(row.steps if row.state == "pruned" else row.step for row in summary.counted)


def failure_lines(summary: Results) -> Iterator[str]:
    """Why trials failed or were refused; a line for each reason."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for row in summary.trials:
        if row.state in ("fail", "refused"):
            end = "failed" if row.state == "fail" else "refused"
            reasons.setdefault((end, row.reason or "no reason given"), []).append(row.number)
    for (end, reason), numbers in list(reasons.items())[:MOST_REASONS]:
        some = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        yield f"{end}: trial {some}: {reason}"
    if len(reasons) > MOST_REASONS:
        yield f"... and {len(reasons) - MOST_REASONS} more reasons (trials.csv)"


def trial_lines(summary: Results, *, number: int, output_dir: Path | str) -> Iterator[str]:
    """One trial: its values, parameters, runs and command line."""
    from sweeps.search import recipe, results

    row = summary.trial(number)
    why = f"from {row.learnt_from}" if row.learnt_from else row.reason
    yield f"trial {number} of {summary.name}: {_state(row)}" + (f" ({why})" if why else "")
    for goal, value in zip(summary.goals, row.values or [], strict=False):
        yield f"  {goal.metric} {value:.6g}"
    for key, value in row.params.items():
        yield f"  {key} {_cell(value)}"
    for run in row.runs:
        values = " ".join(_cell(value) for value in run.values)
        yield f"  run {run.run_id}: {run.state}, step {run.step}/{run.steps} {values}".rstrip()
    config = results.config_of(row, output_dir=output_dir)
    if config:
        yield f"  {recipe.command(config)}"


def _print_json(value: Any) -> None:
    json.dump(_finite(value), sys.stdout, indent=2)
    print()


def _finite(value: Any) -> Any:
    """With null for infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(lines: Iterator[str] | Sequence[str]) -> None:
    for line in lines:
        print(line)
