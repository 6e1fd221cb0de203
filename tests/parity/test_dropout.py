"""In training every family drops where the peer drops, at the rates of its configuration.

The masks of the two are drawn by different generators, so both get a dropout without chance in its
place: a function of the value and the rate. Where it acts, and at which rate, then shows in the
outputs to the last digit.
"""

from __future__ import annotations

import importlib
import json

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

import topwork
from topwork.models.auto import tasks_of
from topwork.models.families import NAMES as ALL
from topwork.models.families import family as family_of

CAUSAL = {"vocab_size": 61, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip
SIZES = {
    "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 5,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
ENCODER = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2,
           "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
DISTILBERT = {"vocab_size": 61, "dim": 48, "hidden_dim": 56, "n_layers": 2, "n_heads": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 3,
           "sep_token_id": 4}  # fmt: skip
BART = {
    "vocab_size": 61, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 56, "max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {"vocab_size": 61, "d_model": 48, "d_kv": 12, "d_ff": 56, "num_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 0, "pad_token_id": 1}  # fmt: skip
TRUNKS = ("causal-lm", "masked-lm", "seq2seq-lm")
TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}


def rates_of(name):
    """Each rate of the peer's configuration, all of them different."""
    config = transformers.AutoConfig.for_model(kind_of(name))
    keys = [k for k in config.to_dict() if "drop" in k]
    return {key: round(0.2 + 0.07 * i, 2) for i, key in enumerate(sorted(keys))}


def kind_of(name):
    """The peer writes some model types with hyphens."""
    return name.replace("_", "-") if name in ("deberta_v2", "xlm_roberta") else name


def peer_has(name, task):
    table = f"MODEL_FOR_{task.upper().replace('-', '_')}_MAPPING_NAMES"
    tables = {"causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"}
    return kind_of(name) in getattr(
        modeling_auto, tables.get(task, table).replace("SEQ2SEQ_LM", "SEQ_TO_SEQ_CAUSAL_LM")
    )


NAMES = [name for name in ALL if set(TASKS) & set(tasks_of(name)) and rates_of(name)]
ROWS = [
    (name, task, i)
    for name in NAMES
    for task in TASKS
    if task in tasks_of(name) and peer_has(name, task)
    for i, case in enumerate(family_of(name).CASES)
    # A head needs one case, as does the decoder that many share. With ALiBi the peer's eager Falcon
    # is wrong, and its other path draws its own masks.
    if i == 0 or (task in TRUNKS and not hasattr(family_of(name), "spec"))
    if not case.get("alibi")
]


def stand_in(x, p=0.5, training=True, inplace=False):
    """Dropout without chance: nothing commutes with it, and what is zero stays zero."""
    return x + p * torch.sin(3 * x) if training else x


@pytest.fixture
def certain(monkeypatch):
    """Both sides drop without chance."""
    monkeypatch.setattr(torch.nn.functional, "dropout", stand_in)
    for op in ("attention", "disentangled"):
        home = importlib.import_module(f"topwork.ops.{op}")
        monkeypatch.setattr(home, "dropped", lambda x, rate, seed: stand_in(x, rate))
        monkeypatch.setattr(home, "new_seed", lambda: 0)  # drawn from the generator of the layers


def sizes_of(name):
    if "seq2seq-lm" in tasks_of(name):
        return T5 if name in ("t5", "mt5") else BART
    if "causal-lm" in tasks_of(name):
        return {**CAUSAL, **getattr(family_of(name), "TINY", SIZES)}
    return {"distilbert": DISTILBERT, "modernbert": {**ENCODER, **SPECIAL}}.get(name, ENCODER)


def pair(name, task, case, folder):
    """The peer's model, random everywhere, and ours with the same weights, both in training."""
    options = {**sizes_of(name), **json.loads(json.dumps(case))}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind_of(name), **{**options, **rates_of(name)})
    if name == "mpt":  # the peer's own check takes this rate for a whole number
        vars(config.attn_config)["attn_pdrop"] = 0.3
    theirs = getattr(transformers, TASKS[task]).from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                size = 0.1 if parameter.dim() > 1 else 0.5
                parameter.copy_(torch.randn_like(parameter) * size)
    theirs.save_pretrained(folder)
    return theirs.train(), getattr(topwork, TASKS[task]).from_pretrained(folder).train()


def outputs(model, task, seed):
    """Of two rows; the seed draws which layers are left out."""
    ids = torch.randint(8, 50, (2, 19), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 2  # the end, which some heads look for
    labels = {"labels": ids[:, :11].contiguous()} if task == "seq2seq-lm" else {}
    torch.manual_seed(seed)
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), **labels)
    return found.start_logits if task == "question-answering" else found.logits


@pytest.mark.parametrize(("name", "task", "i"), ROWS, ids=["-".join(map(str, row)) for row in ROWS])
def test_dropout_acts_where_the_peers_does(name, task, i, tmp_path, certain):
    theirs, ours = pair(name, task, family_of(name).CASES[i], tmp_path)
    with torch.no_grad():
        for seed in range(3 if any("layer" in key for key in rates_of(name)) else 1):
            wanted, found = (outputs(model, task, seed) for model in (theirs, ours))
            assert ((found - wanted).norm() / wanted.norm()).item() < 1e-5
        plain = outputs(ours.eval(), task, seed)
    assert ((plain - wanted).norm() / wanted.norm()).item() > 5e-5
