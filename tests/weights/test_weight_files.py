from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from topwork.errors import CheckpointError
from topwork.hub import resolve
from topwork.weights import Table, load_weights, save_weights


def net(width=4):
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def found(folder, **kwargs):
    return resolve(folder, want=("weights",), **kwargs)


@pytest.mark.parametrize("size", ["5GB", 60, "1KB"])
def test_saved_tensors_come_back_whole_or_in_shards(tmp_path, size):
    paths = save_weights(net(), tmp_path, max_shard_size=size)
    assert (len(paths) > 1) == (size == 60)
    with torch.device("meta"):
        again = net()
    load_weights(again, found(tmp_path))
    for name, value in net().state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_unexpected_keys_are_listed_unless_ignored(tmp_path):
    save_weights(net(), tmp_path)
    small = net()[:2]
    with pytest.raises(CheckpointError, match=r"unexpected: 2\.bias, 2\.weight"):
        load_weights(small, found(tmp_path))
    report = load_weights(small, found(tmp_path), table=Table(drop=(r"^2\.",)))
    assert sorted(report.ignored) == ["2.bias", "2.weight"]


def test_a_truncated_file_is_named(tmp_path):
    (path,) = save_weights(net(), tmp_path)
    whole = path.read_bytes()
    for keep in (0, 4, 50, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load_weights(net(), found(tmp_path))


def test_a_missing_shard_is_named(tmp_path):
    paths = save_weights(net(), tmp_path, max_shard_size=60)
    paths[0].unlink()
    with pytest.raises(CheckpointError, match=paths[0].name):
        found(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a\\b.safetensors", ".."])
def test_an_index_may_not_leave_its_folder(tmp_path, name):
    index = {"weight_map": {"a": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="leaves the folder"):
        found(tmp_path)


def test_legacy_files_need_the_flag(tmp_path):
    torch.save(net().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="allow_bin=True"):
        found(tmp_path)
    again = nn.Sequential(*[type(m)(*a) for m, a in zip(net(), [(3, 4), (4,), (4, 2)])])
    load_weights(again, found(tmp_path, allow_bin=True))
    assert torch.equal(again[0].weight, net()[0].weight)


class Canary:
    def __reduce__(self):
        return (sys.exit, (3,))


def test_a_legacy_file_that_runs_code_is_refused(tmp_path):
    torch.save({"0.weight": Canary()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_weights(net(), found(tmp_path, allow_bin=True))


MEASURE = """
import sys, torch, safetensors.torch
from torch import nn
from topwork.hub import resolve
from topwork.weights import load_weights
def held():
    return [int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")][0]
torch.ones(4).to(torch.bfloat16)
with torch.device("meta"):
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(40)])
dtype = getattr(torch, sys.argv[2])
before = held()
load_weights(model, resolve(sys.argv[1], want=("weights",)), dtype=dtype)
size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1024
print((held() - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_holds_little_more_than_the_model(tmp_path, dtype):
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(40)])
    save_weights(model, tmp_path, max_shard_size="50MB")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(run.stdout) <= 1.15
