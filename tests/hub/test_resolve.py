from __future__ import annotations

import pytest
import torch

from hub_server import COMMIT, hub_server
from topwork import AutoModelForCausalLM, Config
from topwork.errors import CheckpointError
from topwork.hub import resolve


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = Config(
        model_type="llama", vocab_size=31, hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size=4000)
    return folder


@pytest.fixture
def hub(folder, monkeypatch):
    with hub_server({"someone/tiny": folder}) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        yield endpoint


def test_a_model_comes_from_the_hub_and_then_from_the_cache(hub, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained("someone/tiny", cache_dir=tmp_path)
    local = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, local(ids).logits)
    again = resolve("someone/tiny", cache_dir=tmp_path, local_files_only=True)
    assert again.revision == COMMIT
    assert len(again.weight_files) > 1


def test_only_what_is_wanted_is_fetched(hub, tmp_path):
    checkpoint = resolve("someone/tiny", want=("config",), cache_dir=tmp_path)
    assert checkpoint.weight_files == ()
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("someone/tyny", {}, "nor a model on the Hub"),
        ("someone/tiny", {"revision": "v9"}, "no revision 'v9'"),
        ("someone/tiny", {"local_files_only": True}, "not in the local cache"),
        ("not a name!", {}, "no valid name"),
        ("./nowhere", {}, "no such folder"),
        ("someone/tiny", {"subfolder": "x"}, r"no model\.safetensors"),
    ],
)
def test_what_cannot_be_found_says_why(hub, tmp_path, name, options, words):
    with pytest.raises(CheckpointError, match=words):
        resolve(name, cache_dir=tmp_path, **options)


def test_a_gated_model_needs_its_token(folder, monkeypatch, tmp_path):
    with hub_server({"someone/tiny": folder}, token="hf_secret") as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(CheckpointError, match="gated"):
            resolve("someone/tiny", cache_dir=tmp_path, token=False)
        assert resolve("someone/tiny", cache_dir=tmp_path, token="hf_secret").weight_files


def test_broken_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        resolve(tmp_path, want=("config",)).json("config.json")
