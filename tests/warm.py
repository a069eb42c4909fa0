"""Python commands that begin with their imports done: forked from one process that did them once.

For what a command answers. Not for what it loads, nor for Ctrl-C or a kill, which are a real one's.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from sweeps import worker
from tests import forks
from tests.forks import Started

PRELOAD = ["tests.forks", *worker.PRELOAD, "experiments.run.runner"]
PRELOAD += ["hydra_plugins.relora_sweeps.plugins", "sweeps.launch", "sweeps.search.launch"]
PRELOAD += ["sweeps.search.process", "sweeps.search.plots", "tests.warmed"]


def start(
    words: Sequence[str | Path],
    *,
    cwd: str | Path,
    env: Mapping[str, str] | None = None,
    figures: bool = True,
) -> Started:
    """`python WORDS`: a file, `-m MODULE` or `-c CODE`, and arguments.

    Without `figures` a report or a search has none: a sweep's take seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    texts, output = [str(word) for word in words], Path(tempfile.mkdtemp())
    variables = dict(os.environ if env is None else env)
    todo = (texts, str(cwd), variables, output, figures)
    process = context.Process(target=forks.become, args=todo)
    process.start()
    return Started(words=texts, process=process, output=output)


def run(
    words: Sequence[str | Path],
    *,
    cwd: str | Path,
    env: Mapping[str, str] | None = None,
    figures: bool = True,
) -> subprocess.CompletedProcess[str]:
    return start(words, cwd=cwd, env=env, figures=figures).wait()


def places(world: int) -> list[dict[str, str]]:
    """The environment of each rank of `world` processes on this host, as torchrun names it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [os.environ | shared | names for names in own]


def ranks(
    world: int, words: Sequence[str | Path], *, cwd: str | Path, more: Sequence[str] = ()
) -> list[subprocess.CompletedProcess[str]]:
    """The same command once for each rank of `world` processes; rank 1 gets `more` words."""
    started = [
        start([*words, *(more if rank == 1 else ())], cwd=cwd, env=env)
        for rank, env in enumerate(places(world))
    ]
    try:
        return [rank.wait() for rank in started]
    finally:
        for rank in started:
            rank.process.kill()
