"""Which code this is: runs of different code of relora_core are different experiments."""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KIND = "d1:"
"""Begins a hash of definitions. Runs recorded before have one of the files' bytes, without it."""


def code_hash(root: Path = ROOT) -> str:
    """Digest of what relora_core below `root` defines, wherever in it that stands.

    Of each Python file the statements of its outermost level, and what it imports from other
    packages, count: in any order, without comments, docstrings and imports of relora_core itself.
    So a function may move and a docstring be reworded. One change passes unseen: a name that is
    imported from another module of relora_core, which defines it too, or of the standard library.
    """
    core = root / "relora_core"
    parts = [part for file in core.rglob("*.py") for part in _definitions(file.read_bytes())]
    parts += [_digest(file.read_bytes()) for file in core.rglob("*.cpp")]
    defined = [part for part in parts if not part.startswith("import ")]
    imported = {part for part in parts if part.startswith("import ")}
    return KIND + _digest("\n".join(sorted([*defined, *imported])).encode())[:16]


def comparable(one: str, other: str) -> bool:
    """Whether both are of one kind; of two kinds they differ even where the code is the same."""
    return one.startswith(KIND) == other.startswith(KIND)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@functools.lru_cache(maxsize=1024)
def _definitions(source: bytes) -> tuple[str, ...]:
    """A digest of each definition, and a line for each name imported from another package."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # no code that runs, but the copy of a sweep may have it
        return (_digest(source),)
    defined = [_digest(repr(_plain(n)).encode()) for n in tree.body if not _says_nothing(n)]
    return (*defined, *_imports(tree))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                name = alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
                top = name.partition(".")[0]
                if top != "relora_core" and top not in sys.stdlib_module_names:
                    yield f"import {name} as {alias.asname}"


def _says_nothing(node: object) -> bool:
    """Imports and bare strings; blocks of them alone."""
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant(value=str())):
            return True
        case ast.If(body=body, orelse=[]):
            return all(_says_nothing(inner) for inner in body)
    return False


def _plain(node: Any) -> Any:
    """A syntax tree as tuples, the same for every version of Python: no places, no empty fields."""
    if isinstance(node, list):
        return tuple(_plain(inner) for inner in node if not _says_nothing(inner))
    if not isinstance(node, ast.AST):
        return node
    values = ((name, getattr(node, name, None)) for name in node._fields)
    return (
        type(node).__name__,
        *((name, _plain(value)) for name, value in values if value not in (None, [])),
    )
