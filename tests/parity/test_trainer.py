"""Our Trainer against transformers': losses, norms and predictions, step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset

import tiny
import topwork
from topwork import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

BERT = {
    "vocab_size": 259, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
T5 = {
    "vocab_size": 259, "d_model": 24, "d_kv": 12, "d_ff": 32, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0, "dropout_rate": 0.0, "eos_token_id": 2,
}  # fmt: skip
LLAMA = {
    "vocab_size": 259, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
TASKS = {
    "classes": ("bert", BERT, "AutoModelForSequenceClassification"),
    "values": ("bert", {**BERT, "num_labels": 1}, "AutoModelForSequenceClassification"),
    "several": ("bert", BERT, "AutoModelForSequenceClassification"),
    "tags": ("bert", BERT, "AutoModelForTokenClassification"),
    "answers": ("bert", {**BERT, "num_labels": 2}, "AutoModelForQuestionAnswering"),
    "words": ("bert", BERT, "AutoModelForMaskedLM"),
    "decoder": ("llama", LLAMA, "AutoModelForSequenceClassification"),
    "causal": ("llama", LLAMA, "AutoModelForCausalLM"),
    "texts": ("t5", T5, "AutoModelForSeq2SeqLM"),
}


def rows(task, count=8):
    random = np.random.default_rng(0)
    made = []
    for i in range(count):
        size = int(random.integers(4, 20))
        if task == "answers":  # the peer's softmax runs over padding, too
            size = 12
        ids = random.integers(3, 250, size).tolist()
        row = {"input_ids": ids, "attention_mask": [1] * size, "text": f"row {i}"}
        tags = [int(t) for t in random.integers(0, 3, size)]
        tags[0] = -100
        start = int(random.integers(0, size))
        extra = {
            "classes": {"label": i % 3}, "decoder": {"label": i % 3},
            "values": {"label": float(i) / 3}, "several": {"label": [1.0, i % 2, 0.0]},
            "tags": {"labels": tags},
            "answers": {"start_positions": start, "end_positions": min(size - 1, start + 2)},
            "words": {"labels": [t if j % 3 else -100 for j, t in enumerate(ids)]},
            "causal": {"labels": [-100, *ids[1:]]},
            "texts": {"labels": [*random.integers(3, 250, size // 2).tolist(), 2]},
        }[task]  # fmt: skip
        made.append({**row, **extra})
    return made


def pair(task, folder):
    """The peer's model with random norms and biases too, and ours of its files."""
    family, options, name = TASKS[task]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **options)
    theirs = getattr(transformers, name).from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.5))
    theirs.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    return theirs, getattr(topwork, name).from_pretrained(folder / "base"), tokenizer


COMMON = {
    "learning_rate": 1e-2, "max_steps": 5, "logging_steps": 1, "warmup_steps": 1,
    "max_grad_norm": 0.5, "weight_decay": 0.1, "seed": 0, "per_device_eval_batch_size": 3,
    "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


def collator(task, tokenizer):
    if task in ("tags", "words", "causal"):
        return transformers.DataCollatorForTokenClassification(tokenizer)
    if task == "texts":
        return transformers.DataCollatorForSeq2Seq(tokenizer)
    return transformers.DataCollatorWithPadding(tokenizer)


def trainers(task, folder, micro=2, accumulation=1, metrics=None, seq2seq=None):
    theirs, model, tokenizer = pair(task, folder)
    common = {**COMMON, "per_device_train_batch_size": micro,
              "gradient_accumulation_steps": accumulation, **(seq2seq or {})}  # fmt: skip
    plain = (Trainer, TrainingArguments)
    ours, args = (Seq2SeqTrainer, Seq2SeqTrainingArguments) if seq2seq else plain
    run = ours(
        model, args(output_dir=str(folder / "ours"), shuffle=False, use_cpu=True, **common),
        train_dataset=rows(task), eval_dataset=rows(task, 7), processing_class=tiny.tokenizer(),
        compute_metrics=metrics,
    )  # fmt: skip
    names = ("Seq2SeqTrainer", "Seq2SeqTrainingArguments")
    kind, peer_args = (getattr(transformers, n.removeprefix("" if seq2seq else "Seq2Seq"))
                       for n in names)  # fmt: skip
    peer = kind(
        theirs,
        peer_args(output_dir=str(folder / "theirs"), use_cpu=True, bf16=False, report_to="none",
                  train_sampling_strategy="sequential", remove_unused_columns=True, **common),
        data_collator=collator(task, tokenizer),
        train_dataset=Dataset.from_list(rows(task)), eval_dataset=Dataset.from_list(rows(task, 7)),
        processing_class=tokenizer, compute_metrics=metrics,
    )  # fmt: skip
    return run, peer


def curve(run, key):
    return [float(e[key]) for e in run.state.log_history if key in e]


@pytest.mark.parametrize("task", TASKS)
def test_losses_and_predictions_equal_the_peer(tmp_path, task):
    kept = []

    def metrics(found):
        predictions, labels = found
        kept.append((predictions, labels))
        first = predictions[0] if isinstance(predictions, tuple) else predictions
        return {"mean": np.where(first == -100, 0, first).mean()}

    run, peer = trainers(task, tmp_path, metrics=metrics)
    run.train()
    peer.train()
    for key in ("loss", "grad_norm", "learning_rate"):
        close = 1e-5 if key == "loss" else 1e-4
        assert curve(run, key) == pytest.approx(curve(peer, key), rel=close, abs=1e-9), key
    ours, theirs = run.evaluate(), peer.evaluate()
    if task not in ("tags", "words", "causal", "texts"):  # the peer weighs short batches alike
        assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-4)
    assert {"eval_mean", "eval_runtime"} <= set(ours)
    (found, labels), (wanted, wanted_labels) = kept
    if task == "texts":  # it also returns the encoder's states
        wanted = wanted[0]
    for mine, other in zip(both(found), both(wanted), strict=True):
        assert mine.shape == other.shape
        if task == "answers":  # the bias moves all logits alike, and no gradient but noise moves it
            mine, other = mine - mine.mean(), other - other.mean()
        real = mine != (0 if task == "texts" else -100)  # beside rows the peer computes padding
        np.testing.assert_allclose(mine[real], other[real], rtol=1e-3, atol=1e-4)
    for mine, other in zip(both(labels), both(wanted_labels), strict=True):
        np.testing.assert_array_equal(mine, other)


def both(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("task", ["classes", "tags", "answers"])
def test_the_cut_of_a_step_changes_nothing(tmp_path, task):
    curves = []
    for micro, accumulation in ((8, 1), (3, 3), (1, 8)):
        run, peer = trainers(task, tmp_path / str(micro), micro, accumulation)
        run.train()
        curves.append([*curve(run, "loss"), *curve(run, "grad_norm")])
        if micro == 8:
            peer.train()
            whole = [*curve(peer, "loss"), *curve(peer, "grad_norm")]
            assert curves[0] == pytest.approx(whole, rel=1e-5)
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)


def test_what_is_written_equals_the_peer(tmp_path):
    options = {"predict_with_generate": True, "generation_max_length": 9}
    texts = []

    def metrics(found):
        ids = np.where(found.predictions == -100, 0, found.predictions)
        texts.append([[t for t in row if t] for row in ids.tolist()])
        return {"length": float((ids != 0).sum(1).mean())}

    run, peer = trainers("texts", tmp_path, metrics=metrics, seq2seq=options)
    ours, theirs = run.evaluate(num_beams=3), peer.evaluate(num_beams=3)
    assert texts[0] == texts[1]
    assert ours["eval_length"] == theirs["eval_length"]
    run.predict(rows("texts", 3))
    peer.predict(Dataset.from_list(rows("texts", 3)))
    assert texts[2] == texts[3]


@pytest.mark.parametrize("share", [(0.8, 0.1), (1.0, 0.0), (0.5, 0.5)])
def test_hidden_words_equal_the_peers_draws(tmp_path, share):
    made = tiny.tokenizer()
    made.add_special_tokens({"mask_token": "<mask>"})
    made.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    options = {"mlm_probability": 0.4, "mask_replace_prob": share[0],
               "random_replace_prob": share[1]}  # fmt: skip
    texts = [{"input_ids": row["input_ids"]} for row in rows("words")]
    torch.manual_seed(5)
    ours = topwork.DataCollatorForLanguageModeling(made, **options)(texts)
    torch.manual_seed(5)
    wanted = transformers.DataCollatorForLanguageModeling(theirs, **options)(texts)
    for key in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(ours[key], wanted[key]), key
    plain = topwork.DataCollatorForLanguageModeling(made, mlm=False)(texts)
    wanted = transformers.DataCollatorForLanguageModeling(theirs, mlm=False)(texts)
    assert torch.equal(plain["labels"], wanted["labels"])


@pytest.mark.parametrize("multiple", [None, 8])
def test_padded_batches_equal_the_peer(tmp_path, multiple):
    tiny.tokenizer().save_pretrained(tmp_path)
    tokenizers = tiny.tokenizer(), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for name, task in (
        ("DataCollatorWithPadding", "classes"),
        ("DataCollatorForTokenClassification", "tags"),
        ("DataCollatorForSeq2Seq", "texts"),
    ):
        texts = [{k: v for k, v in row.items() if k != "text"} for row in rows(task)]
        ours, theirs = (
            getattr(home, name)(tokenizer, pad_to_multiple_of=multiple)([dict(t) for t in texts])
            for home, tokenizer in zip((topwork, transformers), tokenizers)
        )
        assert set(ours) == set(theirs)
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), (name, key)
