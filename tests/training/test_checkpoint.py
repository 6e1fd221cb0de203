"""Saves killed at every system call that matters, full disks, and damaged files."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from topwork.errors import CheckpointError
from topwork.training import checkpoint
from topwork.training.checkpoint import checkpoints, latest, prune, verify, write_checkpoint

CALLS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")


def fill(text):
    def write(folder):
        for name in ("model.safetensors", "sub/state.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text * 50)

    return write


def content(folder):
    verify(folder)
    return (folder / "model.safetensors").read_text()[0]


def save_and_prune(home):
    write_checkpoint(home, 3, fill("c"))
    prune(home, 2)


def kill_at(home, count):
    """Run a save in a child that dies at its `count`-th call; returns whether it died."""
    child = os.fork()
    if child == 0:
        left = count
        for name in CALLS:
            real = getattr(os, name)

            def dying(*args, real=real, **kwargs):
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(9)
                return real(*args, **kwargs)

            setattr(os, name, dying)
        save_and_prune(home)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
def test_a_save_killed_at_any_call_leaves_a_whole_checkpoint(tmp_path, again):
    start = tmp_path / "start"
    write_checkpoint(start, 1, fill("a"))
    write_checkpoint(start, 2, fill("b"))
    if again:
        write_checkpoint(start, 3, fill("c"))
    count, died = 0, True
    while died:
        count += 1
        home = tmp_path / f"run-{count}"
        shutil.copytree(start, home)
        died = kill_at(home, count)
        newest = latest(home)
        assert newest is not None
        assert content(newest) in ("b", "c")
        assert again is False or content(newest) == "c"
        for _, folder in checkpoints(home):
            verify(folder)
        assert not [p for p in home.iterdir() if p.name.startswith(".")]
        save_and_prune(home)
        assert [content(f) for _, f in checkpoints(home)] == ["b", "c"]
    assert count > 15


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failing_disk_is_told_and_hurts_no_earlier_checkpoint(tmp_path, monkeypatch, call, code):
    write_checkpoint(tmp_path, 1, fill("a"))

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match="earlier checkpoints are untouched"):
            write_checkpoint(tmp_path, 2, fill("b"))
    assert content(latest(tmp_path)) == "a"


@pytest.mark.parametrize("harm", ["flip", "cut", "grow", "remove", "manifest", "manifest-gone"])
def test_every_damage_is_noticed_and_named(tmp_path, harm):
    write_checkpoint(tmp_path, 1, fill("a"))
    folder = write_checkpoint(tmp_path, 2, fill("b"))
    path = folder / ("manifest.json" if "manifest" in harm else "sub/state.json")
    data = path.read_bytes()
    if harm in ("remove", "manifest-gone"):
        path.unlink()
    else:
        changed = {"flip": b"x" + data[1:], "cut": data[:-1], "grow": data + b"!"}
        path.write_bytes(changed.get(harm, data[:20]))
    with pytest.raises(CheckpointError, match=path.name):
        verify(folder)
    with pytest.warns(UserWarning, match=path.name):
        assert latest(tmp_path) == tmp_path / "checkpoint-1"


def test_nothing_is_pruned_for_a_damaged_newest(tmp_path):
    for step in (1, 2):
        folder = write_checkpoint(tmp_path, step, fill("a"))
    (folder / "model.safetensors").write_text("x")
    with pytest.raises(CheckpointError):
        prune(tmp_path, 1)
    assert len(checkpoints(tmp_path)) == 2


def test_no_whole_checkpoint_at_all_is_an_error(tmp_path):
    folder = write_checkpoint(tmp_path, 1, fill("a"))
    (folder / "manifest.json").unlink()
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(CheckpointError, match="none of its 1"),
    ):
        latest(tmp_path)
    assert latest(Path(tmp_path / "absent")) is None


def test_files_are_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    order = []
    real_sync, real_rename = checkpoint._sync, Path.rename
    monkeypatch.setattr(checkpoint, "_sync", lambda p: (order.append(p.name), real_sync(p)))
    monkeypatch.setattr(
        Path, "rename", lambda self, to: (order.append("rename"), real_rename(self, to))[1]
    )
    write_checkpoint(tmp_path, 5, fill("a"))
    at = order.index("rename")
    assert {"model.safetensors", "state.json", "manifest.json"} <= set(order[:at])
    assert order[at + 1 :] == [tmp_path.name]
