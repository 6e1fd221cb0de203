"""Virtual tokens and trained heads by task against peft, on transformers' models and on ours."""

from __future__ import annotations

import pytest
import torch
import transformers

import peft
import topwork
import topwork.errors
from parity.bases import close, randomise
from topwork.errors import ConfigError
from topwork.peft import PeftModel, get_peft_model

N = 3
SIZES = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
FAMILIES = {
    "bert": SIZES, "roberta": {**SIZES, "pad_token_id": 1},
    "distilbert": {"vocab_size": 61, "dim": 24, "hidden_dim": 30, "n_layers": 2, "n_heads": 2,
                   "max_position_embeddings": 40},
    "modernbert": {**{k: v for k, v in SIZES.items() if "dropout" not in k},
                   "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                   "cls_token_id": 3, "sep_token_id": 4},
    "deberta-v2": SIZES, "electra": SIZES,
    "t5": {"vocab_size": 61, "d_model": 24, "d_kv": 12, "d_ff": 30, "num_layers": 2,
           "num_heads": 2, "decoder_start_token_id": 0},
    "bart": {"vocab_size": 61, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 30,
             "decoder_ffn_dim": 30, "max_position_embeddings": 40, "pad_token_id": 1,
             "eos_token_id": 2, "bos_token_id": 0, "decoder_start_token_id": 2,
             "scale_embedding": True, "forced_eos_token_id": None},
}  # fmt: skip
TARGETS = {"distilbert": ["q_lin", "v_lin"], "modernbert": ["Wqkv", "Wi"],
           "deberta-v2": ["query_proj", "value_proj"]}  # fmt: skip
AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
PROMPTS = [
    ("PromptTuningConfig", {}),
    ("PromptEncoderConfig", {"encoder_hidden_size": 10}),
    ("PrefixTuningConfig", {}),
    ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 7}),
    ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
]
torch.manual_seed(1)
IDS = torch.randint(5, 61, (2, 11))
MASK = torch.ones_like(IDS)
MASK[1, -4:] = 0
ANSWERS = torch.randint(5, 61, (2, 7))
ANSWERS[0, -2:] = -100


def bare(family, task, library, folder):
    """The same random model of transformers, or of ours."""
    folder = folder / f"{family}-{task}"
    if not folder.exists():
        labels = 2 if task == "QUESTION_ANS" else 3
        config = transformers.AutoConfig.for_model(family, **FAMILIES[family], num_labels=labels)
        torch.manual_seed(0)
        made = getattr(transformers, AUTO[task]).from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in made.parameters():
                size = 0.2 if parameter.dim() > 1 else 0.5
                parameter.copy_(torch.randn_like(parameter) * size)
        made.save_pretrained(folder)
    options = {"attn_implementation": "eager"} if library is transformers else {}
    return getattr(library, AUTO[task]).from_pretrained(folder, **options).eval()


def config(library, name, task, options):
    return getattr(library, name)(task_type=task, num_virtual_tokens=N, **options)


def extra(name):
    return {"task_ids": torch.tensor([2, 0])} if name.startswith("Multitask") else {}


def shown(output, task, tokens):
    """What an output says of the given tokens, or of each text."""
    if task == "QUESTION_ANS":
        return torch.stack([output.start_logits, output.end_logits], -1)[:, -tokens:]
    if task == "FEATURE_EXTRACTION":
        return output.last_hidden_state[:, -tokens:]
    return output.logits if task == "SEQ_CLS" else output.logits[:, -tokens:]


@pytest.mark.parametrize(("name", "options"), PROMPTS)
@pytest.mark.parametrize("task", [t for t in AUTO if t != "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_virtual_tokens_before_an_encoder_equal_the_peers(family, task, name, options, tmp_path):
    if name.startswith("Multitask") and task in ("TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"):
        return  # the peer hands task_ids on to the model there
    theirs = peft.get_peft_model(
        bare(family, task, transformers, tmp_path), config(peft, name, task, options)
    )
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(bare(family, task, topwork, tmp_path), tmp_path / "theirs")
    call = {"input_ids": IDS, "attention_mask": MASK}
    with torch.no_grad():
        wanted, found = theirs(**call, **extra(name)), ours(**call, **extra(name))
        lengths = (11, 7)
        packed = ours(IDS[MASK.bool()][None], lengths=lengths, **extra(name))
    real = slice(None) if task == "SEQ_CLS" else MASK.bool()
    close(shown(found, task, 11)[real], shown(wanted, task, 11)[real], rtol=1e-4)
    packed = shown(packed, task, 18)
    close(packed if task == "SEQ_CLS" else packed[0], shown(found, task, 11)[real], rtol=1e-4)
    fresh = get_peft_model(
        bare(family, task, topwork, tmp_path), config(topwork, name, task, options)
    ).eval()
    randomise(fresh)
    fresh.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(
        bare(family, task, transformers, tmp_path), tmp_path / "ours"
    )
    with torch.no_grad():
        wanted, found = again(**call, **extra(name)), fresh(**call, **extra(name))
    close(shown(found, task, 11)[real], shown(wanted, task, 11)[real], rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), PROMPTS)
@pytest.mark.parametrize("on", ["theirs", "ours"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_virtual_tokens_of_an_encoder_decoder_equal_the_peers(family, name, options, on, tmp_path):
    task = "SEQ_2_SEQ_LM"
    theirs = peft.get_peft_model(
        bare(family, task, transformers, tmp_path), config(peft, name, task, options)
    ).eval()
    randomise(theirs)
    library = topwork if on == "ours" else transformers
    ours = get_peft_model(
        bare(family, task, library, tmp_path), config(topwork, name, task, options)
    ).eval()
    source, target = (m.prompt_encoder["default"].state_dict() for m in (theirs, ours))
    with torch.no_grad():
        for key, value in source.items():
            target[key].copy_(value)
    call = {"input_ids": IDS, "attention_mask": MASK, "labels": ANSWERS}
    wanted, found = theirs(**call, **extra(name)), ours(**call, **extra(name))
    real = ANSWERS != -100
    close(found.logits[real], wanted.logits[:, -7:][real], rtol=1e-4)
    close(found.loss, wanted.loss, rtol=1e-4)
    wanted.loss.backward()
    found.loss.backward()
    peers = dict(theirs.prompt_encoder.named_parameters())
    for key, parameter in ours.prompt_encoder.named_parameters():
        close(parameter.grad, peers[key].grad, rtol=1e-3)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(
        bare(family, task, transformers, tmp_path), tmp_path / "ours"
    )
    with torch.no_grad():
        close(again(**call, **extra(name)).loss, wanted.loss, rtol=1e-4)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    # The peer's prefix does not go with beams.
    for more in ({},) if name.startswith("Prefix") else ({}, beams):
        options = {"max_length": 9, "do_sample": False, **more}
        prompts = {"input_ids": IDS, "attention_mask": MASK, **extra(name)}
        assert written(ours.generate(**prompts, **options)) == (
            written(theirs.generate(**prompts, **options))
        )
    if name.startswith("Prefix") and on == "ours":  # one beam of several is the greedy answer
        again = ours.generate(**prompts, max_length=9, num_beams=3, num_return_sequences=3)
        assert len(again) == 6


def written(rows):
    """The answers up to their ends."""
    ends = {1, 2}
    return [
        row[: next((i for i, t in enumerate(row) if i and t in ends), len(row))]
        for row in rows.tolist()
    ]


@pytest.mark.parametrize("task", [t for t in AUTO if t != "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize(
    "family", ["bert", "roberta", "distilbert", "modernbert", "deberta-v2", "electra"]
)
def test_lora_and_the_heads_of_a_task_pass_both_ways(family, task, tmp_path):
    if (family, task) == ("modernbert", "QUESTION_ANS"):
        with pytest.warns(topwork.errors.TopworkWarning, match="name it in modules_to_save"):
            get_peft_model(bare(family, task, topwork, tmp_path), topwork.LoraConfig(
                task_type=task, target_modules=["Wqkv"]))  # fmt: skip
        return
    options = {"task_type": task, "r": 4, "target_modules": TARGETS.get(family, ["query", "value"])}
    theirs = peft.get_peft_model(
        bare(family, task, transformers, tmp_path), peft.LoraConfig(**options)
    )
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(
        bare(family, task, topwork, tmp_path), tmp_path / "theirs", is_trainable=True
    )
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == (
        {n for n, p in theirs.named_parameters() if p.requires_grad}
    )
    with torch.no_grad():
        close(shown(ours(IDS), task, 11), shown(theirs(IDS), task, 11), rtol=1e-4)
        fresh = get_peft_model(
            bare(family, task, topwork, tmp_path), topwork.LoraConfig(**options)
        ).eval()
        randomise(fresh)
        fresh.save_pretrained(tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(
            bare(family, task, transformers, tmp_path), tmp_path / "ours"
        )
        close(shown(fresh(IDS), task, 11), shown(again(IDS), task, 11), rtol=1e-4)


def test_a_prefix_is_refused_where_it_cannot_stand(tmp_path):
    for family in ("deberta-v2", "modernbert"):
        ours = get_peft_model(
            bare(family, "SEQ_CLS", topwork, tmp_path),
            topwork.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
        )
        with pytest.raises(ConfigError, match="a prefix does not go to"):
            ours(IDS)
