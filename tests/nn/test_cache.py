"""Caches: each kind gives what the growing one gives, within what it promises."""

from __future__ import annotations

import pytest
import torch

from topwork import AutoModelForCausalLM
from topwork.models import Config
from topwork.nn.cache import Growing, KVCache, Quantised, Windowed

W = 5


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Config(
        model_type="qwen3", vocab_size=40, hidden_size=32, intermediate_size=48,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=128, use_sliding_window=True, sliding_window=W,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def run(model, cache, ids, mask, sizes):
    outputs, at = [], 0
    for size in sizes:
        seen = mask[:, : at + size]
        with torch.no_grad():
            outputs.append(model.backbone(ids[:, at : at + size], attention_mask=seen, cache=cache))
        at += size
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize(
    "sizes", [[30], [1] * 30, [3, 1, 1, 9, 1, 4, 11], [12, 1, 1, 1, 15], [6, 24]]
)
def test_each_cache_gives_the_hidden_states_of_a_pass_without_one(model, sizes, padded):
    torch.manual_seed(1)
    ids = torch.randint(0, 40, (2, 30))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :7] = 0
    with torch.no_grad():
        wanted = model.backbone(ids, attention_mask=mask)
    for cache in (
        KVCache(3), KVCache.static(3, 30), KVCache.sliding(model.windows),
        KVCache([Growing(), Growing(30), Windowed(W)]),
    ):  # fmt: skip
        found = run(model, cache, ids, mask, sizes)
        real = mask.bool()
        torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)
        assert cache.length == 30


def test_a_sliding_window_holds_no_more_than_twice_its_window(model):
    cache = KVCache.sliding(model.windows)
    ids = torch.randint(0, 40, (1, 100))
    run(model, cache, ids, torch.ones_like(ids), [40] + [1] * 60)
    for store, window in zip(cache.stores, model.windows):
        assert store._held[0].shape[1] <= 2 * W if window else store.length == 100


@pytest.mark.parametrize("kind", ["growing", "static", "quantised"])
def test_cropping_forgets_and_goes_on(model, kind):
    make = {
        "growing": lambda: KVCache(3), "static": lambda: KVCache.static(3, 30),
        "quantised": lambda: KVCache.quantised(3),
    }[kind]  # fmt: skip
    torch.manual_seed(2)
    ids, other = torch.randint(0, 40, (2, 2, 20))
    ones = torch.ones(2, 30).long()
    cache = make()
    run(model, cache, ids, ones, [20])
    cache.crop(8)
    with torch.no_grad():
        found = model.backbone(other[:, 8:], cache=cache)
        fresh = make()
        model.backbone(ids[:, :8], cache=fresh)
        wanted = model.backbone(other[:, 8:], cache=fresh)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for wrong in (-1, 21):
        with pytest.raises(ValueError, match="cannot crop"):
            cache.crop(wrong)


def test_a_window_is_cropped_only_as_far_as_it_remembers():
    window = Windowed(4)
    k = torch.arange(12.0).view(1, 12, 1, 1)
    window.update(k[:, :6], k[:, :6])
    window.update(k[:, 6:7], k[:, 6:7])
    window.crop(6)
    keys, _ = window.update(k[:, 6:7], k[:, 6:7])
    assert keys.flatten().tolist() == [3, 4, 5, 6]
    with pytest.raises(ValueError, match="are gone"):
        window.crop(4)
    window.crop(0)
    keys, _ = window.update(k[:, :2], k[:, :2])
    assert keys.flatten().tolist() == [0, 1]


@pytest.mark.parametrize("make", [Growing, lambda: Windowed(4), Quantised])
def test_rows_are_kept_ordered_and_repeated(make):
    store = make()
    k = torch.randn(3, 3, 2, 4)
    store.update(k, -k)
    for rows in ([2, 0, 1], [1, 1, 0, 2, 2], [4, 0]):
        store.select(torch.tensor(rows))
        k = k[rows]
        new = torch.zeros(len(rows), 1, 2, 4)
        keys, values = store.update(new, new)
        torch.testing.assert_close(keys[:, :3], k, atol=0.02, rtol=0)
        torch.testing.assert_close(values[:, :3], -k, atol=0.02, rtol=0)
        store.crop(3)


def test_a_static_cache_refuses_more_than_its_room():
    store = Growing(4)
    store.update(*torch.zeros(2, 1, 4, 1, 2))
    with pytest.raises(ValueError, match="4 tokens cannot hold 5"):
        store.update(*torch.zeros(2, 1, 1, 1, 2))


def test_int8_is_near_and_small():
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 50, 3, 64) * torch.tensor([0.01, 1, 30]).view(3, 1)
    store = Quantised()
    keys, values = store.update(k, v)
    scale = k.abs().amax(-1, keepdim=True)
    assert ((keys - k).abs() <= scale / 127 * 0.51).all()
    assert ((values - v).abs() <= v.abs().amax(-1, keepdim=True) / 127 * 0.51).all()
    held = sum(
        t.nbytes / t.shape[1] * 50 for part in (*store._keys, *store._values) for t in part._held
    )
    assert held < 0.3 * (k.nbytes + v.nbytes)


@pytest.mark.parametrize("kind", ["dynamic", "static", "sliding_window", "quantized"])
def test_generation_takes_every_kind(model, kind):
    torch.manual_seed(3)
    ids = torch.randint(0, 40, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 20, "eos_token_id": 3}
    wanted = model.generate(ids, **options)
    found = model.generate(ids, cache_implementation=kind, **options)
    if kind != "quantized":
        assert torch.equal(found, wanted)
    assert found.shape[0] == 2


def test_a_cache_from_an_earlier_call_saves_its_tokens(model):
    torch.manual_seed(4)
    ids = torch.randint(0, 40, (1, 9))
    first = model.generate(ids, max_new_tokens=6, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, torch.tensor([[7, 8]])), 1)
    fed = []
    hook = lambda module, args, kwargs: fed.append(args[0].shape[1])  # noqa: E731
    handle = model.model.register_forward_pre_hook(hook, with_kwargs=True)
    found = model.generate(longer, max_new_tokens=5, past_key_values=first.past_key_values)
    handle.remove()
    assert fed == [3, 1, 1, 1, 1]
    assert torch.equal(found, model.generate(longer, max_new_tokens=5))
