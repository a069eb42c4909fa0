"""An output folder of somebody else's, and a folder beside it that no command may touch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.disk.output_dir import plan_folder
from experiments.disk.run_dir import RunDir


@dataclass(kw_only=True, slots=True)
class Place:
    """A sweep `s` of two failed runs with checkpoints, and a folder outside that looks like one."""

    out: Path
    outside: Path
    runs: list[RunDir]

    @property
    def plan(self) -> Path:
        return plan_folder(self.out, name="s") / "plan.json"

    def edit(self, path: Path, change: Callable[[Any], None]) -> None:
        """Change a file of JSON in place."""
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    def rename_first(self, run_id: str) -> None:
        """Have the plan call its first run so."""
        self.edit(self.plan, lambda plan: plan["cells"][0].update(run_id=run_id))

    def print(self) -> dict[str, str]:
        """Everything outside the output folder: name -> mode and content."""
        found = {}
        for path in sorted(self.outside.rglob("*")):
            content = path.read_bytes() if path.is_file() else b""
            digest = hashlib.sha256(content).hexdigest()
            found[str(path)] = f"{path.lstat().st_mode:o} {digest}"
        return found


def checkpoints(folder: Path, *, steps: tuple[int, ...] = (1, 2, 3)) -> None:
    for step in steps:
        target = folder / f"step-{step:08d}"
        target.mkdir(parents=True)
        for name in ("model.safetensors", "progress.json", "optimizer.pt", "rng.pt"):
            (target / name).write_bytes(b"x" * 100)
