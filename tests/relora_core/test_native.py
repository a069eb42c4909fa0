"""Where the native kernels come from, and what happens where they cannot be had."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from relora_core import native, native_check
from tests import warm

BUILT = """
from relora_core import native
print(native.choose("auto"), native.problem())
"""


def ask(**environment):
    """What another process says of its kernels."""
    done = warm.run(["-c", BUILT], cwd=Path.cwd(), env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def copier(compiler, tmp_path):
    """A compiler that gives what a real one made before, in no time."""
    (tmp_path / "copy").write_text(
        f"while [ $1 != -o ]; do shift; done; cp '{native._library()[1]}' $2\n"
    )
    return script(tmp_path, f'sh {tmp_path}/copy "$@"')


@pytest.mark.slow
def test_built_once_then_found_and_built_again_if_damaged(copier, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "CXX": copier}
    assert ask(**environment) == "native None"
    (built,) = (tmp_path / "relora-sweeps").iterdir()  # nothing else is left
    content = built.read_bytes()
    assert ask(**environment | {"PATH": "", "CXX": "none"}) == "native None"  # by nobody else
    built.write_bytes(content[:1000])
    assert ask(**environment) == "native None"
    assert built.read_bytes() == content


@pytest.mark.slow
def test_what_others_can_write_to_is_not_run(copier, tmp_path):
    (tmp_path / "relora-sweeps").mkdir()
    (tmp_path / "relora-sweeps").chmod(0o777)
    assert ask(XDG_CACHE_HOME=str(tmp_path), CXX=copier) == "native None"
    assert not list((tmp_path / "relora-sweeps").iterdir())


@pytest.mark.slow
def test_without_a_cache_they_are_built_for_the_process(copier, tmp_path):
    (tmp_path / "file").touch()
    assert ask(XDG_CACHE_HOME=str(tmp_path / "file"), CXX=copier) == "native None"


@pytest.mark.slow
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
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--assert=plain", "-k", "native"]
    done = warm.run([*words, *tests], cwd=Path.cwd(), env=os.environ | environment)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " skipped" not in done.stdout
    assert len(list((tmp_path / "relora-sweeps").iterdir())) == 1


# the user's flags ---------------------------------------------------------------------------------
HARMFUL = ["-Ofast", "-ffast-math", "-funsafe-math-optimizations", "-ffinite-math-only"]
HARMFUL += ["-ffp-contract=off", "-mno-avx", "-fno-openmp", "-mfpmath=387", "-std=c++11"]
HARMFUL += ["-Wp,-DNDEBUG", "-fassociative-math", "-DLANES=3"]


def flags(monkeypatch, **environment):
    for name in ("CXX", "CXXFLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return native._read_flags()


@pytest.mark.parametrize("flag", HARMFUL)
@pytest.mark.parametrize("name", ["CXXFLAGS", "CXX"])
def test_flags_that_change_values_reach_no_build_and_are_named(monkeypatch, name, flag):
    flags(monkeypatch)
    plain = native.key()
    monkeypatch.setenv(name, f"ccache g++ {flag}" if name == "CXX" else f"-Wall {flag} -g")
    assert native._read_flags()[1:] == ([], [flag])
    assert flag in (native.describe_ignored() or "")
    assert name == "CXX" or native.key() == plain


def test_flags_that_change_none_are_taken(monkeypatch):
    taken = "-O2 -march=x86-64-v3 -mtune=haswell -I /a -isystem /b -L/c --sysroot=/d -stdlib=libc++"
    conda = "-fvisibility-inlines-hidden -fstack-protector-strong -fno-plt -pipe -W -Wall -DNDEBUG"
    assert flags(monkeypatch, CXXFLAGS=f"{taken} {conda}") == ([], taken.split(), [])
    assert native.describe_ignored() is None
    assert flags(monkeypatch, CXX="ccache 'g++'") == (["ccache", "g++"], [], [])
    assert flags(monkeypatch, CXX="g++ -O1 'x") == (["g++", "'x"], ["-O1"], [])


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    flags(monkeypatch, CXX="nope-g++ -O2")
    assert (native.describe_ignored() or "").startswith(
        "nope-g++ [no such compiler] (of CXX, CXXFLAGS)"
    )
    flags(monkeypatch, CXX="sh", CXXFLAGS="-O2")
    assert native.describe_ignored() is None


def script(folder, command):
    """A compiler that is a script, as clusters have them."""
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\nexec {command}\n")
    path.chmod(0o755)
    return str(path)


def test_a_script_that_adds_such_flags_is_found_out(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", script(tmp_path, '/usr/bin/env g++ "$@" -ffast-math'))
    with pytest.raises(native.NativeError, match=r"changes values .*reaches the build"):
        native._build(tmp_path, "kernels")


@pytest.mark.slow
def test_a_script_that_puts_them_first_is_overruled(compiler, tmp_path, monkeypatch):
    flags(monkeypatch, CXX=script(tmp_path, '/usr/bin/env g++ -ffast-math "$@"'), CXXFLAGS="-O1")
    monkeypatch.setattr(
        native, "_flushes", lambda: False
    )  # GCC before 13 links that in all the same
    native._load(native._build(tmp_path, "kernels"))
    torch.set_flush_denormal(False)


# what is loaded -----------------------------------------------------------------------------------
def library(folder, text, *arguments):
    """A shared object of C++ `text`."""
    source, out = folder / "source.cpp", folder / "made.so"
    source.write_text(text)
    command = [shutil.which("c++") or "g++", *arguments, "-fPIC", "-shared", "-o", str(out)]
    subprocess.run([*command, str(source)], check=True)
    return out


@pytest.mark.slow
def test_kernels_built_with_fast_math_are_not_used(compiler, tmp_path, monkeypatch):
    """As an older version built and kept them: attention is off by a tenth."""
    text = native.SOURCE.read_text().replace("#error", "#warning")
    made = library(
        tmp_path, text, "-std=c++17", "-O1", "-march=native", "-fopenmp", "-w", "-ffast-math"
    )
    monkeypatch.setattr(native, "_flushes", lambda: False)  # newer compilers link nothing in
    with pytest.raises(native.NativeError, match=r"\(attention is off by 0\.[12]"):
        native._load(made)
    torch.set_flush_denormal(False)


def test_loading_leaves_subnormal_numbers_be(compiler, tmp_path):
    """What -Ofast links in sets them to zero for the whole process."""
    if platform.machine() != "x86_64":
        pytest.skip("other processors have other registers")
    set_both = "__builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);"
    made = library(tmp_path, f"__attribute__((constructor)) void begin() {{ {set_both} }}")
    with pytest.raises(native.NativeError, match="flush subnormal numbers to zero"):
        native._open(made)
    assert 2.0**-1074 * float("1") > 0


def test_code_for_another_processor_is_not_run(compiler, tmp_path):
    text = 'extern "C" { const char* compiler() { return ""; }'
    made = library(tmp_path, text + 'const char* lacks() { return "avx512f"; } }')
    with pytest.raises(native.NativeError, match="needs avx512f, which this processor has not"):
        native._load(made)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "kernels.so").write_text("nothing")
    with pytest.raises(native.NativeError, match="cannot be loaded"):
        native._load(tmp_path / "kernels.so")


@pytest.mark.parametrize("function", sorted(native._ARGUMENTS))
def test_a_function_that_is_a_little_wrong_is_named(compiler, function):
    """A thousandth of float32, five hundredths of bf16, in whatever it writes."""
    loaded = native._library()[0]

    def call(name, *arguments):
        arrays = [x for x in arguments if isinstance(x, np.ndarray)]
        before = [x.copy() for x in arrays]
        plain = [x.ctypes.data if isinstance(x, np.ndarray) else x for x in arguments]
        getattr(loaded, name)(*plain, 1)
        for old, new in zip(before, arrays, strict=True):
            if name == function and old.tobytes() != new.tobytes():
                new += 7 if new.dtype == np.uint16 else (new * 1e-3).astype(new.dtype)

    assert native_check.wrong(call).startswith(function)
    function = "none"
    assert native_check.wrong(call) is None


def test_a_build_that_others_may_have_in_memory_is_left_as_it_is(compiler, tmp_path, monkeypatch):
    """The same build again, by somebody who looked before it was there."""
    flags(monkeypatch, CXX=script(tmp_path, f'{sys.executable} {tmp_path}/c.py "$@"'))
    (tmp_path / "c.py").write_text(
        "import sys, pathlib\n"
        "pathlib.Path(sys.argv[sys.argv.index('-o') + 1]).write_bytes(b'the same')\n"
    )
    first = native._build(tmp_path, "kernels-1")
    node = first.stat().st_ino
    assert native._build(tmp_path, "kernels-1") == first
    assert first.stat().st_ino == node
    first.write_bytes(b"torn")
    assert native._build(tmp_path, "kernels-1").read_bytes() == b"the same"


def test_the_record_says_what_the_kernels_were_built_from(compiler, monkeypatch):
    made = native.build()
    assert made["key"].startswith(f"{native.key()}-")
    assert {"compiler", "flags", "set_aside"} < made.keys()
    assert "-march=native" in made["flags"]
