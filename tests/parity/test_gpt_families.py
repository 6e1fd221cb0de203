"""The GPT-shaped families beyond the table of decoders: old files, heads, adapters, decoding."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peft
import topwork
from topwork.errors import ConfigError
from topwork.generation.engine import Engine
from topwork.models.auto import tasks_of
from topwork.models.gpt import GptSpec
from topwork.nn.alibi import AlibiSpec, alibi_slopes
from topwork.peft import LoraConfig, PeftModel, get_peft_model

FAMILIES = [
    "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "gpt_neox", "opt", "bloom", "falcon", "mpt",
]  # fmt: skip
each = pytest.mark.parametrize("family", FAMILIES)
COMMON = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.tensor([[0, 0, 0, 7, 9, 3, 4], [5, 6, 7, 8, 22, 60, 11]])
MASK = (IDS != 0).long()


def tiny(family):
    return importlib.import_module(f"topwork.models.families.{family}").TINY


def peer(family, kind="AutoModelForCausalLM", dtype=torch.float32, attention="eager", **changes):
    """transformers' model with every parameter random."""
    torch.manual_seed(0)
    values = json.loads(json.dumps({**COMMON, **tiny(family), **changes}))
    config = transformers.AutoConfig.for_model(family, **values)
    model = getattr(transformers, kind).from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5))
    return model.to(dtype)


def ours(family, kind="AutoModelForCausalLM", **changes):
    """Our model of the family, from its configuration alone."""
    torch.manual_seed(0)
    values = {**COMMON, **tiny(family), "model_type": family, **changes}
    return getattr(topwork, kind).from_config(topwork.Config(**values)).eval()


def close(found, wanted, name=""):
    error = (found - wanted).norm() / wanted.norm().clamp_min(1e-6)
    assert error < 1e-5, (name, error)


# -- files -----------------------------------------------------------------------------------------


@each
def test_files_without_the_trunks_name_and_with_old_masks_load(family, tmp_path):
    theirs = peer(family)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    trunk = "model" if family == "opt" else theirs.base_model_prefix
    old = {name.removeprefix(f"{trunk}."): tensor for name, tensor in state.items()}
    for home in ("attn", "attn.attention", "attention"):
        old[f"h.0.{home}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        old[f"h.0.{home}.masked_bias"] = torch.tensor(-1e4)
    old["h.0.attention.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = topwork.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        close(model(IDS[1:]).logits, theirs(IDS[1:]).logits)


# What config.json of well-known models says, in the words of its time.
HUB = {
    "gpt2": {
        "activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 768,
        "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "gpt_bigcode": {
        "activation_function": "gelu", "attention_softmax_in_fp32": True, "attn_pdrop": 0.1,
        "embd_pdrop": 0.1, "inference_runner": 0, "layer_norm_epsilon": 1e-05,
        "max_batch_size": None, "max_sequence_length": None, "multi_query": True, "n_embd": 6144,
        "n_head": 48, "n_inner": 24576, "n_layer": 40, "n_positions": 8192, "pad_key_length": True,
        "pre_allocate_kv_cache": False, "resid_pdrop": 0.1,
        "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True, "summary_type":
        "cls_index", "use_cache": True, "validate_runner_input": True, "vocab_size": 49152,
    },
    "gpt_neo": {
        "activation_function": "gelu_new", "attention_dropout": 0,
        "attention_layers": ["global", "local"] * 6,
        "attention_types": [[["global", "local"], 6]], "bos_token_id": 50256, "embed_dropout": 0,
        "gradient_checkpointing": False, "hidden_size": 768, "intermediate_size": None,
        "layer_norm_epsilon": 1e-05, "max_position_embeddings": 2048, "num_heads": 12,
        "num_layers": 12, "resid_dropout": 0, "summary_activation": None, "vocab_size": 50257,
        "window_size": 256,
    },
    "gptj": {
        "activation_function": "gelu_new", "attn_pdrop": 0.0, "embd_pdrop": 0.0,
        "gradient_checkpointing": False, "layer_norm_epsilon": 1e-05, "n_embd": 4096, "n_head": 16,
        "n_inner": None, "n_layer": 28, "n_positions": 2048, "resid_pdrop": 0.0, "rotary": True,
        "rotary_dim": 64, "scale_attn_weights": True, "tie_word_embeddings": False,
        "use_cache": True, "vocab_size": 50400,
    },
    "gpt_neox": {
        "attention_dropout": 0.0, "hidden_act": "gelu", "hidden_dropout": 0.0, "hidden_size": 512,
        "intermediate_size": 2048, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
        "num_attention_heads": 8, "num_hidden_layers": 6, "rotary_emb_base": 10000,
        "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
        "use_parallel_residual": True, "vocab_size": 50304,
    },
    "opt": {
        "_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu",
        "attention_dropout": 0.0, "do_layer_norm_before": False, "dropout": 0.1, "ffn_dim": 4096,
        "hidden_size": 1024, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048,
        "num_attention_heads": 16, "num_hidden_layers": 24, "prefix": "</s>", "vocab_size": 50272,
        "word_embed_proj_dim": 512,
    },
    "bloom": {
        "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "hidden_dropout": 0.0,
        "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "n_embed": 1024,
        "n_inner": None, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100,
        "pretraining_tp": 4, "seq_length": 2048, "skip_bias_add": True, "skip_bias_add_qkv": False,
        "unk_token_id": 0, "vocab_size": 250880,
    },
    "falcon": {
        "alibi": False, "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0, "auto_map": {}, "bias": False, "hidden_dropout": 0.0,
        "hidden_size": 4544, "layer_norm_epsilon": 1e-05, "multi_query": True,
        "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32,
        "parallel_attn": True, "vocab_size": 65024,
    },
    "mpt": {
        "attn_config": {
            "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
            "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "clip_qkv": None,
            "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
        },
        "d_model": 4096, "emb_pdrop": 0, "embedding_fraction": 1.0, "expansion_ratio": 4,
        "init_config": {"name": "kaiming_normal_", "verbose": 0}, "init_device": "cpu",
        "learned_pos_emb": True, "logit_scale": None, "max_seq_len": 2048, "n_heads": 32,
        "n_layers": 32, "no_bias": True, "norm_type": "low_precision_layernorm", "resid_pdrop": 0,
        "tokenizer_name": "EleutherAI/gpt-neox-20b", "use_cache": False, "verbose": 0,
        "vocab_size": 50432,
    },
}  # fmt: skip


@each
def test_the_configurations_on_the_hub_are_understood(family):
    with torch.device("meta"):
        model = topwork.models.auto.build(
            topwork.Config(model_type=family, **HUB[family]), "causal-lm"
        )
    kind = transformers.AutoConfig.for_model(family, **json.loads(json.dumps(HUB[family])))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(kind)
    shapes = {name: p.shape for name, p in theirs.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes


# -- heads -----------------------------------------------------------------------------------------


@each
def test_text_classifiers_equal_the_peer_and_save_as_it_does(family, tmp_path):
    kind = "AutoModelForSequenceClassification"
    theirs = peer(family, kind, num_labels=3)
    theirs.save_pretrained(tmp_path / "theirs")
    model = getattr(topwork, kind).from_pretrained(tmp_path / "theirs")
    labels = torch.tensor([2, 0])
    wanted = theirs(IDS, attention_mask=MASK, labels=labels)
    found = model(IDS, attention_mask=MASK, labels=labels)
    if family in ("gpt2", "gpt_bigcode", "gpt_neo", "gptj", "gpt_neox"):
        # The peer counts padding as positions here; without it the rows are the same.
        alone = [theirs(IDS[:1, 3:]).logits, theirs(IDS[1:]).logits]
        close(found.logits, torch.cat(alone))
    else:
        close(found.logits, wanted.logits)
    model.save_pretrained(tmp_path / "ours")
    again, info = getattr(transformers, kind).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        close(again(IDS[1:]).logits, theirs(IDS[1:]).logits)


@pytest.mark.parametrize("family", [f for f in FAMILIES if "token-classification" in tasks_of(f)])
def test_token_classifiers_equal_the_peer(family, tmp_path):
    kind = "AutoModelForTokenClassification"
    theirs = peer(family, kind, num_labels=3)
    theirs.save_pretrained(tmp_path)
    model = getattr(topwork, kind).from_pretrained(tmp_path)
    labels = torch.randint(0, 3, (1, 7))
    wanted, found = theirs(IDS[1:], labels=labels), model(IDS[1:], labels=labels)
    close(found.logits, wanted.logits)
    close(found.loss, wanted.loss)


def test_every_head_of_the_peer_is_here():
    mappings = transformers.models.auto.modeling_auto
    for family in FAMILIES:
        tasks = tasks_of(family)
        for task, names in {
            "base": mappings.MODEL_MAPPING_NAMES,
            "causal-lm": mappings.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            "sequence-classification": mappings.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            "token-classification": mappings.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        }.items():
            assert (task in tasks) == (family in names), (family, task)


@each
def test_bare_models_load_causal_files_and_save_as_the_peers_do(family, tmp_path):
    theirs = peer(family, "AutoModelForCausalLM")
    theirs.save_pretrained(tmp_path / "causal")
    model = topwork.AutoModel.from_pretrained(tmp_path / "causal")
    model.save_pretrained(tmp_path / "bare")
    again, info = transformers.AutoModel.from_pretrained(
        tmp_path / "bare", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        close(model(IDS[1:]).last_hidden_state, again(IDS[1:]).last_hidden_state)
    assert model.get_input_embeddings().weight.shape == (61, 40)


# -- training and decoding -------------------------------------------------------------------------


@each
def test_checkpointed_blocks_give_the_same_gradients(family):
    model = ours(family).train()
    torch.manual_seed(3)
    model(IDS[1:], labels=IDS[1:]).loss.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    torch.manual_seed(3)
    model(IDS[1:], labels=IDS[1:]).loss.backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), wanted))


@each
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_adapters_on_the_usual_targets_pass_both_ways(family, targets, tmp_path):
    base = peer(family)
    base.save_pretrained(tmp_path / "base")
    turned = family == "gpt2"
    options = {"r": 3, "lora_alpha": 7, "target_modules": targets, "fan_in_fan_out": turned}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**options, init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    model = topwork.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    theirs.eval()
    wanted, found = theirs(IDS[1:], labels=IDS[1:]), adapted(IDS[1:], labels=IDS[1:])
    close(found.logits, wanted.logits)
    wanted.loss.backward()
    found.loss.backward()
    by_name = dict(theirs.named_parameters())
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert set(trained) == {n for n, p in by_name.items() if p.requires_grad}
    floor = 3e-2 * max(by_name[n].grad.norm() for n in trained)
    for name, parameter in trained.items():
        error = (parameter.grad - by_name[name].grad).norm()
        assert error < 1e-5 * max(by_name[name].grad.norm(), floor), name
    adapted.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(peer(family), tmp_path / "ours")
    with torch.no_grad():
        close(again(IDS[1:]).logits, wanted.logits)
        close(adapted.merge_and_unload()(IDS[1:]).logits, wanted.logits)


def test_an_adapter_on_gpt2_runs_as_one_function():
    adapted = get_peft_model(ours("gpt2"), LoraConfig(target_modules=["c_attn", "c_fc"]))
    loss = adapted(IDS[1:], labels=IDS[1:]).loss
    names, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        names.add(type(node).__name__)
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    assert "_FusedLinearsBackward" in names


@each
def test_greedy_decoding_of_a_padded_batch_gives_the_peers_tokens(family, tmp_path):
    theirs = peer(family)
    theirs.save_pretrained(tmp_path)
    model = topwork.AutoModelForCausalLM.from_pretrained(tmp_path)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = theirs.generate(IDS, attention_mask=MASK, **options)
    assert torch.equal(model.generate(IDS, attention_mask=MASK, **options), wanted)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gpt2", {}), ("bloom", {}), ("falcon", {"alibi": True, "num_attention_heads": 10})],
)
def test_the_engine_gives_each_request_what_it_gets_alone(family, changes):
    model = ours(family, initializer_range=0.3, **changes)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    prompts = [torch.randint(3, 61, (n,)) for n in (5, 17, 2)]
    engine = Engine(model, page_size=4, piece=8)
    requests = [engine.submit(prompt, **options) for prompt in prompts]
    list(engine.run())
    for prompt, request in zip(prompts, requests):
        alone = model.generate(prompt[None], **options)[0]
        assert request.ids == alone.tolist()


@pytest.mark.parametrize(
    ("family", "changes"), [("opt", {}), ("gptj", {}), ("mpt", {}), ("falcon", {"alibi": True})]
)
def test_branches_go_on_from_their_beginning(family, changes):
    model = ours(family, initializer_range=0.3, **changes)
    ids = torch.randint(3, 61, (1, 14))
    with torch.no_grad():
        shared = model.backbone(ids, lengths=((5, 4, 3), 2))[0]
        first = model.backbone(ids[:, :9])[0]
        second = model.backbone(torch.cat((ids[:, :5], ids[:, 9:12]), 1))[0, 5:]
        third = model.backbone(ids[:, 12:])[0]
    torch.testing.assert_close(shared, torch.cat((first, second, third)), rtol=1e-4, atol=1e-5)


@each
def test_the_stack_is_described(family):
    text = topwork.describe(ours(family))
    assert "layers 0-1" in text
    assert "width=56" in text or "width=160" in text


def test_a_sliding_cache_serves_gpt_neos_local_layers():
    model = ours("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=4)
    ids = torch.randint(3, 61, (1, 20))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(ids, **options)
    found = model.generate(ids, cache_implementation="sliding_window", **options)
    assert torch.equal(found, wanted)
    assert model.windows == [None, 4]


@each
def test_bf16_is_as_near_to_fp32_as_the_peer_is(family, tmp_path):
    exact = peer(family)
    exact.save_pretrained(tmp_path)
    ids = torch.randint(3, 61, (4, 40))
    with torch.no_grad():
        truth = exact(ids).logits
        theirs = exact.to(torch.bfloat16)(ids).logits.float()
        model = topwork.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
        found = model(ids).logits.float()
    assert (found - truth).norm() < 1.2 * (theirs - truth).norm()


# -- formulas --------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 8, 12, 71])
def test_slopes_are_the_papers(heads):
    def power(n):
        start = 2 ** (-8 / n)
        return [start ** (i + 1) for i in range(n)]

    n = 2 ** math.floor(math.log2(heads))
    wanted = power(n) + power(2 * n)[0::2][: heads - n]
    torch.testing.assert_close(alibi_slopes(heads), torch.tensor(wanted))


def test_falcon_rounds_what_it_adds_to_bf16():
    bias = AlibiSpec(16, factor=0.5, rounded=True).terms(300, torch.device("cpu")).bias
    slope, position = torch.tensor([2.0**-0.5, 299.0]).bfloat16()  # 0.70703125, 300
    assert bias[0, 0, 299] == (slope * position).float() * 0.5 == 106.0
    assert bias.shape == (16, 300, 300)


def mpt_by_hand(model, ids):
    """MPT with its norm over queries and keys, from the formulas of its authors' code."""
    spec: GptSpec = model.trunk.spec
    attention = spec.layers[0].attention
    x = model.transformer.wte(ids)
    tokens = ids.shape[1]
    distance = torch.arange(tokens)[None, :] - torch.arange(tokens)[:, None]
    slopes = 2.0 ** -(torch.arange(1, 5) * spec.alibi.max_bias / 4)
    bias = slopes[:, None, None] * distance
    bias = bias.masked_fill(distance > 0, float("-inf"))
    for block in model.transformer.blocks:
        q, k, v = block.attn.Wqkv(block.norm_1(x)).chunk(3, -1)
        q, k = block.attn.q_ln(q), block.attn.k_ln(k)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(2, 3) * attention.scale + bias).softmax(-1)
        x = x + block.attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.ffn.down_proj(torch.nn.functional.gelu(block.ffn.up_proj(block.norm_2(x))))
    return model.lm_head(model.transformer.norm_f(x)) / 40**0.5


def test_mpts_options_that_transformers_leaves_out_follow_its_authors():
    model = ours(
        "mpt", n_heads=4, no_bias=False, expansion_ratio=2, logit_scale="inv_sqrt_d_model",
        attn_config={"qk_ln": True, "alibi_bias_max": 4},
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        torch.testing.assert_close(
            model(IDS[1:]).logits, mpt_by_hand(model, IDS[1:]), rtol=1e-4, atol=1e-4
        )
        hidden = model.backbone(IDS[1:])
        found = model.token_logprobs(hidden[0, :-1], IDS[1, 1:])
        wanted = mpt_by_hand(model, IDS[1:])[0, :-1].log_softmax(-1)
        wanted = wanted.gather(1, IDS[1, 1:, None])[:, 0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert model.transformer.blocks[0].ffn.up_proj.weight.shape == (80, 40)
    assert model.transformer.blocks[0].attn.Wqkv.bias is not None


# -- what cannot be meant --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gpt2", {"activation_function": "gelu_nwe"}, "nearest: 'gelu_new'"),
        ("gpt2", {"add_scale": 3}, "add_scale=3"),
        ("gpt_neo", {"attention_types": [[["global"], 3]]}, "2 layers"),
        ("gpt_neo", {"attention_types": [[["global", "locale"], 1]]}, "'local'"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "new_decoder_architecture"),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 3}, "5 heads"),
        ("mpt", {"attn_config": {"alibi": False}}, "alibi=False"),
        ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}, "multihead_attention"),
        ("mpt", {"attn_config": {"window": 3}}, "window=3"),
        ("mpt", {"norm_type": "rmsnorm"}, "rmsnorm"),
    ],
)
def test_options_that_nobody_can_act_on_are_refused(family, changes, words):
    with pytest.raises(ConfigError, match=words):
        ours(family, **changes)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_more_tokens_than_learned_positions_are_refused(family):
    model = ours(family)
    ids = torch.ones(1, 65, dtype=torch.long)
    with pytest.raises(ConfigError, match="64 positions"):
        model(ids)
    packed = model(ids, lengths=(40, 25)).logits
    padded = torch.nn.functional.pad(ids[:, :60], (10, 0))
    mask = torch.nn.functional.pad(ids[:, :60], (10, 0))
    cached = model(padded, attention_mask=mask, use_cache=True).logits
    assert packed.isfinite().all()
    close(cached[:, 10:50], packed[:, :40])
