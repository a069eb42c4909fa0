"""The hash of the code: alike for code that does the same, another for any change of it."""

from pathlib import Path

import pytest

from relora_core.sources import code_hash, comparable

ONE = '''"""Of one file."""
import math
import torch
from relora_core.other import helper

RATE = 0.5
"""What it is."""


def f(x):
    """Half."""
    from relora_core.other import helper
    return RATE * torch.exp(x)  # why
'''
TWO = "def helper(x):\n    return x\n"


def hashed(folder: Path, **files: str) -> str:
    core = folder / "relora_core"
    for old in core.rglob("*.*"):
        old.unlink()
    (core / "inner").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (core / name.replace("__", "/").replace("_cpp", ".cpp")).with_suffix(
            ".cpp" if name.endswith("_cpp") else ".py"
        ).write_text(text)
    return code_hash(folder)


@pytest.mark.parametrize(
    "files",
    [
        {"one": TWO + ONE},
        {"one": "", "inner__two": TWO, "three": ONE},
        {"one": ONE.replace("# why", ""), "two": f'"""New."""\n\n\n{TWO}'},
        {"one": ONE.replace('"""Half."""', '"""A half."""'), "two": TWO},
        {"one": ONE.replace("relora_core.other", "relora_core.moved"), "two": TWO},
        {"one": ONE.replace("import math", "import cmath"), "two": TWO},
    ],
    ids=["joined", "moved", "comments", "docstring", "own imports", "standard library"],
)
def test_moving_and_rewording_change_nothing(tmp_path, files):
    assert hashed(tmp_path, **files) == hashed(tmp_path, one=ONE, two=TWO)


@pytest.mark.parametrize(
    "files",
    [
        {"one": ONE.replace("0.5", "0.25"), "two": TWO},
        {"one": ONE.replace("exp", "sin"), "two": TWO},
        {"one": ONE.replace("import torch", "import numpy as torch"), "two": TWO},
        {"one": ONE.replace("def f", "@torch.no_grad()\ndef f"), "two": TWO},
        {"one": ONE, "two": TWO, "three": TWO},
        {"one": ONE},
        {"one": ONE, "two": TWO, "native_cpp": "int x;"},
        {"one": ONE, "two": TWO, "broken": "def"},
    ],
    ids=["constant", "call", "package", "decorator", "twice", "without", "C++", "no Python"],
)
def test_what_code_does_counts(tmp_path, files):
    assert hashed(tmp_path, **files) != hashed(tmp_path, one=ONE, two=TWO)


def test_what_lies_outside_the_core_is_no_part_of_it(tmp_path):
    before = hashed(tmp_path, one=ONE)
    (tmp_path / "run.py").write_text("x = 1")
    assert code_hash(tmp_path) == before


def test_hashes_of_files_are_of_another_kind(tmp_path):
    new = hashed(tmp_path, one=ONE)
    assert comparable(new, hashed(tmp_path, two=TWO))
    assert comparable("0123456789abcdef", "fedcba9876543210")
    assert not comparable(new, "0123456789abcdef")
