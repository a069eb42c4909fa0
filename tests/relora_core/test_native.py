"""Where the native kernels come from, and what happens where they cannot be had."""

import os
import subprocess
import sys

import pytest

from relora_core import native

BUILT = """
from relora_core import native
print(native.choose("auto"), native.problem())
"""


@pytest.fixture
def compiler():
    if native.choose("native") != "native":
        pytest.skip(f"no native kernels here: {native.problem()}")


def ask(**environment):
    """What a fresh process says of its kernels."""
    done = subprocess.run(
        [sys.executable, "-c", BUILT],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.slow
def test_built_once_then_found_and_built_again_if_damaged(compiler, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    assert ask(**environment) == "native None"
    (built,) = (tmp_path / "relora-sweeps").iterdir()  # nothing else is left
    whole = built.read_bytes()
    assert ask(**environment, PATH="", CXX="none") == "native None"  # by nobody else
    built.write_bytes(whole[:1000])
    assert ask(**environment) == "native None"
    assert built.read_bytes() == whole


@pytest.mark.slow
def test_without_a_cache_they_are_built_for_the_process(compiler, tmp_path):
    (tmp_path / "file").touch()
    assert ask(XDG_CACHE_HOME=str(tmp_path / "file")) == "native None"


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"PATH": "", "CXX": "none"}, "there is no C++ compiler (install g++, or set CXX)"),
        ({"CXX": "false"}, "failed ("),
    ],
)
def test_without_a_compiler_torch_takes_over_and_says_why(tmp_path, environment, why):
    answer = ask(**environment, XDG_CACHE_HOME=str(tmp_path))
    assert answer.startswith("torch ")
    assert why in answer
    assert not list((tmp_path / "relora-sweeps").iterdir())
