"""Compile the C files of this folder once per machine and load them.

The library lies in the user's cache folder under a name made from the sources, the compiler and
the processor, and is put there by a rename, so that processes may race. Where there is no
compiler, or it fails, `library()` is None and the torch variants run; `why_not()` says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

HERE = Path(__file__).parent
SOURCES = tuple(sorted(HERE.glob("*.c")))
FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
    "-fno-strict-aliasing",
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)
_reasons: list[str] = []
Value = Tensor | ctypes.Structure | ctypes.Array[Any] | int | float | None


def available() -> bool:
    """Whether the kernels can be used (compiles them when asked first)."""
    return library() is not None


def why_not() -> str:
    """Why `library()` is None; empty when it is there."""
    return "; ".join(_reasons) if library() is None else ""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    compiler = shutil.which(os.environ.get("CC", "")) or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        _reasons.append("there is no C compiler (gcc, cc or $CC)")
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        said = next((line for line in lines if "error" in line), lines[0])
        _reasons.append(f"{compiler}: {said}")
    except OSError as error:
        _reasons.append(str(error))
    return None


def call(name: str, *args: Value) -> None:
    """Call a kernel: tensors, structures and arrays of them by address, None as the null address,
    integers as int64, floats as float."""
    kernels = library()
    assert kernels is not None
    getattr(kernels, name)(*map(_as_c, args))


def _as_c(value: Value) -> Any:
    if value is None:
        return ctypes.c_void_p()
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, (ctypes.Structure, ctypes.Array)):
        return ctypes.byref(value)
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_float(value)


def _built(compiler: str) -> Path:
    """The path of the library for these sources, this compiler and this processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    mark = hashlib.sha256(f"{FLAGS} {version.stdout} {_processor()}".encode())
    for source in (*SOURCES, *sorted(HERE.glob("*.h"))):
        mark.update(source.read_bytes())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "topwork" / "native"
    wanted = home / f"{mark.hexdigest()[:32]}.so"
    if not wanted.exists():
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=home) as folder:
            fresh = Path(folder) / "kernels.so"
            command = [compiler, *FLAGS, "-shared", "-fPIC", "-o", str(fresh), *map(str, SOURCES)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            fresh.replace(wanted)
    return wanted


def _processor() -> str:
    """What -march=native depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() + platform.machine()
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in text.splitlines() if line.startswith(wanted)}))
