"""`ui`: MLflow's pages on this machine, and links to the pages of each sweep."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from experiments.addresses import check_given, default_uri, read_only, redacted, sqlite_path
from experiments.tracking import links
from experiments.tracking.links import Section
from experiments.tracking.server import Server, ServerFailed, free_port
from experiments.tracking.store import TrackingUnreachable, move_artifacts, readable
from relora_core import shared
from relora_core.config import ConfigError
from sweeps import display
from sweeps.commands import selection

HELP = "MLflow's pages, and links that open right"
EXAMPLES = """examples:
  python -m sweeps ui                    every sweep; Ctrl-C ends the server
  python -m sweeps ui SWEEP --port 5001  one sweep, on another port
  python -m sweeps ui --uri http://...   a server that is there: its links, nothing is started
  python -m sweeps ui --links            the links alone, for a server that runs already
"""
PORT = 5000
SHOWN = 8
"""How many sweeps' links are printed if none is named."""


def configure(parser: argparse.ArgumentParser) -> None:
    selection.add_sweep(parser)
    parser.add_argument("--port", type=int, metavar="P", help=f"default: {PORT}, or the next free")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--uri", help="another store than the runs' own")
    parser.add_argument("--links", action="store_true", help="print links, start nothing")


def run(args: argparse.Namespace) -> int:
    """0 on Ctrl-C; 1 if the store does not answer or the server ends by itself."""
    if args.port is not None and not 1 <= args.port <= 65535:
        raise ConfigError(f"--port must be in 1..65535, got {args.port}; nearest valid: {PORT}")
    uri = _store(args)
    try:
        if uri.startswith(("http://", "https://")):
            show(links.sections(uri, base=links.without_user(uri)), args=args)
            return 0
        with readable(uri, output_dir=args.output_dir) as shown:
            if args.links:
                base = f"http://{args.host}:{args.port or PORT}"
                show(links.sections(shown, base=base), args=args)
                return 0
            return _serve(shown, args=args)
    except (TrackingUnreachable, ServerFailed) as error:
        print(error, file=sys.stderr)
        return 1


def _store(args: argparse.Namespace) -> str:
    """Address of the store to show: the one asked for, the sweep's own, or that of output_dir."""
    default = default_uri(args.output_dir)
    args.sweep = args.sweep and selection.find_sweep(args.output_dir, args.sweep)
    runs = selection.runs_of(args.output_dir, sweep=args.sweep)
    first = {run.sweep: run.dir for run in reversed(runs) if run.dir.config_path.exists()}
    own = {sweep: run_dir.config().tracking.uri or default for sweep, run_dir in first.items()}
    stores = list(dict.fromkeys(own.values()))
    if args.uri is not None:
        uri = check_given(args.uri)
    else:
        uri = default if default in stores or not stores else stores[0]
        for other in stores:
            if other != uri:
                print(f"another store: python -m sweeps ui --uri {redacted(other)}")
    database = sqlite_path(uri)
    if uri == default and database is not None and not read_only(database):
        move_artifacts(args.output_dir)
    if database is not None and not database.exists():
        raise ConfigError(
            f"nothing to show, {database} does not exist; `python -m sweeps sync` makes it "
            "from the runs' records"
        )
    return uri


def _log(output_dir: Path | str) -> Path:
    """Where the server prints to; a temporary file if the output folder is not writable."""
    log = Path(output_dir).absolute() / "logs" / "mlflow-ui.log"
    if shared.find_obstacle(log) or shared.find_obstacle(log.parent):
        number, name = tempfile.mkstemp(prefix="mlflow-ui-", suffix=".log")
        os.close(number)
        return Path(name)
    return log


def _serve(uri: str, *, args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or the end of the terminal."""
    port = _port(args)
    console, log = display.make_console(), _log(args.output_dir)
    asked: list[int] = []
    _at_end(lambda number, _: asked.append(number))  # until the server has started
    print(f"starting MLflow's server over {redacted(uri)}, some 5 to 20 s", flush=True)
    with Server(uri, host=args.host, port=port, log=log) as server:
        try:
            _at_end(_interrupt)
            if asked:
                raise KeyboardInterrupt
            with console.status("waiting for it"):
                sections = links.sections(uri, base=server.base)
                server.wait_ready()
            show(sections, args=args)
            _print_hints(server.base, host=args.host, port=port)
            server.wait()
        except KeyboardInterrupt:
            _at_end(signal.SIG_IGN)  # a second one must not keep us from ending the server
    print("MLflow's server has ended")
    return 0


def _at_end(handler: Callable[[int, Any], Any] | signal.Handlers) -> None:
    """Handle Ctrl-C, `kill` and the end of the terminal."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _port(args: argparse.Namespace) -> int:
    wanted = args.port or PORT
    port = free_port(args.host, wanted=wanted)
    if port != wanted:
        print(f"port {wanted} is taken; this is {port}")
    return port


def _print_hints(base: str, *, host: str, port: int) -> None:
    if os.environ.get("SSH_CONNECTION") and host == "127.0.0.1":
        there = f"{os.environ.get('USER', 'you')}@{socket.gethostname()}"
        print(f"from your own machine first: ssh -N -L {port}:127.0.0.1:{port} {there}")
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(f"anyone who reaches {host} can read and change this store: there is no password")
    print("MLflow opens its Assistant beside the first page; closed once, it stays closed")
    print(f"{base} is up; Ctrl-C ends it", flush=True)


def show(sections: Sequence[Section], *, args: argparse.Namespace) -> None:
    """Print the links of the chosen sections."""
    chosen = [section for section in sections if args.sweep in (None, section.name)]
    if not chosen:
        what = args.sweep or "anything"
        print(f"the store does not have {what} yet: `python -m sweeps sync` brings it")
    for section in chosen[:SHOWN]:
        print(f"\n{'sweep' if section.sweep else 'experiment'} {section.name}")
        for page in section.pages:
            print(f"  {page.title:<24} {page.url}")
    if len(chosen) > SHOWN:
        print(f"\nand {len(chosen) - SHOWN} more: python -m sweeps ui SWEEP")
    print()
