"""Builds and loads `native.cpp` for this machine's processor. Not for: what calls it (`kernels`).

A C++ compiler is all it takes; a build takes some seconds, once per machine, and is kept in the
user's cache. Without one torch does the same, slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-Wno-psabi")
BUILD_S = 300.0

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ADAPT = (*[_INT] * 4, _FLOAT, ctypes.c_uint64, _INT)
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
    """The kernels cannot be built here; one line why."""


_native: bool | None = None


def choose(kernels: str) -> str:
    """Use `native` or `torch` kernels from now on; `auto`: native where they can be built.

    Gives what it came to: `torch` where native ones cannot be built, and `problem` says why.
    """
    global _native
    _native = kernels != "torch" and problem() is None
    return "native" if _native else "torch"


def available() -> bool:
    """Whether native kernels are to be used; builds them where nobody has."""
    if _native is None:
        choose("auto")
    return bool(_native)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Whatever is chosen inside, afterwards it is as before."""
    global _native
    before = _native
    try:
        yield
    finally:
        _native = before


@cache
def problem() -> str | None:
    """Why native kernels cannot be had on this machine; None: they can."""
    try:
        _library()
    except NativeError as error:
        return str(error)
    return None


def call(name: str, *arguments: Tensor | float | None) -> int:
    """Call a function of native.cpp with torch's threads; tensors are contiguous and on the CPU."""
    plain = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    return getattr(_library(), name)(*plain, torch.get_num_threads())


def kind(x: Tensor) -> str:
    """How the functions for x's type end: float32, bfloat16."""
    return str(x.dtype).removeprefix("torch.")


@cache
def _library() -> Any:
    name = f"kernels-{_key()}"
    if folder := _cache():
        return _load(_found(folder, name) or _build(folder, name))
    with tempfile.TemporaryDirectory() as passing:  # a loaded library needs its file no more
        return _load(_build(Path(passing), name))


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        for name, types in _ARGUMENTS.items():
            getattr(library, name).argtypes = (*types, ctypes.c_int)
    except (OSError, AttributeError) as error:
        raise NativeError(f"{path} cannot be loaded ({error})") from error
    return library


def _found(folder: Path, name: str) -> Path | None:
    """An earlier build whose content is what its name says: a torn one kills who loads it."""
    for path in folder.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError):
            if path.stem == f"{name}-{_digest(path.read_bytes())}":
                return path
    return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _key() -> str:
    """Of the source, how it is built, and the processor: machines may share a home."""
    told = repr((_flags(), platform.machine(), _processor()))
    return _digest(SOURCE.read_bytes() + told.encode())


def _flags() -> list[str]:
    return [*FLAGS, *os.environ.get("CXXFLAGS", "").split()]


def _processor() -> str:
    """What the processor can do, as Linux says it."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in first.splitlines() if line.startswith(kept))


def _cache() -> Path | None:
    """A folder for builds that is kept; None where there is none that we alone can write to."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(root) / "relora-sweeps"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # the latter: nobody's home
        return None
    ours = found.st_uid == os.getuid() and not found.st_mode & 0o022  # what is there will be run
    return folder if ours and os.access(folder, os.W_OK) else None


def _build(folder: Path, name: str) -> Path:
    """Compile into `folder`; the file is there whole or not at all: others may be at it, too."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        raise NativeError("there is no C++ compiler (install g++, or set CXX)")
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as passing:
            out = Path(passing) / name
            command = [compiler, *_flags(), "-fPIC", "-shared", str(SOURCE), "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S)
            if done.returncode:
                said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                first = next((line for line in said if "error" in line), said[-1])
                raise NativeError(f"{compiler} failed ({first.strip()})")
            path = folder / f"{name}-{_digest(out.read_bytes())}.so"
            os.replace(out, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"{compiler} failed ({error})") from error
    return path
