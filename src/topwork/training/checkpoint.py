"""Checkpoints as transactions: stage, fsync, manifest, rename, fsync of the folder.

A folder `checkpoint-N` is whole or does not exist: it is written under another name and renamed
when its manifest (each file's size and SHA-256) lies on disk. Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from topwork._version import __version__
from topwork.errors import CheckpointError

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFT = re.compile(r"\.checkpoint-\d+\.(part|gone)")


def write_checkpoint(home: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a staged folder, then make it `home/checkpoint-<step>` in one move."""
    home.mkdir(parents=True, exist_ok=True)
    final = home / f"checkpoint-{step}"
    staged = home / f".checkpoint-{step}.part"
    _remove(staged)
    staged.mkdir()
    try:
        write(staged)
        files = sorted(p for p in staged.rglob("*") if p.is_file())
        manifest = {
            "topwork": __version__,
            "torch": torch.__version__,
            "step": step,
            "files": {
                p.relative_to(staged).as_posix(): {"size": p.stat().st_size, "sha256": _digest(p)}
                for p in files
            },
        }
        for path in files:
            _sync(path)
        target = staged / MANIFEST
        target.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _sync(target)
        for folder in {p.parent for p in files} | {staged}:
            _sync(folder)
        if final.exists():  # an earlier one of the same step: it stays until this one is whole
            old = home / f".checkpoint-{step}.old"
            _remove(old)
            final.rename(old)
            staged.rename(final)
            _remove(old)
        else:
            staged.rename(final)
        _sync(home)
    except OSError as error:
        _remove(staged)
        raise CheckpointError(
            f"{final}: could not be written: {error}; the earlier checkpoints are untouched"
        ) from error
    return final


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint. CheckpointError naming what is missing or damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: no readable {MANIFEST}: {error}") from error
    for name, facts in files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        if file.stat().st_size != facts["size"]:
            raise CheckpointError(
                f"{file}: {file.stat().st_size} bytes, the manifest says {facts['size']}"
            )
        if _digest(file) != facts["sha256"]:
            raise CheckpointError(f"{file}: its content is not what was written (SHA-256)")
    return manifest


def checkpoints(home: Path) -> list[tuple[int, Path]]:
    """All checkpoint folders as (step, folder), the oldest first; not verified."""
    if not home.is_dir():
        return []
    found = [(m, p) for p in home.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return sorted((int(m.group(1)), p) for m, p in found)


def latest(home: Path) -> Path | None:
    """The newest checkpoint that is whole. A damaged one is named in a warning and passed over.

    CheckpointError when there are some and none is whole.
    """
    recover(home)
    found = checkpoints(home)
    for _, folder in reversed(found):
        try:
            verify(folder)
        except CheckpointError as error:
            warnings.warn(f"damaged checkpoint passed over: {error}", stacklevel=2)
            continue
        return folder
    if found:
        raise CheckpointError(f"{home}: none of its {len(found)} checkpoints is whole")
    return None


def recover(home: Path) -> None:
    """Clear what a killed save left: unfinished folders go, a set-aside checkpoint comes back."""
    if not home.is_dir():
        return
    for old in home.glob(".checkpoint-*.old"):
        final = home / old.name[1:].removesuffix(".old")
        if final.exists():
            _remove(old)
        else:
            old.rename(final)
    for path in home.iterdir():
        if _LEFT.fullmatch(path.name):
            _remove(path)


def prune(home: Path, keep: int, spare: Path | None = None) -> None:
    """Remove the oldest checkpoints beyond `keep`, once the newest is verified; never `spare`."""
    found = [folder for _, folder in checkpoints(home)]
    if len(found) <= keep:
        return
    verify(found[-1])
    for folder in found[: len(found) - keep]:
        if spare is None or folder != spare:
            # Out of sight in one move: a killed removal leaves no half checkpoint.
            gone = home / f".{folder.name}.gone"
            _remove(gone)
            folder.rename(gone)
            _remove(gone)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)


def get_last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in `folder`, as scripts ask for it."""
    found = latest(Path(folder))
    return None if found is None else str(found)
