"""Builds and loads `native.cpp` for this machine's processor. Not for: what calls it (`kernels`).

A C++ compiler is all it takes; a build takes some seconds, once per machine, and is kept in the
user's cache. Of the user's flags those are taken that change no values, and each process checks
what it loads (`native_check`). Without a compiler, or a right result, torch does the same, slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relora_core import native_check

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-Wno-psabi")
LAST = ("-fno-fast-math", "-fno-math-errno")
"""Placed after the user's flags: the compiler may be a script that adds flags of its own."""
TAKEN = re.compile(
    r"-(O[0123gsz]?|m(arch|tune|cpu)=[\w.+-]+|[ILB].+|(isystem|idirafter|isysroot).+|"
    r"stdlib=.+|-?gcc-toolchain=.+|-sysroot=.+)"
)
"""Of CXXFLAGS and CXX: how fast, for which processor, and where compiler and libraries are."""
IN_TWO = ("-I", "-L", "-B", "-isystem", "-idirafter", "-isysroot", "--sysroot")
"""Flags that take the next argument as their value."""
WITHOUT_EFFECT = re.compile(
    r"-(w|W(?!p,).*|g.*|pipe|D(NDEBUG|_FORTIFY_SOURCE.*)|[fF](PIC|pic|PIE|pie|plt|no-plt|openmp|"
    r"visibility.*|stack-.*|message-length=.*|(function|data)-sections|(no-)?omit-frame-pointer|"
    r"diagnostics-.*|\w+-prefix-map=.*|cf-protection.*|(no-)?math-errno|exceptions|"
    r"tree-vectorize|asynchronous-unwind-tables))"
)
"""Ignored without a message: they change no computed value."""
COMPILER_READS = ("CCC_OVERRIDE_OPTIONS", "DEPENDENCIES_OUTPUT", "SUNPRO_DEPENDENCIES")
COMPILER_READS += ("GCC_COMPARE_DEBUG",)
"""Variables by which compilers take flags, or write files, past the command line."""
BUILD_S = 300.0

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ADAPT = (*[_INT] * 4, _FLOAT, ctypes.c_uint64, *[_INT] * 3)
_ARGUMENTS = {
    "attention": (*[_POINTER] * 5, *[_INT] * 5),
    "attention_back": (*[_POINTER] * 9, *[_INT] * 5),
    "exponentials_float32": (_POINTER, _INT, _INT, *[_POINTER] * 4, _INT),
    "exponentials_bfloat16": (_POINTER, _INT, _INT, *[_POINTER] * 4, _INT),
    "swiglu_float32": (*[_POINTER] * 3, _INT),
    "swiglu_bfloat16": (*[_POINTER] * 3, _INT),
    "swiglu_back_float32": (*[_POINTER] * 5, _INT),
    "swiglu_back_bfloat16": (*[_POINTER] * 5, _INT),
    **{f"adapt_{kind}": (*[_POINTER] * 5, *_ADAPT) for kind in ("float32", "bfloat16")},
    **{f"adapt_back_{kind}": (*[_POINTER] * 8, *_ADAPT) for kind in ("float32", "bfloat16")},
    "rms_norm": (*[_POINTER] * 4, _INT, _INT, _FLOAT),
    "rms_norm_back": (*[_POINTER] * 6, _INT, _INT),
    "rotate": (*[_POINTER] * 3, *[_INT] * 4, _FLOAT),
}
"""Of every function; the number of threads comes last."""


class NativeError(RuntimeError):
    """The kernels cannot be built here; one line on why."""


_native: bool | None = None


def choose(kernels: str) -> str:
    """Use `native` or `torch` kernels from now on; `auto`: native where they can be built.

    Gives the kernels chosen: `torch` if native ones cannot be built (`problem` says why).
    """
    global _native
    _native = kernels != "torch" and problem() is None
    return "native" if _native else "torch"


def available() -> bool:
    """Whether native kernels are to be used; builds them where there is no build."""
    if _native is None:
        choose("auto")
    return bool(_native)


@contextlib.contextmanager
def restore_choice() -> Iterator[None]:
    """Restore the choice of kernels afterwards."""
    global _native
    before = _native
    try:
        yield
    finally:
        _native = before


@cache
def problem() -> str | None:
    """Why native kernels are unavailable on this machine; None: they are available."""
    try:
        _library()
    except NativeError as error:
        return str(error)
    return None


def call(name: str, *arguments: Tensor | float | None) -> int:
    """Call a function of native.cpp with torch's threads; tensors are contiguous and on the CPU."""
    plain = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    return getattr(_library()[0], name)(*plain, torch.get_num_threads())


def build() -> dict[str, Any]:
    """What the kernels in use were built from, for the record; empty if they are unavailable.

    `key` is of the source, the flags and the processor, and of what the compiler made of them.
    """
    if problem() is not None:
        return {}
    library, path = _library()
    words, flags, _ = _read_flags()
    record = {"key": path.stem.removeprefix("kernels-"), "compiler": library.compiler().decode()}
    record["flags"] = " ".join([*words[1:], *FLAGS, *flags])
    return {**record, "set_aside": " ".join(_list_ignored())}


def describe_ignored() -> str | None:
    """One line on the parts of CXX and CXXFLAGS that the build ignores; None: it uses all."""
    ignored = _list_ignored()
    if not ignored:
        return None
    return f"{' '.join(ignored)} (of CXX, CXXFLAGS) set aside: native kernels keep their values"


def kind(x: Tensor) -> str:
    """How the functions for x's type end: float32, bfloat16."""
    return str(x.dtype).removeprefix("torch.")


@cache
def _library() -> tuple[Any, Path]:
    name = f"kernels-{key()}"
    if folder := _cache():
        path = _find_build(folder, name) or _build(folder, name)
        return _load(path), path
    with tempfile.TemporaryDirectory() as passing:  # once loaded, a library does not need its file
        path = _build(Path(passing), name)
        return _load(path), path


def _load(path: Path) -> ctypes.CDLL:
    """The library, after a check that it computes correctly on this machine."""
    try:
        library = _open(path)
        library.lacks.restype = library.compiler.restype = ctypes.c_char_p
        if lacking := library.lacks():
            raise NativeError(f"{path} needs {lacking.decode()}, which this processor has not")
        for name, types in _ARGUMENTS.items():
            getattr(library, name).argtypes = (*types, ctypes.c_int)
    except (OSError, AttributeError) as error:
        raise NativeError(f"{path} cannot be loaded ({error})") from error

    def call(name: str, *arguments: Any) -> None:  # by one thread: a fork may follow
        plain = [x.ctypes.data if isinstance(x, np.ndarray) else x for x in arguments]
        getattr(library, name)(*plain, 1)

    if wrong := native_check.wrong(call):
        raise NativeError(f"{path} computes wrong numbers ({wrong}); remove it to build it anew")
    return library


def _open(path: Path) -> ctypes.CDLL:
    """Refuse a library that changes how this process computes, as one built with -Ofast does."""
    flushed = _flushes()
    library = ctypes.CDLL(str(path))
    if _flushes() and not flushed:
        torch.set_flush_denormal(False)
        raise NativeError(f"{path} makes the whole process flush subnormal numbers to zero")
    return library


def _flushes() -> bool:
    return float.fromhex("0x1p-1074") * float(1) == 0.0


def _find_build(folder: Path, name: str) -> Path | None:
    """An earlier build, if its content matches its name: loading a torn file kills the process."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        with contextlib.suppress(OSError):
            if path.stem == f"{name}-{_digest(path.read_bytes())}":
                return path
    return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def key() -> str:
    """Of the source, how it is built, and the processor: machines may share a home."""
    words, flags, _ = _read_flags()
    parts = repr((words[1:], FLAGS, flags, LAST, platform.machine(), _processor()))
    return _digest(SOURCE.read_bytes() + parts.encode())


def _read_flags() -> tuple[list[str], list[str], list[str]]:
    """(compiler's words, flags taken, flags set aside) of CXX and CXXFLAGS."""
    words, flags, ignored = [], [], []
    for name in ("CXX", "CXXFLAGS"):
        rest = _split(os.environ.get(name, ""))
        while rest:
            word = rest.pop(0)
            if word in IN_TWO and rest:
                flags += [word, rest.pop(0)]
            elif TAKEN.fullmatch(word):
                flags.append(word)
            elif name == "CXX" and not word.startswith("-"):
                words.append(word)
            elif not WITHOUT_EFFECT.fullmatch(word):
                ignored.append(word)
    return words, flags, ignored


def _list_ignored() -> list[str]:
    """Parts of CXX and CXXFLAGS without effect on the build: flags, a missing compiler."""
    words, _, ignored = _read_flags()
    absent = bool(words) and shutil.which(words[0]) is None
    return [f"{words[0]} [no such compiler]", *ignored] if absent else ignored


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # an unclosed quote
        return text.split()


def _processor() -> str:
    """The processor's abilities, as Linux reports them."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in first.splitlines() if line.startswith(wanted))


def _cache() -> Path | None:
    """A lasting folder for builds; None if there is none that only this user can write to."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(root) / "relora-sweeps"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # the latter: no home folder
        return None
    ours = (
        status.st_uid == os.getuid() and not status.st_mode & 0o022
    )  # its content will be executed
    return folder if ours and os.access(folder, os.W_OK) else None


def _build(folder: Path, name: str) -> Path:
    """Compile into `folder`. The file appears complete: other processes may build it as well."""
    words, flags, _ = _read_flags()
    compiler = shutil.which((words or ["c++"])[0])
    if compiler is None:
        compiler, words = shutil.which("g++"), []
    if compiler is None:
        raise NativeError("there is no C++ compiler (install g++, or set CXX)")
    environment = {k: v for k, v in os.environ.items() if k not in COMPILER_READS}
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as passing:
            out = Path(passing) / name
            command = [compiler, *words[1:], *FLAGS, *flags, *LAST, "-fPIC", "-shared"]
            done = subprocess.run(
                [*command, str(SOURCE), "-o", str(out)],
                capture_output=True,
                text=True,
                timeout=BUILD_S,
                env={**environment, "LC_ALL": "C"},
            )
            if done.returncode:
                output = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                first = next((line for line in output if "error" in line), output[-1])
                raise NativeError(f"{compiler} failed ({first.strip()})")
            path = folder / f"{name}-{_digest(out.read_bytes())}.so"
            if _find_build(folder, name) != path:  # else keep it: others may have loaded it
                os.replace(out, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"{compiler} failed ({error})") from error
    return path
