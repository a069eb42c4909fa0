"""Files of MLflow's runs: written where MLflow expects them, else into the output folder.

That place is fixed when the experiment is made; a server without `--artifacts-destination` names a
folder of its own machine. Not for: metrics and status (`content.py`), which need no files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from experiments.addresses import LOOPBACK, local_folder, redacted, sqlite_path
from relora_core import shared

if TYPE_CHECKING:
    from experiments.tracking.store import Store

FOLDER = "mlartifacts"
"""In the output folder."""


class Artifacts:
    """Writes files of a store's runs; a failure to write one raises nothing."""

    def __init__(self, store: Store) -> None:
        self.problem: str | None = None
        """A line on why files do not reach MLflow; once it is set, none are sent."""
        self._store, self._client = store, store.client
        self._here = store.output_dir.absolute() / FOLDER
        self._place: str | None = None

    def text(self, run: str, text: str, path: str, *, place: str | None = None) -> bool:
        """Write a run's file; whether MLflow shows it.

        `place` is where MLflow has the run's files; without it the store is asked.
        """
        return self._put(
            run,
            path,
            upload=lambda: self._client.log_text(run, text, path),
            write=lambda file: shared.write_text(file, text),
            place=place,
        )

    def file(self, run: str, file: Path, folder: str) -> bool:
        """Copy a file into a run's `folder`; whether MLflow shows it."""

        def upload() -> None:
            self._client.log_artifact(run, str(file), folder)

        def write(copy: Path) -> None:
            shared.touch(copy)
            shutil.copyfile(file, copy)

        return self._put(run, f"{folder}/{file.name}", upload=upload, write=write)

    def _put(
        self,
        run: str,
        path: str,
        *,
        upload: Callable[[], None],
        write: Callable[[Path], None],
        place: str | None = None,
    ) -> bool:
        if self._reachable():
            try:
                if own := self._own_folder(run, place):
                    write(_with_folder(own / path))
                else:
                    upload()
                return True
            except Exception as error:  # whatever it is: metrics and status do not depend on it
                self._set_problem(error)
        try:
            write(_with_folder(self._here / run / "artifacts" / path))
        except OSError as error:
            nor = f"nor to {self._here} ({error.strerror}), the runs' records have them"
            assert self.problem is not None
            self.problem = self.problem.replace(f"the files are in {self._here}", nor)
        return False

    def _own_folder(self, run: str, place: str | None) -> Path | None:
        """The local folder of the run's files, if we can write it: MLflow ignores the group."""
        if sqlite_path(self._store.uri) is None:
            return None
        return local_folder(place or self._client.get_run(run).info.artifact_uri or "")

    def _reachable(self) -> bool:
        """Whether files may be sent: not to a folder of another machine, made here by mistake."""
        if self.problem is None and self._place is None:
            self._place = self._client.get_experiment(self._store.experiment_id).artifact_location
            folder, server = local_folder(self._place), urlsplit(self._store.uri)
            far = server.scheme in ("http", "https") and server.hostname not in LOOPBACK
            if folder and far and not (folder.exists() or folder.parent.exists()):
                self._set_problem(
                    FileNotFoundError(2, "no such folder on this machine", str(folder))
                )
        return self.problem is None

    def _set_problem(self, error: Exception) -> None:
        line = next(iter(str(error).splitlines()), "") or type(error).__name__
        if isinstance(error, OSError):
            line = shared.explain(error) or line
        web = self._store.uri.startswith(("http://", "https://"))
        way = "start the server with --artifacts-destination; " if web else ""
        self.problem = (
            f"tracking: files (tables, configs) cannot be written to {redacted(self._place or '')} "
            f"({redacted(line)[:200]}); metrics and status are there, the files are in {self._here}"
            f"; {way}`python -m sweeps sync` tries again"
        )


def _with_folder(file: Path) -> Path:
    shared.make_folder(file.parent)
    return file
