"""Which code this is: runs of different code of relora_core are different experiments."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def code_hash(root: Path = ROOT) -> str:
    """Digest of relora_core's sources below `root`."""
    digest = hashlib.sha256()
    core = root / "relora_core"
    for file in sorted((*core.rglob("*.py"), *core.rglob("*.cpp"))):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
