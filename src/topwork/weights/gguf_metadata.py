"""The metadata of a .gguf file (version 2 and 3), read without touching its tensors.

The `gguf` library's reader takes seconds over a vocabulary; this takes a tenth of one.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from topwork.errors import CheckpointError

# The format's value types: a number's struct code, or "string" or "array".
KINDS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 8: "string", 9: "array",
         10: "Q", 11: "q", 12: "d"}  # fmt: skip


class _Cursor:
    """A position in the file's bytes; every step is checked against their end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, code: str, count: int = 1) -> tuple[Any, ...]:
        size = struct.calcsize("<" + code) * count
        self._reach(size)
        values = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += size
        return values

    def text(self) -> str:
        (size,) = self.take("Q")
        self._reach(size)
        start, self.at = self.at, self.at + size
        return self.data[start : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        name = KINDS.get(kind)
        if name is None or depth > 4:
            raise CheckpointError(f"{self.path}: damaged: a value of unknown type {kind}")
        if name == "string":
            return self.text()
        if name != "array":
            return self.take(name)[0]
        inner, count = self.take("I")[0], self.take("Q")[0]
        self._reach(count)  # each element takes a byte at least
        if KINDS.get(inner) in ("string", "array", None):
            return [self.value(inner, depth + 1) for _ in range(count)]
        return list(self.take(KINDS[inner], count))

    def _reach(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise CheckpointError(f"{self.path}: truncated: its metadata goes on behind its end")


def read_metadata(path: Path) -> dict[str, Any]:
    """All metadata keys of the file; CheckpointError when it is no GGUF file, or damaged."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(path, data)
            if data[:4] != b"GGUF":
                raise CheckpointError(f"{path}: no GGUF file: it begins with {data[:4]!r}")
            cursor.at = 4
            (version,) = cursor.take("I")
            if version not in (2, 3):
                raise CheckpointError(f"{path}: GGUF version {version} is not supported: 2 or 3")
            _, count = cursor.take("Q", 2)
            found = {}
            for _ in range(count):
                key = cursor.text()
                (kind,) = cursor.take("I")
                found[key] = cursor.value(kind)
            return found
    except (ValueError, OSError) as error:  # an empty file cannot be mapped
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: no readable GGUF file: {error}") from error
