"""`python -m experiments`: describe, show or export a run; evaluate any model; make a tokenizer;
read published checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import notices, schema
from experiments.addresses import redacted
from experiments.disk import inputs
from experiments.disk.evaluations import final_metrics
from experiments.disk.named import find_run
from experiments.disk.run_dir import RunDir
from experiments.disk.state import state_of
from experiments.environment import EXPERIMENTS, RUN, SWEEPS
from experiments.errors import reporting
from experiments.identity import arm_id, run_id
from experiments.labels import quoted, typed
from experiments.model_card import model_card
from experiments.run.complete import complete
from experiments.run.foreign import Wanted, evaluate
from experiments.tracking.model import find_tracked, log_model
from relora_core import atomic, costs, schedule
from relora_core.config import ConfigError, RunConfig, validate
from relora_core.data import DataError, documents
from relora_core.data.places import expand
from relora_core.data.tokenizer import train_tokenizer

EPILOG = f"""examples:
  {EXPERIMENTS} describe model=small relora.r=32
  {EXPERIMENTS} describe experiment=paper --at-steps 0,1000,2000,2050 --json
  {EXPERIMENTS} show tiny-relora-r16 --json
  {EXPERIMENTS} export tiny-relora-r16 exported/
  {EXPERIMENTS} export tiny-relora-r16 exported/ --mlflow
  {EXPERIMENTS} evaluate gpt2 eval.blimp.path=blimp.zip eval.paloma.path=paloma/
  {EXPERIMENTS} tokenizer texts/ bpe4k/ --vocab 4096
  {EXPERIMENTS} published yuvalw/pico-relora-tiny-v2-sn --restart 4000
"""
EVALUATE = f"""BLiMP both ways (eval.blimp.path), Paloma's perplexity, the paper's and bits per byte
(eval.paloma.path), ranks and condition numbers of the weights. The run is in `{SWEEPS}
status` and MLflow (tracking.experiment=NAME puts it beside a sweep's), and in a sweep's report with
`{SWEEPS} report SWEEP --beside NAME`. What is finished is not repeated.
"""


def describe(
    config: RunConfig, *, at_steps: list[int], given: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """All facts about a run that need no training; `given`: key -> value of what the user set."""
    validate(config)
    notes = notices.of_one(given or {}, config)
    identity: dict[str, str | None] = {"run_id": None, "arm_id": None}
    try:
        config = complete(config, notes=notes)
        identity = {"run_id": run_id(config), "arm_id": arm_id(config)}
    except ConfigError as error:
        vocabulary = config.model.vocab_size or config.data.vocab_size
        if not str(error).startswith("data.") or vocabulary is None:
            raise
        notes.append(f"run_id is unknown, since the data could not be read: {error}")
        model = dataclasses.replace(config.model, vocab_size=vocabulary)
        config = dataclasses.replace(config, model=model)
    flops = costs.flops_per_token(config)
    return {
        **identity,
        "config": dataclasses.asdict(config),
        "parameters": dataclasses.asdict(costs.parameters(config)),
        "tokens": config.train.steps * config.train.batch_size * config.data.seq_len,
        "flops_per_token": flops.train,
        "flops_per_token_forward": flops.forward,
        "flops_per_token_6n": costs.flops_per_token_6n(config),
        "micro_batch_size": costs.micro_batch(config),
        "memory_bytes": costs.memory_bytes(config),
        "lr_factor": {str(k): schedule.lr_factor(k, config=config) for k in at_steps},
        "restarts": schedule.restart_steps(config),
        "notes": notes,
    }


def show(run_dir: RunDir) -> dict[str, Any]:
    """State, attempts and final metrics of a run."""
    state = state_of(run_dir)
    return {
        **dataclasses.asdict(state),
        "metrics": final_metrics(run_dir),
        "notes": run_dir.notes(),
        "attempt_records": run_dir.attempt_records(),
        "changes": inputs.accepted(run_dir),
        "path": str(run_dir.path),
    }


def export(
    run_dir: RunDir,
    *,
    folder: Path,
    step: int | None,
    mlflow: bool = False,
    tokenizer: str | None = None,
    accept_changed: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint of a run, by default the newest, as a merged LlamaForCausalLM folder.

    A model card goes with it. With `mlflow` it is also logged as a model of the run that MLflow
    shows. The tokenizer is the run's own copy; `tokenizer` names another, for a run without a copy.
    """
    from relora_core import checkpoint  # torch
    from relora_core.export import check_target, export_run

    check_target(folder)
    folders = checkpoint.complete(run_dir.checkpoints)
    steps = {int(path.name.removeprefix("step-")): path for path in folders}
    if not steps:
        state = state_of(run_dir).state
        raise ConfigError(f"RUN must have a checkpoint, got {run_dir.run_id} ({state}) without one")
    step = max(steps) if step is None else step
    if step not in steps:
        has = ", ".join(str(k) for k in steps)
        close = min(steps, key=lambda k: abs(k - step))
        raise ConfigError(
            f"--step must be one of {run_dir.run_id}'s checkpoints {has}, got {step}; nearest "
            f"valid: {close}"
        )
    exported: dict[str, Any] = {"run_id": run_dir.run_id, "step": step, "path": str(folder)}
    opened, notes = inputs.open_for_export(run_dir, tokenizer=tokenizer)
    if opened.changes and not accept_changed:
        remedy = "--accept-changed exports with what is there now (--tokenizer PATH with another)"
        raise inputs.refusal(opened.changes, remedy=remedy)
    notes += [f"taken as it is now: {change.what}" for change in opened.changes]
    tracked = find_tracked(run_dir) if mlflow else None  # raises before anything is written
    notes += export_run(opened.config, checkpoint=steps[step], folder=folder)
    card = model_card(run_dir, opened.config, step=step)
    atomic.write_text(expand(folder) / "README.md", card)
    if opened.changes:
        inputs.accept(run_dir, opened.changes, by="export")
    exported["notes"] = notes
    if tracked is not None:
        exported["mlflow_model"] = log_model(tracked, folder=folder, step=step)
        exported["tracking_uri"] = redacted(tracked.store.uri)
    return exported


def _evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate a model from elsewhere; with --json only its facts are printed."""
    extra = [f"output_dir={quoted(arguments.output_dir)}"] if arguments.output_dir else []
    wanted = Wanted(
        source=arguments.model,
        name=arguments.name,
        overrides=arguments.overrides + extra,
        revision=arguments.revision,
        remote_code=arguments.trust_remote_code,
        max_length=arguments.max_length,
        config_dir=arguments.config_dir,
    )
    if not arguments.json:
        return evaluate(wanted)[0]
    with contextlib.redirect_stdout(sys.stderr):
        code, run_dir = evaluate(wanted)
    json.dump(show(run_dir), sys.stdout, indent=2, default=str)
    print(flush=True)
    return code


def import_pico(source: Path, *, folder: Path, tokenizer: str | None) -> dict[str, Any]:
    """Write a pico-decoder or relora-pico checkpoint as a merged LlamaForCausalLM folder."""
    from relora_core.export import import_model  # torch

    notes = import_model(source, folder=folder, tokenizer=tokenizer)
    return {"source": str(source), "path": str(folder), "notes": notes}


def make_tokenizer(
    source: str, *, folder: Path, vocab_size: int, text_field: str
) -> dict[str, Any]:
    """Train a byte-level BPE on what data=text reads and write it as `data.tokenizer` takes it."""
    if (folder / "tokenizer.json").exists() or folder.is_file():
        raise ConfigError(f"DIR must hold no tokenizer yet, got {str(folder)!r}")
    try:
        files, notes = documents.find(source)
        texts = (
            piece
            for _, file in files
            for document in documents.read(file, text_field=text_field)
            for piece in documents.pieces(document)
        )
        if (first := next(texts, None)) is None:
            raise ConfigError(f"data.path holds no text, got {source!r}")
        size = train_tokenizer(
            itertools.chain([first], texts), vocab_size=vocab_size, folder=folder
        )
    except (ConfigError, DataError) as error:
        message = str(error).replace("data.path", "DATA").replace("data.text_field", "--text-field")
        raise ConfigError(message) from None
    few = f"the text holds pairs for {size} of {vocab_size} entries only"
    return {
        "source": source,
        "path": str(folder),
        "vocab_size": size,
        "notes": [*(f"DATA: {note}" for note in notes), *([few] if size < vocab_size else [])],
    }


def published(source: str, *, restart: int, revision: str | None) -> dict[str, Any]:
    """What published checkpoints around a restart show, as docs/published.md describes it."""
    from experiments.published.verdicts import judge  # torch

    return judge(source, restart=restart, revision=revision)


def _print_published(result: dict[str, Any]) -> None:
    from experiments.published.table import lines

    print("\n".join(lines(result)))


def _print_description(description: dict[str, Any]) -> None:
    counted = description["parameters"]
    print(f"run_id      {description['run_id']}")
    print(f"parameters  {counted['total']:,} in all, {counted['trainable']:,} trained")
    for group, number in counted["by_group"].items():
        print(f"            {number:>14,} {group}")
    print(f"tokens      {description['tokens']:,}")
    print(f"FLOPs       {description['flops_per_token']:,} per token of training")
    print(f"            {description['flops_per_token_6n']:,} by 6N + 12 L d T")
    print(f"pass        {description['micro_batch_size']} sequences in each process")
    print(f"memory      {description['memory_bytes']['total'] / 2**20:,.0f} MiB (estimate)")
    restarts = description["restarts"]
    print(f"restarts    {len(restarts)}" + (f" at {restarts[:10]}" if restarts else ""))
    for step, factor in description["lr_factor"].items():
        print(f"lr factor   {step:>8}  {factor:.6f}")
    for note in description["notes"]:
        print(f"note        {note}")


def _print_run(facts: dict[str, Any]) -> None:
    for key in ("run_id", "state", "reason", "attempts", "step", "steps", "path"):
        if facts.get(key) not in (None, ""):
            print(f"{key:<10} {facts[key]}")
    for note in facts["notes"]:
        print(f"note       {note}")
    for change in facts["changes"]:
        print(f"{'changed':<10} {change['what']} (taken by {change['by']} --accept-changed)")
    for name, value in sorted(facts["metrics"].items()):
        print(f"  {name:<58} {value:>12.5g}")


def _print_export(result: dict[str, Any]) -> None:
    source = (
        f"{result['run_id']} at step {result['step']}" if "run_id" in result else result["source"]
    )
    print(f"{source} -> {result['path']}")
    if "mlflow_model" in result:
        print(f"MLflow      {result['mlflow_model']} in {result['tracking_uri']}")
    if "vocab_size" in result:
        print(f"entries     {result['vocab_size']}")
    for note in result["notes"]:
        print(f"note        {note}")


def _steps(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected steps like 0,1,2000, got {text!r}") from None


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=EXPERIMENTS,
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    help_describe = (
        "run_id, parameters, FLOPs, memory, restarts; with --json the resolved config; no training"
    )
    command = commands.add_parser("describe", help=help_describe, description=help_describe)
    command.add_argument(
        "overrides", nargs="*", help=f"as for `{RUN}`, for example model=small relora.r=32"
    )
    help_at_steps = "0-based updates, comma-separated, whose learning-rate factor is shown"
    command.add_argument("--at-steps", type=_steps, default=[], help=help_at_steps)
    command.add_argument(
        "--config-dir", "-cd", metavar="DIR", help=f"options of your own, as for `{RUN}`"
    )
    command = commands.add_parser("show", help="state, attempts and final metrics of a run")
    help_run = f"name, arm or job as `{SWEEPS} status` shows it, or part of a run_id"
    command.add_argument("run", metavar="RUN", help=help_run)
    help_export = "write a run's model, adapters merged, as a LlamaForCausalLM folder"
    command = commands.add_parser("export", help=help_export, description=help_export)
    command.add_argument("run", metavar="RUN", help=help_run)
    command.add_argument("folder", metavar="DIR", type=Path, help="new or empty")
    command.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    help_mlflow = "log it into the run's MLflow run too, for mlflow.pyfunc.load_model"
    command.add_argument("--mlflow", action="store_true", help=help_mlflow)
    help_own = "as data.tokenizer (default: the run's own copy)"
    command.add_argument("--tokenizer", metavar="PATH", help=help_own)
    help_changed = "export with a tokenizer that has changed since, and write that down"
    command.add_argument("--accept-changed", action="store_true", help=help_changed)
    help_evaluate = "evaluate any causal language model of transformers, as a run beside ours"
    command = commands.add_parser(
        "evaluate",
        help=help_evaluate,
        description=help_evaluate,
        epilog=EVALUATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", metavar="MODEL", help="a folder, or a name on the hub")
    help_settings = "of eval, tracking, runtime and dynamics.kinds"
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=help_settings)
    command.add_argument("--as", dest="name", help="its name (default: the last part of MODEL)")
    command.add_argument("--revision", help="branch, tag or commit of the hub")
    help_length = "tokens of Paloma's windows (default: the model's longest input, at most 2048)"
    command.add_argument("--max-length", metavar="N", type=int, help=help_length)
    help_code = "run code that MODEL brings along: only for sources that you trust"
    command.add_argument("--trust-remote-code", action="store_true", help=help_code)
    command.add_argument(
        "--config-dir", "-cd", metavar="DIR", help=f"options of your own, as for `{RUN}`"
    )
    help_import = "write a pico-decoder or relora-pico checkpoint as a LlamaForCausalLM folder"
    command = commands.add_parser("import-pico", help=help_import, description=help_import)
    command.add_argument("source", metavar="SOURCE", type=Path, help="config.json, *.safetensors")
    command.add_argument("folder", metavar="DIR", type=Path, help="new or empty")
    command.add_argument("--tokenizer", help="as data.tokenizer (default: SOURCE's own, if any)")
    help_tokenizer = "train a byte-level BPE on what data=text reads, for data.tokenizer=DIR"
    command = commands.add_parser("tokenizer", help=help_tokenizer, description=help_tokenizer)
    command.add_argument("source", metavar="DATA", help="as data.path of data=text")
    command.add_argument("folder", metavar="DIR", type=Path, help="gets tokenizer.json")
    command.add_argument("--vocab", type=int, default=4096, help="entries (default: %(default)s)")
    command.add_argument("--text-field", default="text", help="as data.text_field (default: text)")
    help_published = "what published checkpoints show of a restart: merge, re-initialisation"
    command = commands.add_parser("published", help=help_published, description=help_published)
    help_repo = "OWNER/NAME on the hub, a git clone, or a folder with a folder a checkpoint"
    command.add_argument("source", metavar="REPO", help=help_repo)
    help_restart = "its step, for example 4000"
    command.add_argument("--restart", metavar="N", type=int, required=True, help=help_restart)
    help_revision = "the run's branch (default: named as REPO, or the only one with checkpoints)"
    command.add_argument("--revision", metavar="BRANCH", help=help_revision)
    where = "where everything is (default: outputs)"
    home = os.path.expanduser  # no shell writes out the tilde of --output-dir=~/x
    parser.add_argument("--output-dir", type=home, help=where)
    for command in commands.choices.values():  # before or after the command
        command.add_argument("--json", action="store_true", help="for scripts")
        command.add_argument("--output-dir", type=home, default=argparse.SUPPRESS, help=where)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command line. The exit code: 0, 2 for the user's mistake, 1 for anything else."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command in ("describe", "evaluate") and not any(
        word.startswith("-") for word in rest
    ):
        arguments.overrides += rest  # argparse takes positionals before the options only
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    with reporting(resumes=arguments.command == "evaluate"):
        if arguments.command == "describe":
            extra = [f"output_dir={quoted(arguments.output_dir)}"] if arguments.output_dir else []
            config = schema.compose(arguments.overrides + extra, config_dir=arguments.config_dir)
            given = typed(arguments.overrides)
            result = describe(config, at_steps=arguments.at_steps, given=given)
            printer = _print_description
        elif arguments.command == "evaluate":
            return _evaluate(arguments)
        elif arguments.command == "export":
            run_dir = find_run(arguments.output_dir or "outputs", word=arguments.run)
            result = export(
                run_dir,
                folder=arguments.folder,
                step=arguments.step,
                mlflow=arguments.mlflow,
                tokenizer=arguments.tokenizer,
                accept_changed=arguments.accept_changed,
            )
            printer = _print_export
        elif arguments.command == "import-pico":
            result = import_pico(
                arguments.source, folder=arguments.folder, tokenizer=arguments.tokenizer
            )
            printer = _print_export
        elif arguments.command == "tokenizer":
            result = make_tokenizer(
                arguments.source,
                folder=arguments.folder,
                vocab_size=arguments.vocab,
                text_field=arguments.text_field,
            )
            printer = _print_export
        elif arguments.command == "published":
            result = published(
                arguments.source, restart=arguments.restart, revision=arguments.revision
            )
            printer = _print_published
        else:
            result = show(find_run(arguments.output_dir or "outputs", word=arguments.run))
            printer = _print_run
        if arguments.json:
            json.dump(result, sys.stdout, indent=2, default=str)
            print(flush=True)
        else:
            printer(result)
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
