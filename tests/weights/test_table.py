from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from topwork.errors import CheckpointError
from topwork.hub import resolve
from topwork.weights import Pack, Rename, Table, Unpack, load_weights, save_weights, transposed


class Memory(nn.Module):
    """Parameters of given names and shapes, random."""

    def __init__(self, **shapes):
        super().__init__()
        torch.manual_seed(0)
        for name, shape in shapes.items():
            *path, leaf = name.split("__")
            home = self
            for part in path:
                if part not in home._modules:
                    home.add_module(part, nn.Module())
                home = home.get_submodule(part)
            setattr(home, leaf, nn.Parameter(torch.randn(shape)))


EXPERTS = Table(
    (
        Rename("sparse", "mlp"),
        Pack(("mlp.experts.#.w1.weight", "mlp.experts.#.w3.weight"), "mlp.experts.gate_up"),
        Pack(("mlp.experts.#.w2.weight",), "mlp.experts.down"),
    )
)
CASES = {
    "rename": (
        Table((Rename("attn.*.fc", "a.*.linear"), Rename("^gamma$", "weight"))),
        {"attn__3__linear__x": (2,), "a__3__linear__bias": (2,), "weight": (3,)},
        {"attn.3.linear.x": (2,), "attn.3.fc.bias": (2,), "gamma": (3,)},
    ),
    "an empty path": (
        Table((Rename("h.*", "*"),)), {"0__w": (2,), "1__w": (3,)}, {"h.0.w": (2,), "h.1.w": (3,)},
    ),
    "transpose": (Table((transposed("fc.weight"),)), {"fc__weight": (2, 3)}, {"fc.weight": (3, 2)}),
    "experts": (
        EXPERTS,
        {"l__0__mlp__experts__gate_up": (2, 6, 4), "l__0__mlp__experts__down": (2, 4, 3)},
        {f"l.0.sparse.experts.{e}.{w}.weight": (4, 3) if w == "w2" else (3, 4)
         for e in range(2) for w in ("w1", "w3", "w2")},
    ),
    "separate on disk, fused in memory": (
        Table((Pack(("q", "k", "v"), "qkv", sizes=(4, 2, 2)),)),
        {"a__qkv__weight": (8, 3), "a__qkv__bias": (8,)},
        {"a.q.weight": (4, 3), "a.k.weight": (2, 3), "a.v.weight": (2, 3),
         "a.q.bias": (4,), "a.k.bias": (2,), "a.v.bias": (2,)},
    ),
    "fused on disk, separate in memory": (
        Table((Unpack("qkv", ("q", "k", "v"), sizes=(4, 2, 2)),)),
        {"a__q__weight": (4, 3), "a__k__weight": (2, 3), "a__v__weight": (2, 3)},
        {"a.qkv.weight": (8, 3)},
    ),
}  # fmt: skip
each = pytest.mark.parametrize(("table", "memory", "disk"), CASES.values(), ids=CASES.keys())


@each
@pytest.mark.parametrize("size", ["5GB", 40])
def test_what_is_saved_has_the_names_of_the_disk_and_comes_back_bit_for_bit(
    table, memory, disk, size, tmp_path
):
    before = Memory(**memory)
    paths = save_weights(before, tmp_path, table=table, max_shard_size=size)
    found = {k: tuple(v.shape) for path in paths for k, v in load_file(path).items()}
    assert found == disk
    with torch.device("meta"):
        after = Memory(**memory)
    report = load_weights(after, resolve(tmp_path, want=("weights",)), table=table)
    assert set(report.loaded) == set(dict(before.named_parameters()))
    for name, value in before.named_parameters():
        assert torch.equal(value, after.get_parameter(name)), name


def test_each_part_lies_where_the_table_says(tmp_path):
    parts = {
        f"l.0.sparse.experts.{e}.{w}.weight": torch.full((3, 4), 10.0 * e + int(w[1]))
        for e in range(2)
        for w in ("w1", "w3")
    }
    save_file(parts, tmp_path / "model.safetensors")
    model = Memory(l__0__mlp__experts__gate_up=(2, 6, 4))
    load_weights(model, resolve(tmp_path, want=("weights",)), table=EXPERTS)
    stacked = model.get_parameter("l.0.mlp.experts.gate_up")
    assert stacked[:, ::3, 0].tolist() == [[1.0, 3.0], [11.0, 13.0]]


def test_a_file_in_the_layout_of_the_memory_loads_too(tmp_path):
    shapes = CASES["experts"][1]
    save_weights(Memory(**shapes), tmp_path)
    again = Memory(**shapes)
    load_weights(again, resolve(tmp_path, want=("weights",)), table=EXPERTS)


def test_old_layouts_are_read_and_the_usual_one_is_written(tmp_path):
    table = Table(old=(Rename("gamma", "weight"), Pack(("q", "k"), "qk")))
    old = {"norm.gamma": torch.ones(2), "q.weight": torch.ones(1, 2), "k.weight": torch.ones(1, 2)}
    save_file(old, tmp_path / "model.safetensors")
    model = Memory(norm__weight=(2,), qk__weight=(2, 2))
    load_weights(model, resolve(tmp_path, want=("weights",)), table=table)
    (path,) = save_weights(model, tmp_path, table=table)
    assert set(load_file(path)) == {"norm.weight", "qk.weight"}


def test_a_missing_expert_is_named_as_the_file_would_name_it(tmp_path):
    shapes = CASES["experts"][1]
    (path,) = save_weights(Memory(**shapes), tmp_path, table=EXPERTS)
    state = load_file(path)
    gone = "l.0.sparse.experts.1.w3.weight"
    state["l.0.sparse.experts.2.w3.weight"] = state.pop(gone)
    save_file(state, path)
    with pytest.raises(CheckpointError) as caught:
        load_weights(Memory(**shapes), resolve(tmp_path, want=("weights",)), table=EXPERTS)
    assert f"missing: {gone};" in str(caught.value)
    assert "unexpected: l.0.sparse.experts.2.w3.weight" in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_prefix_may_be_absent_from_the_file_or_from_the_module(prefix, tmp_path):
    table = Table((Rename("gamma", "weight"),), prefix="bert.")
    save_file({f"{prefix}norm.gamma": torch.ones(2)}, tmp_path / "model.safetensors")
    for model in (Memory(norm__weight=(2,)), Memory(bert__norm__weight=(2,))):
        load_weights(model, resolve(tmp_path, want=("weights",)), table=table)
        assert next(iter(model.parameters())).tolist() == [1.0, 1.0]


def test_only_the_named_tensors_may_be_fresh_or_dropped(tmp_path):
    save_file({"a": torch.ones(2), "mask": torch.ones(1)}, tmp_path / "model.safetensors")
    found = resolve(tmp_path, want=("weights",))
    table = Table(drop=(r"mask$",), fresh=(r"^score\.",))
    report = load_weights(Memory(a=(2,), score__weight=(2, 2)), found, table=table)
    assert report.fresh == ("score.weight",)
    assert report.ignored == ("mask",)
    with pytest.raises(CheckpointError, match=r"missing: b$"):
        load_weights(Memory(a=(2,), b=(2,), score__weight=(2, 2)), found, table=table)


@pytest.mark.parametrize("order", [("head", "embed"), ("embed", "head")])
@pytest.mark.parametrize("same", [True, False])
def test_tied_tensors_that_differ_in_the_file_are_untied(order, same, tmp_path):
    values = {"a_" + order[0]: torch.ones(2), "b_" + order[1]: torch.full((2,), 1.0 + (not same))}
    save_file(values, tmp_path / "model.safetensors")
    table = Table((Rename("a_head", "head"), Rename("a_embed", "embed"), Rename("b_head", "head"),
                   Rename("b_embed", "embed")))  # fmt: skip
    model = Memory(head=(2,), embed=(2,))
    report = load_weights(
        model, resolve(tmp_path, want=("weights",)), table=table, tied={"head": "embed"}
    )
    by_name = {key[2:]: value for key, value in values.items()}
    assert report.untied == (() if same else ("head",))
    assert torch.equal(model.embed, by_name["embed"])
    assert same or torch.equal(model.head, by_name["head"])


MEASURE = """
import sys, torch
from torch import nn
from topwork.hub import resolve
from topwork.weights import Pack, Table, load_weights, save_weights
def held():
    return [int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")][0]
table = Table((Pack(("experts.#.w1", "experts.#.w3"), "experts.gate_up"),))
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(8))
        for layer in self.layers:
            layer.experts = nn.Module()
            layer.experts.gate_up = nn.Parameter(torch.ones(8, 1024, 512))
torch.ones(4).to(torch.bfloat16)
if sys.argv[2] == "save":
    save_weights(Net(), sys.argv[1], table=table)
    raise SystemExit
with torch.device("meta"):
    model = Net()
before = held()
load_weights(model, resolve(sys.argv[1], want=("weights",)), table=table)
size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1024
print((held() - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_stacking_experts_holds_little_more_than_the_model(tmp_path):
    for what in ("save", "load"):
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path), what],
            capture_output=True,
            text=True,
            check=True,
        )
    assert float(run.stdout) <= 1.15
