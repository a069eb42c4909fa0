"""Where the native kernels come from, and what happens where they cannot be had."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = {"CXXFLAGS": "-O1"}  # to build, that is
BUILT = """
from relora_core import native
print(native.choose("auto"), native.problem())
"""


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
    environment = {"XDG_CACHE_HOME": str(tmp_path), **QUICK}
    assert ask(**environment) == "native None"
    (built,) = (tmp_path / "relora-sweeps").iterdir()  # nothing else is left
    whole = built.read_bytes()
    assert ask(**environment, PATH="", CXX="none") == "native None"  # by nobody else
    built.write_bytes(whole[:1000])
    assert ask(**environment) == "native None"
    assert built.read_bytes() == whole


@pytest.mark.slow
def test_what_others_can_write_to_is_not_run(compiler, tmp_path):
    (tmp_path / "relora-sweeps").mkdir()
    (tmp_path / "relora-sweeps").chmod(0o777)
    assert ask(XDG_CACHE_HOME=str(tmp_path), **QUICK) == "native None"
    assert not list((tmp_path / "relora-sweeps").iterdir())


@pytest.mark.slow
def test_without_a_cache_they_are_built_for_the_process(compiler, tmp_path):
    (tmp_path / "file").touch()
    assert ask(XDG_CACHE_HOME=str(tmp_path / "file"), **QUICK) == "native None"


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


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have other names")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_narrower_vectors_compute_the_same(compiler, tmp_path, processor):
    """Four and eight lanes instead of sixteen, through every test of the kernels."""
    environment = {"XDG_CACHE_HOME": str(tmp_path), "CXXFLAGS": f"-O1 -march={processor}"}
    tests = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("kernels", "loss")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "native", *tests],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " skipped" not in done.stdout
    assert len(list((tmp_path / "relora-sweeps").iterdir())) == 1
