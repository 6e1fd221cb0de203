"""Every text encoder against transformers (eager): option by option, head by head."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from topwork import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Config,
)
from topwork.errors import CheckpointError, ConfigError, TopworkWarning
from topwork.models.auto import tasks_of
from topwork.models.families import NAMES as ALL
from topwork.models.families import family as family_of

NAMES = [name for name in ALL if "masked-lm" in tasks_of(name)]
TASKS = {
    "base": AutoModel,
    "masked-lm": AutoModelForMaskedLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "multiple-choice": AutoModelForMultipleChoice,
}
BASE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
# Where a family names its sizes otherwise, or needs more.
SIZES = {
    "distilbert": {"vocab_size": 61, "dim": 48, "hidden_dim": 56, "n_layers": 2, "n_heads": 4,
                   "max_position_embeddings": 40},
    "modernbert": {**BASE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                   "cls_token_id": 3, "sep_token_id": 4},
}  # fmt: skip
ROWS = [
    (name, i, task)
    for name in NAMES
    for i in range(len(family_of(name).CASES))
    for task in TASKS
    # Families that share their code to the letter need each head once.
    if i == 0 or name not in ("xlm_roberta", "camembert") or task == "base"
]
each_row = pytest.mark.parametrize(
    ("family", "case", "task"), ROWS, ids=[f"{n}-{i}-{t}" for n, i, t in ROWS]
)
each_family = pytest.mark.parametrize("family", NAMES)


def peer(family, case, task, **changes):
    """The peer's model with every parameter random."""
    options = {**SIZES.get(family, BASE), **json.loads(json.dumps(family_of(family).CASES[case]))}
    labels = 2 if task == "question-answering" else 3
    config = transformers.AutoConfig.for_model(
        family.replace("_", "-"), **{**options, "num_labels": labels, **changes}
    )
    torch.manual_seed(0)
    maker = getattr(transformers, TASKS[task].__name__)
    model = maker.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.5))
    return model


def inputs(task, **changes):
    """Two rows of ids, all real, with what the task is trained on."""
    torch.manual_seed(1)
    shape = (2, 3, 13) if task == "multiple-choice" else (2, 23)
    ids = torch.randint(8, 61, shape)
    labels = {
        "masked-lm": {"labels": ids.masked_fill(torch.rand(ids.shape) < 0.7, -100)},
        "sequence-classification": {"labels": torch.tensor([2, 0])},
        "token-classification": {"labels": torch.randint(0, 3, shape)},
        "question-answering": {
            "start_positions": torch.tensor([3, 40]),
            "end_positions": torch.tensor([5, 22]),
        },
        "multiple-choice": {"labels": torch.tensor([2, 1])},
    }
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **labels.get(task, {})}


def found_in(output, task):
    names = {
        "base": ("last_hidden_state", "pooler_output"),
        "question-answering": ("start_logits", "end_logits"),
    }.get(task, ("logits",))
    return {name: getattr(output, name, None) for name in names}


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


def gradients(model, task):
    """Of a fixed mix of all outputs, by name; those that are not zero."""
    model.zero_grad(set_to_none=True)
    outputs = [v for v in found_in(model(**inputs(task)), task).values() if v is not None]
    mixes = [(v * torch.arange(v.numel(), dtype=v.dtype).cos().view_as(v)).mean() for v in outputs]
    sum(mixes).backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.grad is not None and parameter.grad.any()
    }


@each_row
def test_outputs_and_gradients_equal_the_peer(family, case, task, tmp_path):
    """To 1e-5 in single precision, or as near as the peer's own rounding lets it be; in double
    each gradient by itself, for some are so small beside the terms that cancel in them that single
    precision leaves nothing to compare."""
    theirs = peer(family, case, task)
    theirs.save_pretrained(tmp_path)
    ours = TASKS[task].from_pretrained(tmp_path)
    exact = copy.deepcopy(theirs).double()
    wanted, found, truth = (model(**inputs(task)) for model in (theirs, ours, exact))
    for name, value in found_in(wanted, task).items():
        if value is not None:
            limit = max(1e-5, 3 * relative(value, getattr(truth, name)))
            assert relative(getattr(found, name), value) < limit < 3e-4, name
    if task != "base":
        assert relative(found.loss, wanted.loss) < 1e-5
    truth = gradients(exact, task)
    wanted, found = gradients(theirs, task), gradients(ours, task)
    together = [torch.cat([g[n].flatten() for n in wanted]) for g in (found, wanted, truth)]
    limit = max(1e-5, 3 * relative(together[1], together[2]))
    assert relative(*together[:2]) < limit < 3e-4
    found = gradients(ours.double(), task)
    noise = 1e-10 * max(gradient.norm() for gradient in truth.values())
    zero = torch.zeros(())
    for name in truth.keys() | (found.keys() - ours.tied.keys()):
        pair = [grads.get(name, zero) for grads in (found, truth)]
        assert (pair[0] - pair[1]).norm() < 1e-5 * pair[1].norm() + noise, name


@each_row
def test_what_we_save_loads_in_the_peer(family, case, task, tmp_path):
    theirs = peer(family, case, task)
    theirs.save_pretrained(tmp_path / "theirs")
    TASKS[task].from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    again, info = getattr(transformers, TASKS[task].__name__).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@each_family
def test_padded_rows_packed_rows_and_rows_alone_agree(family, tmp_path):
    for case in range(len(family_of(family).CASES)):
        theirs = peer(family, case, "token-classification")
        theirs.save_pretrained(tmp_path / str(case))
        ours = AutoModelForTokenClassification.from_pretrained(tmp_path / str(case))
        ids, sizes = torch.randint(8, 61, (4, 17)), [17, 9, 9, 2]
        mask = torch.zeros_like(ids)
        for i, n in enumerate(sizes):
            mask[i, :n] = 1
        with torch.no_grad():
            alone = [ours(ids[i : i + 1, :n]).logits[0] for i, n in enumerate(sizes)]
            packed = ours(ids[mask.bool()][None], lengths=tuple(sizes)).logits[0]
            padded = ours(ids, attention_mask=mask).logits
            wanted = theirs(ids.masked_fill(mask == 0, theirs.config.pad_token_id or 0), mask)
        torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(padded[mask.bool()], packed, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(wanted.logits[mask.bool()], packed, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("task", ["sequence-classification", "question-answering"])
@each_family
def test_packed_texts_give_the_labels_and_losses_of_each_text(family, task, tmp_path):
    peer(family, 1, task).save_pretrained(tmp_path)
    ours = TASKS[task].from_pretrained(tmp_path)
    ids, sizes = torch.randint(8, 61, (1, 21)), (10, 7, 4)
    texts = ids.split(sizes, 1)
    if task == "question-answering":
        where = {
            "start_positions": torch.tensor([9, 1, 0]),
            "end_positions": torch.tensor([9, 3, 7]),
        }
        alone = [
            ours(t, **{k: v[i : i + 1] for k, v in where.items()}).loss for i, t in enumerate(texts)
        ]
        found = ours(ids, lengths=sizes, **where).loss
        start = ours(ids, lengths=sizes, start_positions=where["start_positions"],
                     end_positions=torch.tensor([9, 3, 99])).loss  # fmt: skip
        torch.testing.assert_close(found, start)  # the last end lies outside of its text
        ends = [(2 * alone[2]) if i == 2 else alone[i] for i in range(3)]
        assert all(torch.isfinite(e) or i == 2 for i, e in enumerate(ends))
    else:
        alone = torch.cat([ours(t).logits for t in texts])
        torch.testing.assert_close(ours(ids, lengths=sizes).logits, alone, rtol=1e-4, atol=1e-5)


@each_family
def test_the_old_layouts_load_the_same(family, tmp_path):
    """TensorFlow's gamma and beta, files without the prefix, and files of another head."""
    theirs = peer(family, 0, "masked-lm")
    theirs.save_pretrained(tmp_path / "new")
    state = load_file(tmp_path / "new" / "model.safetensors")
    prefix = theirs.base_model_prefix + "."
    old = {
        k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v
        for k, v in state.items()
    }
    old[f"{prefix}embeddings.position_ids"] = torch.arange(40)[None]
    bare = {k.removeprefix(prefix): v for k, v in old.items()}
    ids = torch.randint(8, 61, (1, 20))
    with torch.no_grad():
        hidden = getattr(theirs, theirs.base_model_prefix)(ids).last_hidden_state
        for name, layout in (("old", old), ("bare", bare)):
            folder = tmp_path / name
            folder.mkdir()
            (folder / "config.json").write_bytes((tmp_path / "new" / "config.json").read_bytes())
            save_file(layout, folder / "model.safetensors")
            ours = AutoModelForMaskedLM.from_pretrained(folder)
            assert relative(ours(ids).logits, theirs(ids).logits) < 1e-5
            with _fresh(ours.trunk.spec.pooler):
                base = AutoModel.from_pretrained(folder)
            assert relative(base(ids).last_hidden_state, hidden) < 1e-5
            with pytest.warns(TopworkWarning, match="classifier"):
                headed = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5)
            assert headed(ids).logits.shape == (1, 5)


def _fresh(pooler):
    import contextlib

    return pytest.warns(TopworkWarning, match="pooler") if pooler else contextlib.nullcontext()


@each_family
def test_a_lost_tensor_of_the_encoder_is_an_error(family, tmp_path):
    peer(family, 0, "base").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(k for k in state if "layer" in k and k.endswith("weight"))
    save_file({k: v for k, v in state.items() if k != lost}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"missing: .*{lost}"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", None])
def test_losses_of_values_and_of_several_labels_equal_the_peer(problem, tmp_path):
    labels = 1 if problem is None else 3
    theirs = peer("bert", 0, "sequence-classification", num_labels=labels, problem_type=problem)
    theirs.save_pretrained(tmp_path)
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = {**inputs("base"), "labels": torch.rand(2, labels)}
    assert relative(ours(**batch).loss, theirs(**batch).loss) < 1e-5


def test_token_types_and_given_positions_count(tmp_path):
    for family in ("bert", "roberta", "albert", "electra"):
        theirs = peer(family, 1, "base")
        theirs.save_pretrained(tmp_path / family)
        ours = AutoModel.from_pretrained(tmp_path / family)
        ids = torch.randint(8, 61, (2, 9))
        types = torch.randint(0, theirs.config.type_vocab_size, (2, 9))
        positions = torch.randint(0, 40, (2, 9))
        wanted = theirs(ids, token_type_ids=types, position_ids=positions).last_hidden_state
        found = ours(ids, token_type_ids=types, position_ids=positions).last_hidden_state
        assert relative(found, wanted) < 1e-5
        embedded = ours.get_input_embeddings()(ids)
        again = ours(inputs_embeds=embedded, token_type_ids=types, position_ids=positions)
        assert torch.equal(again.last_hidden_state, found)


def test_dropout_acts_in_training_alone(tmp_path):
    for family in ("bert", "distilbert", "deberta_v2"):
        peer(family, 0, "sequence-classification").save_pretrained(tmp_path / family)
        ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / family)
        ids = torch.randint(8, 61, (2, 9))
        assert torch.equal(ours(ids).logits, ours(ids).logits)
        ours.train()
        assert not torch.equal(ours(ids).logits, ours(ids).logits)


@each_family
def test_checkpointed_blocks_give_the_same_gradients(family, tmp_path):
    """With the same masks of dropout, drawn again."""
    peer(family, 0, "sequence-classification").save_pretrained(tmp_path)
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path).train()
    batch = inputs("sequence-classification")
    torch.manual_seed(2)
    ours(**batch).loss.backward()
    wanted = {n: p.grad for n, p in ours.named_parameters()}
    ours.zero_grad(set_to_none=True)
    ours.gradient_checkpointing_enable()
    torch.manual_seed(2)
    ours(**batch).loss.backward()
    for name, parameter in ours.named_parameters():
        if wanted[name] is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], msg=name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"hidden_act": "gelo"}, "nearest: 'gelu'"),
        ({"model_type": "mpnet", "relative_attention_num_buckets": 16}, "buckets=16"),
        ({"model_type": "deberta-v2", "pos_att_type": "c2p|p2p"}, "pos_att_type"),
        ({"model_type": "electra", "summary_type": "mean"}, "summary_type='mean'"),
        ({"model_type": "modernbert", "classifier_pooling": "max"}, "classifier_pooling='max'"),
        ({"model_type": "modernbert", "layer_types": ["full_attention"]}, "layer_types"),
        ({"a_new_option": 3}, "a_new_option=3"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        AutoModel.from_config(Config(**{"model_type": "bert", **BASE, **changes}))


def test_bad_calls_say_what_is_wrong():
    torch.manual_seed(0)
    bert = AutoModelForSequenceClassification.from_config(Config(model_type="bert", **BASE)).eval()
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    with pytest.raises(ConfigError, match="row 1"):
        bert(torch.zeros(2, 3, dtype=torch.long), attention_mask=mask)
    with pytest.raises(ConfigError, match="truncation=True, max_length=40"):
        bert(torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(ConfigError, match="sum to"):
        bert(torch.zeros(1, 5, dtype=torch.long), lengths=(2, 2))
    distil = AutoModel.from_config(Config(model_type="distilbert", vocab_size=61))
    with pytest.raises(ConfigError, match="token_type_ids"):
        distil(torch.ones(1, 4, dtype=torch.long), token_type_ids=torch.ones(1, 4).long())
    with pytest.raises(ConfigError, match="causal-lm"):
        AutoModelForCausalLM.from_config(Config(model_type="bert", **BASE))


def test_each_family_has_its_rows():
    assert {name for name, _, _ in ROWS} == set(NAMES)
    assert all(len(family_of(name).CASES) >= 3 for name in NAMES)
