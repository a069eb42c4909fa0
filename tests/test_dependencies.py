"""What the project imports is what pyproject.toml declares, and users are given no test tools."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("relora_core", "experiments", "sweeps", "hydra_plugins", "relora_sweeps")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REMOVED = (
    *("asynchat", "asyncore", "distutils", "imp", "smtpd"),  # in Python 3.12
    *("aifc", "audioop", "cgi", "cgitb", "chunk", "crypt", "imghdr", "lib2to3", "mailcap"),
    *("msilib", "nis", "nntplib", "ossaudiodev", "pipes", "sndhdr", "spwd", "sunau", "telnetlib"),
    *("uu", "xdrlib"),  # in 3.13
)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    return {canonical(Requirement(text).name) for text in requirements}


def imported() -> dict[str, set[str]]:
    """Top-level module -> the files of the wheel that import it, at their top or in a function."""
    files = defaultdict(set)
    sources = [file for name in PACKAGES for file in (ROOT / name).rglob("*.py")]
    for file in (*sources, ROOT / "run.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [str(node.module)]
            for module in modules:
                files[module.partition(".")[0]].add(file.relative_to(ROOT).as_posix())
    return {module: where for module, where in files.items() if module not in PACKAGES}


@cache
def distributions() -> dict[str, set[str]]:
    """Imported module of another project -> the distributions that have it."""
    owners = importlib.metadata.packages_distributions()
    others = set(imported()) - set(sys.stdlib_module_names)
    return {module: set(map(canonical, owners[module])) for module in others}


@pytest.mark.slow
def test_what_is_imported_is_declared():
    declared = names(PROJECT["dependencies"])
    undeclared = {m for m, owners in distributions().items() if not owners & declared}
    optional = set().union(*(names(of) for name, of in EXTRAS.items() if name != "dev"))
    assert undeclared == optional == {"transformers"}
    assert imported()["transformers"] == {"relora_core/foreign.py"}


def test_what_is_declared_is_imported():
    owners = set().union(*distributions().values())
    assert names(PROJECT["dependencies"]) - owners == set()


@pytest.mark.parametrize("text", PROJECT["dependencies"])
def test_a_dependency_has_a_lower_and_an_upper_bound(text):
    operators = {one.operator for one in Requirement(text).specifier}
    assert operators == {">=", "<"}, text


def test_no_test_tools_are_installed_along():
    given, new = set(), names(PROJECT["dependencies"])
    while new:
        given |= new
        texts = [text for name in new for text in importlib.metadata.requires(name) or []]
        parsed = [Requirement(text) for text in texts]
        wanted = [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
        new = {canonical(one.name) for one in wanted} - given
    tools = names(EXTRAS["dev"]) - {"setuptools"}  # which torch uses
    assert "networkx" in given  # torch's: the closure is one
    assert given & tools == set()


def test_every_standard_module_is_there_from_python_3_11_to_3_13():
    assert PROJECT["requires-python"] == ">=3.11"
    assert set(imported()) & set(REMOVED) == set()
