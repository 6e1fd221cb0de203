"""Every family of speech against transformers (eager): option by option, head by head."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import topwork
from topwork import (
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    Config,
    LoraConfig,
    get_peft_model,
)
from topwork.errors import CheckpointError, ConfigError, TopworkWarning
from topwork.models.auto import tasks_of
from topwork.models.families import NAMES as ALL
from topwork.models.families import family as family_of

TASKS = {
    "base": AutoModel,
    "ctc": AutoModelForCTC,
    "speech-seq2seq": AutoModelForSpeechSeq2Seq,
    "audio-classification": AutoModelForAudioClassification,
}
NAMES = [name for name in ALL if {"ctc", "speech-seq2seq"} & set(tasks_of(name))]
RAW = {
    "vocab_size": 23, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 56, "conv_dim": [16, 24, 16], "conv_kernel": [8, 3, 2],
    "conv_stride": [4, 2, 2], "num_conv_pos_embeddings": 6, "num_conv_pos_embedding_groups": 3,
    "layerdrop": 0.0, "mask_time_length": 4,
}  # fmt: skip
WHISPER = {
    "vocab_size": 71, "num_mel_bins": 12, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 56, "max_source_positions": 20, "max_target_positions": 30,
    "pad_token_id": 60, "bos_token_id": 60, "eos_token_id": 60, "decoder_start_token_id": 61,
    "begin_suppress_tokens": None,
}  # fmt: skip
SIZES = {"whisper": WHISPER}


def cases(name, task):
    """The family's cases; those whose adapter no classifier has, for the other heads."""
    more = getattr(family_of(name), "SHORTENED", []) if task != "audio-classification" else []
    return [*family_of(name).CASES, *more]


ROWS = [
    (n, i, t) for n in NAMES for t in TASKS if t in tasks_of(n) for i in range(len(cases(n, t)))
]
# Whisper looks at silence too, and the peer lets padding into the adapter.
PADDED = [
    (n, i, t, padded)
    for n, i, t in ROWS
    for padded in (False, True)
    if not padded or (n != "whisper" and "add_adapter" not in cases(n, t)[i])
]
each_row = pytest.mark.parametrize(
    ("family", "case", "task"), ROWS, ids=[f"{n}-{i}-{t}" for n, i, t in ROWS]
)


def peer(family, case, task, **changes):
    """The peer's model with every trained parameter random."""
    options = {**SIZES.get(family, RAW), **json.loads(json.dumps(cases(family, task)[case]))}
    config = transformers.AutoConfig.for_model(family, **{**options, "num_labels": 3, **changes})
    torch.manual_seed(0)
    maker = getattr(transformers, TASKS[task].__name__)
    model = maker.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                size = 0.2 if parameter.dim() > 1 else 0.5
                parameter.copy_(torch.randn_like(parameter) * size)
    return model


@pytest.fixture
def pair(family, case, task, tmp_path):
    theirs = peer(family, case, task)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, TASKS[task].from_pretrained(tmp_path / "theirs")


def sounds(family, case, task, padded=False):
    """Two sounds, and what the task is trained on."""
    torch.manual_seed(1)
    if family == "whisper":
        bins = cases(family, task)[case].get("num_mel_bins", 12)
        data = {"input_features": torch.randn(2, bins, 40)}
    else:
        data = {"input_values": torch.randn(2, 900)}
        if padded:
            data["attention_mask"] = torch.ones(2, 900, dtype=torch.long)
            data["attention_mask"][1, 500:] = 0
            data["input_values"][1, 500:] = 0
    labels = {
        "ctc": torch.randint(1, 23, (2, 4)),
        "speech-seq2seq": torch.randint(0, 60, (2, 9)),
        "audio-classification": torch.tensor([2, 0]),
    }
    if task in labels:
        data["labels"] = labels[task]
        if task != "audio-classification":
            data["labels"][1, 3:] = -100
    return data


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


def real(output, data, task):
    """What the output says of what is real: hidden states or logits."""
    found = output.last_hidden_state if task == "base" else output.logits
    if task == "speech-seq2seq":
        return found[data["labels"] != -100]
    if "attention_mask" in data and task != "audio-classification":
        return torch.cat([found[0], found[1, : found.shape[1] // 2]])
    return found


def gradients(model, data, task):
    model.zero_grad(set_to_none=True)
    out = real(model(**data), data, task)
    (out * torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)).mean().backward()
    names = {"parametrizations.weight.original0": "weight_g",
             "parametrizations.weight.original1": "weight_v"}  # fmt: skip
    found = {}
    for name, parameter in model.named_parameters():
        for new, old in names.items():
            name = name.replace(new, old)
        if parameter.grad is not None and parameter.grad.any():
            found[name] = parameter.grad
    return found


def doubled(data):
    return {k: v.double() if v.is_floating_point() else v for k, v in data.items()}


@pytest.mark.parametrize(
    ("family", "case", "task", "padded"),
    PADDED,
    ids=[f"{n}-{i}-{t}{'-padded' * p}" for n, i, t, p in PADDED],
)
def test_outputs_losses_and_gradients_equal_the_peer(pair, family, case, task, padded):
    theirs, ours = pair
    data = sounds(family, case, task, padded)
    wanted, found = theirs(**data), ours(**data)
    exact = copy.deepcopy(theirs).double()
    truth = real(exact(**doubled(data)), data, task)
    noise = relative(real(wanted, data, task), truth)
    assert relative(real(found, data, task), real(wanted, data, task)) < max(1e-5, 3 * noise) < 1e-4
    if task != "base":
        assert relative(found.loss, wanted.loss) < 1e-5
    truth = gradients(exact, doubled(data), task)
    found = gradients(ours.double(), doubled(data), task)
    assert found.keys() == truth.keys()
    least = 1e-9 * max(gradient.norm() for gradient in truth.values())
    for name, gradient in truth.items():
        assert (found[name] - gradient).norm() < 1e-5 * gradient.norm() + least, name


@each_row
def test_what_we_save_loads_in_the_peer(pair, task, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "ours")
    again, info = getattr(transformers, TASKS[task].__name__).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)


def test_each_family_has_its_rows():
    assert {name for name, _, _ in ROWS} == set(NAMES)
    assert set(NAMES) >= {"whisper", "wav2vec2", "hubert"}
    assert all(len(family_of(name).CASES) >= 3 for name in NAMES)


def test_both_spellings_of_the_positional_convolution_and_files_of_other_heads_load(tmp_path):
    theirs = peer("wav2vec2", 0, "ctc")
    theirs.save_pretrained(tmp_path / "new")
    state = load_file(tmp_path / "new" / "model.safetensors")
    new = "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original"
    assert f"{new}0" in state
    old = {
        k.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): v
        for k, v in state.items()
    }
    pretrained = {k: v for k, v in old.items() if not k.startswith("lm_head")}
    pretrained |= {"quantizer.codevectors": torch.ones(3), "project_q.weight": torch.ones(3)}
    bare = {k.removeprefix("wav2vec2."): v for k, v in old.items()}
    data = sounds("wav2vec2", 0, "ctc")
    for name, layout in (("old", old), ("bare", bare), ("pretrained", pretrained)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes((tmp_path / "new" / "config.json").read_bytes())
        save_file(layout, folder / "model.safetensors")
        assert AutoModel.from_pretrained(folder).dtype == torch.float32
        if name == "pretrained":
            with pytest.warns(TopworkWarning, match=r"lm_head\.weight"):
                AutoModelForCTC.from_pretrained(folder)
        else:
            ours = AutoModelForCTC.from_pretrained(folder)
            assert relative(ours(**data).logits, theirs(**data).logits) < 1e-5
    ours.save_pretrained(tmp_path / "ours")
    assert "wav2vec2.encoder.pos_conv_embed.conv.weight_g" in load_file(
        tmp_path / "ours" / "model.safetensors"
    )
    del state["wav2vec2.encoder.layers.1.attention.q_proj.weight"]
    save_file(state, tmp_path / "new" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.q_proj\.weight"):
        AutoModelForCTC.from_pretrained(tmp_path / "new")


def test_a_transcriber_becomes_a_classifier_of_sounds(tmp_path):
    peer("whisper", 0, "speech-seq2seq").save_pretrained(tmp_path)
    with pytest.warns(TopworkWarning, match=r"classifier\.weight"):
        ours = AutoModelForAudioClassification.from_pretrained(tmp_path, num_labels=5)
    assert ours(sounds("whisper", 0, "base")["input_features"]).logits.shape == (2, 5)


def test_padded_sounds_give_what_they_give_alone(tmp_path):
    """Where the convolutions norm by frame; with an adapter too, where the peer lets noise in."""
    for name, changes in (("plain", {}), ("adapter", {"add_adapter": True})):
        peer("wav2vec2", 1, "ctc", **changes).save_pretrained(tmp_path / name)
        ours = AutoModelForCTC.from_pretrained(tmp_path / name)
        torch.manual_seed(1)
        samples, sizes = torch.randn(3, 700), [700, 480, 333]
        mask = torch.stack([torch.arange(700) < n for n in sizes]).long()
        with torch.no_grad():
            both = ours(samples * mask, mask)
            for i, n in enumerate(sizes):
                alone = ours(samples[i : i + 1, :n]).logits[0]
                assert both.sizes[i] == len(alone)
                torch.testing.assert_close(
                    both.logits[i, : len(alone)], alone, rtol=1e-4, atol=1e-4
                )


def test_hidden_frames_are_those_that_are_named_and_training_draws_its_own(tmp_path):
    theirs = peer("wav2vec2", 3, "ctc")
    theirs.save_pretrained(tmp_path)
    ours = AutoModelForCTC.from_pretrained(tmp_path)
    data = sounds("wav2vec2", 3, "ctc")
    hidden = torch.rand(2, ours.wav2vec2.frames(900)) < 0.3
    with torch.no_grad():
        wanted = theirs(**data, mask_time_indices=hidden).logits
        assert relative(ours(**data, mask_time_indices=hidden).logits, wanted) < 1e-5
        assert relative(ours(**data).logits, wanted) > 1e-3
    ours.train()
    assert not torch.equal(ours(**data).logits, ours(**data).logits)


def test_spans_keep_to_their_share_their_size_and_the_length_of_the_row():
    from topwork.nn.spans import Spans

    torch.manual_seed(0)
    spans = Spans(0.5, 4, 1)
    rows = [200] * 50 + [9, 4, 3]
    hidden = spans.draw(rows, 200, "time")
    assert 0.3 < hidden[:50].float().mean() < 0.5  # spans overlap
    assert not hidden[50, 9:].any()
    assert hidden[51].sum() == 4
    assert not hidden[52].any()  # no span fits
    runs = hidden[0].int().diff(prepend=torch.zeros(1), append=torch.zeros(1))
    assert all(b - a >= 4 for a, b in zip((runs == 1).nonzero(), (runs == -1).nonzero()))
    with pytest.raises(ConfigError, match="mask_time_length=4 does not fit the 3 places"):
        spans.draw([3], 3, "time")


@pytest.mark.parametrize("family", ["wav2vec2", "whisper"])
def test_what_acts_in_training_alone_acts(family, tmp_path):
    """Dropout, dropped layers, and what hides parts of a spectrogram, each by itself."""
    task = "audio-classification"
    raw = (
        {"hidden_dropout": 0.3},
        {"activation_dropout": 0.3},
        {"attention_dropout": 0.3},
        {"layerdrop": 0.6},
    )
    raw = (*raw, {"feat_proj_dropout": 0.4}, {"mask_feature_prob": 0.3})
    seen = {"dropout": 0.3}, {"activation_dropout": 0.3}, {"attention_dropout": 0.3}
    seen = (*seen, {"apply_spec_augment": True, "mask_time_prob": 0.2})
    none = {"hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0,
            "mask_time_prob": 0.0}  # fmt: skip
    for i, options in enumerate(({}, *(seen if family == "whisper" else raw))):
        off = none if family != "whisper" else {}
        peer(family, 0, task, **{**off, **options}).save_pretrained(tmp_path / str(i))
        ours = TASKS[task].from_pretrained(tmp_path / str(i))
        data = sounds(family, 0, task)
        assert torch.equal(ours(**data).logits, ours(**data).logits)
        ours.train()
        torch.manual_seed(3)
        same = all(torch.equal(ours(**data).logits, ours(**data).logits) for _ in range(3))
        assert same is (i == 0), options


@pytest.mark.parametrize(("family", "task"), [("wav2vec2", "ctc"), ("whisper", "speech-seq2seq")])
def test_checkpointed_blocks_give_the_same_gradients(family, task, tmp_path):
    none = {"hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0,
            "mask_time_prob": 0.0,
            "final_dropout": 0.0} if family == "wav2vec2" else {}  # fmt: skip
    peer(family, 0, task, **none).save_pretrained(tmp_path)
    ours = TASKS[task].from_pretrained(tmp_path).train()
    data = sounds(family, 0, task)
    wanted = gradients(ours, data, task)
    ours.gradient_checkpointing_enable()
    for name, gradient in gradients(ours, data, task).items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)


@pytest.mark.parametrize(("family", "task"), [("wav2vec2", "ctc"), ("whisper", "speech-seq2seq"),
                                              ("hubert", "audio-classification")])  # fmt: skip
def test_adapters_go_to_peft_and_back(family, task, tmp_path):
    import peft

    theirs = peer(family, 1, task)
    theirs.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "v_proj", "out_proj"]
    config = {"r": 3, "lora_alpha": 5, "target_modules": targets, "init_lora_weights": False}
    ours = get_peft_model(TASKS[task].from_pretrained(tmp_path / "base"), LoraConfig(**config))
    data = sounds(family, 1, task)
    ours.save_pretrained(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours")
    with torch.no_grad():
        wanted = real(loaded(**data), data, task)
        assert relative(real(ours.eval()(**data), data, task), wanted) < 1e-5
    loaded.save_pretrained(tmp_path / "theirs")
    again = topwork.PeftModel.from_pretrained(
        TASKS[task].from_pretrained(tmp_path / "base"), tmp_path / "theirs"
    )
    with torch.no_grad():
        assert relative(real(again(**data), data, task), wanted) < 1e-5
    ours.train()(**data).loss.backward()
    trained = [n for n, p in ours.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("family", NAMES)
def test_adapters_know_where_they_usually_go(family):
    task = "speech-seq2seq" if family == "whisper" else "ctc"
    sizes = SIZES.get(family, RAW)
    model = get_peft_model(
        TASKS[task].from_config(Config(model_type=family, **sizes)), LoraConfig(r=2)
    )
    adapted = {n.split(".lora_")[0].rsplit(".", 1)[1] for n in model.state_dict() if "lora_" in n}
    assert adapted == {"q_proj", "v_proj"}


def test_a_model_from_scratch_begins_with_sane_values():
    config = Config(model_type="wav2vec2", **{**RAW, "conv_dim": [16, 24, 16]})
    torch.manual_seed(0)
    model = AutoModelForCTC.from_config(config)
    conv = model.wav2vec2.encoder.pos_conv_embed.conv
    torch.testing.assert_close(conv.weight, conv.weight_v)
    logits = model(torch.randn(1, 900)).logits
    assert torch.isfinite(logits).all()
    model.freeze_feature_encoder()
    model(torch.randn(1, 900), labels=torch.tensor([[1, 2]])).loss.backward()
    assert all(p.grad is None for p in model.wav2vec2.feature_extractor.parameters())
    assert model.wav2vec2.encoder.layers[0].attention.q_proj.weight.grad is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "wav2vec2", "feat_extract_norm": "batch"}, "feat_extract_norm='batch'"),
        ({"model_type": "wav2vec2", "conv_stride": [2, 2]}, "3, 3 and 2"),
        ({"model_type": "wav2vec2", "adapter_attn_dim": 4}, "do_stable_layer_norm"),
        ({"model_type": "wav2vec2", "num_attention_heads": 5}, "num_attention_heads=5"),
        ({"model_type": "hubert", "conv_pos_batch_norm": True}, "conv_pos_batch_norm=True"),
        ({"model_type": "wav2vec2", "a_new_option": 3}, "a_new_option=3"),
        ({"model_type": "whisper", "encoder_layerdrop": 0.1}, "encoder_layerdrop=0.1"),
        ({"model_type": "whisper", "encoder_attention_heads": 5}, "encoder_attention_heads=5"),
        ({"model_type": "wav2vec2", "add_adapter": True, "classify": 1}, "add_adapter=True"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused(changes, words):
    kind = changes["model_type"]
    task = "audio-classification" if changes.pop("classify", 0) or kind == "whisper" else "ctc"
    with pytest.raises(ConfigError, match=words):
        TASKS[task].from_config(Config(**{**SIZES.get(kind, RAW), **changes}))


def test_bad_sounds_say_what_is_wrong(tmp_path):
    model = AutoModelForCTC.from_config(Config(model_type="wav2vec2", **RAW))
    samples, mask = torch.randn(2, 300), torch.ones(2, 300)
    with pytest.raises(ConfigError, match=r"row 0 has 5 samples, too few"):
        model(samples[:, :5])
    mask[1, 7:] = 0
    with pytest.raises(ConfigError, match="row 1 has 7 samples"):
        model(samples, mask)
    with pytest.raises(ConfigError, match="padded on the left"):
        model(samples, mask.flip(1))
    with pytest.raises(ConfigError, match="mix channels"):
        model(torch.randn(2, 2, 300))
    with pytest.raises(ConfigError, match="a label is 23: the model has 23 letters"):
        model(samples, labels=torch.tensor([[23], [1]]))
    writer = AutoModelForSpeechSeq2Seq.from_config(Config(model_type="whisper", **WHISPER))
    with pytest.raises(ConfigError, match=r"\[batch, 12, 40\], got \[1, 12, 30\]"):
        writer(torch.randn(1, 12, 30), labels=torch.tensor([[1]]))
    with pytest.raises(ConfigError, match="input_features"):
        writer(labels=torch.tensor([[1]]))
    with pytest.raises(ConfigError, match="no model for ctc"):
        AutoModelForCTC.from_config(Config(model_type="whisper", **WHISPER))
