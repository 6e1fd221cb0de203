from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from topwork import (
    EarlyStoppingCallback,
    LoraConfig,
    SFTConfig,
    SFTTrainer,
    TrainerCallback,
    TrainingArguments,
    get_peft_model,
)
from topwork.errors import CheckpointError, ConfigError, TrainingError
from topwork.training.checkpoint import checkpoints
from topwork.training.files import read_trained

ROWS = tiny.chats(10)
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear")


def trainer(folder, rows=ROWS, model=None, lora=LORA, callbacks=(), evals=None, **options):
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "num_train_epochs": 1, "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    args = SFTConfig(**{**values, **options})
    model = tiny.model() if model is None else model
    torch.manual_seed(1)  # of A's random start
    return SFTTrainer(
        model, args, rows, evals, processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(**lora.to_dict()) if lora else None, callbacks=callbacks,
    )  # fmt: skip


def losses(run):
    return [e["loss"] for e in run.state.log_history if "loss" in e]


def weights(run):
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


class Note(TrainerCallback):
    """Keeps the gradients of each step."""

    def __init__(self):
        self.grads = []

    def on_pre_optimizer_step(self, args, state, control, **more):
        self.grads.append([p.grad.clone() for p in more["trainer"].optimiser.parameters])


def test_training_lowers_the_loss_and_moves_only_the_adapter(tmp_path):
    base = tiny.model().state_dict()
    run = trainer(tmp_path, num_train_epochs=8)
    out = run.train()
    assert out.global_step == 40
    assert sum(losses(run)[-5:]) < 0.8 * sum(losses(run)[:5])
    for name, value in run.model.get_base_model().state_dict().items():
        if "lora" not in name:
            assert torch.equal(value, base[name.replace(".base_layer", "")])


@pytest.mark.parametrize(("micro", "accumulation"), [(2, 4), (4, 2), (8, 1), (3, 3)])
def test_the_cut_of_a_step_changes_neither_loss_nor_gradients(tmp_path, micro, accumulation):
    lora = LoraConfig(r=4, target_modules="all-linear")
    options = {"max_grad_norm": 0, "shuffle": False, "lora": lora, "rows": ROWS[:8]}
    if micro == 3:  # the last micro-batch is smaller
        options["rows"] = ROWS[:8]
    note, wanted = Note(), Note()
    one = trainer(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8,
                  callbacks=[wanted], **options)  # fmt: skip
    one.train()
    run = trainer(tmp_path, per_device_train_batch_size=micro, callbacks=[note],
                  gradient_accumulation_steps=accumulation, **options)  # fmt: skip
    run.train()
    assert losses(run) == pytest.approx(losses(one), rel=1e-5)
    for ours, theirs in zip(note.grads[0], wanted.grads[0]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_the_run_equals_a_plain_loop(tmp_path):
    run = trainer(tmp_path, rows=ROWS[:4], lora=None, per_device_train_batch_size=4,
                  num_train_epochs=3, weight_decay=0.1, max_grad_norm=0.5, bf16=False)  # fmt: skip
    run.train()
    model, batch = tiny.model().train(), run.objective.assemble(run.model, [run.train_data])[0]
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    rest = [p for n, p in model.named_parameters() if "norm" in n]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2
    )
    found = []
    for step in range(3):
        logits = model(batch.input_ids, lengths=batch.lengths).logits[0, batch.positions]
        loss = torch.nn.functional.cross_entropy(logits, batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.param_groups[0]["lr"] = optimiser.param_groups[1]["lr"] = 1e-2 * (1 - step / 3)
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    assert losses(run) == pytest.approx(found, rel=1e-5)


class StopAt(TrainerCallback):
    """Sends this process SIGTERM after so many micro-batches, as a cluster would."""

    def __init__(self, micro):
        self.left = micro

    def on_substep_end(self, args, state, control, **more):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("stop", [2, 5, 7])  # 2: at a step's end; 5, 7: amid one, also mid-epoch
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, stop, bf16, lora):
    options = {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "bf16": bf16, "lora": lora,
               "logging_steps": 2}  # fmt: skip
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    first = trainer(tmp_path / "cut", callbacks=[StopAt(stop)], **options)
    with pytest.raises(SystemExit) as ended:
        first.train()
    assert ended.value.code == 143
    second = trainer(tmp_path / "cut", **options)
    torch.manual_seed(999)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(whole)
    wanted = weights(whole)
    assert all(torch.equal(value, wanted[name]) for name, value in weights(second).items())
    text = (tmp_path / "cut" / "log.jsonl").read_text()
    log = [json.loads(line) for line in text.splitlines()]
    assert [e["loss"] for e in log if "loss" in e] == losses(whole)
    assert log[-1]["train_loss"] == whole.state.log_history[-1]["train_loss"]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_checkpoint_holds_each_trained_tensor_once(tmp_path, bf16, lora):
    run = trainer(tmp_path, save_strategy="epoch", bf16=bf16, lora=lora)
    run.train()
    folder = checkpoints(tmp_path)[-1][1]
    assert not set(load_file(folder / "trained.safetensors")) & set(weights(run))
    found = read_trained(folder)
    assert all(torch.equal(value, found[name]) for name, value in weights(run).items())


def test_other_data_or_another_adapter_is_not_resumed(tmp_path):
    trainer(tmp_path, save_strategy="epoch").train()
    with pytest.raises(CheckpointError, match="other data"):
        trainer(tmp_path, rows=ROWS[:9]).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="another model or adapter"):
        trainer(tmp_path, lora=LoraConfig(r=4, target_modules=["q_proj"])).train(True)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        trainer(tmp_path / "new").train(resume_from_checkpoint=True)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}
    trainer(tmp_path, **options).train()
    newest = checkpoints(tmp_path)[-1][1] / "trained.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    run = trainer(tmp_path, **options)
    with pytest.warns(UserWarning, match=r"passed over.*trained\.safetensors"):
        run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 5


def test_a_loss_that_is_no_number_stops_before_the_step_and_names_its_rows(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            if state.global_step == 2:
                with torch.no_grad():
                    more["model"].get_input_embeddings().weight.fill_(float("nan"))

    run = trainer(tmp_path, shuffle=False, callbacks=[Poison()])
    with pytest.raises(TrainingError, match=r"step 2: the loss is nan on the rows \[[45], [45]\]"):
        run.train()
    assert run.state.global_step == 2
    assert all(value.isfinite().all() for value in weights(run).values())


def test_a_gradient_that_is_no_number_stops_before_the_step(tmp_path):
    class Poison(TrainerCallback):
        def on_substep_end(self, args, state, control, **more):
            more["trainer"].optimiser.parameters[0].grad.fill_(math.inf)

    with pytest.raises(TrainingError, match="gradient's norm"):
        trainer(tmp_path, callbacks=[Poison()]).train()


def test_bf16_keeps_fp32_masters_of_what_is_trained(tmp_path):
    run = trainer(tmp_path, bf16=True, lora=None, learning_rate=1e-5, num_train_epochs=2)
    run.train()
    assert run.model.dtype == torch.bfloat16
    for name, master in run.optimiser.masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16(), run.optimiser.named[name])
    adapted = trainer(tmp_path, bf16=True)
    kinds = {n: p.dtype for n, p in adapted.model.named_parameters()}
    assert all((t == torch.float32) == ("lora" in n) for n, t in kinds.items())


def test_checkpointed_activations_change_nothing(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear")
    plain, kept = (trainer(tmp_path, gradient_checkpointing=on, lora=lora) for on in (False, True))
    plain.train()
    kept.train()
    assert losses(kept) == pytest.approx(losses(plain), rel=1e-6)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows_train(tmp_path, strategy):
    run = trainer(tmp_path, packing=True, packing_strategy=strategy, max_length=200, evals=ROWS)
    assert len(run.train_data) < len(ROWS)
    run.train()
    loose = trainer(tmp_path, evals=ROWS)
    if strategy == "bfd":  # whole rows that do not see one another: the same mean loss
        loose.train_data = run.train_data
        loose.model = run.model
        assert loose.evaluate()["eval_loss"] == pytest.approx(run.evaluate()["eval_loss"], rel=1e-5)


def test_evaluation_best_model_and_early_stopping(tmp_path):
    class Worse(TrainerCallback):
        """Makes the model worse from step 3 on."""

        def on_step_end(self, args, state, control, **more):
            if state.global_step >= 3:
                with torch.no_grad():
                    for p in more["trainer"].optimiser.parameters:
                        p.add_(0.3 * torch.randn_like(p))

    run = trainer(
        tmp_path, num_train_epochs=4, eval_strategy="steps", eval_steps=1, save_steps=1,
        evals={"a": ROWS[:2], "b": ROWS[2:4]}, metric_for_best_model="eval_a_loss",
        save_strategy="steps", load_best_model_at_end=True, save_total_limit=2,
        callbacks=[Worse(), EarlyStoppingCallback(early_stopping_patience=3)],
    )  # fmt: skip
    run.train()
    evals = [e["eval_a_loss"] for e in run.state.log_history if "eval_a_loss" in e]
    assert len(evals) < 20
    assert run.state.best_metric == min(evals)
    best = read_trained(Path(run.state.best_model_checkpoint))
    assert all(torch.equal(value, best[name]) for name, value in weights(run).items())
    assert len(checkpoints(tmp_path)) <= 3
    assert run.evaluate()["eval_a_loss"] == pytest.approx(min(evals), rel=1e-6)


def test_a_run_leaves_a_log_a_page_and_its_adapter(tmp_path):
    run = trainer(tmp_path, save_strategy="epoch", num_train_epochs=2, save_total_limit=1)
    run.train()
    run.save_model()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log] == [*range(1, 11), 10]
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second", "num_tokens"} <= set(log[0])
    page = (tmp_path / "report.html").read_text()
    assert "<polyline" in page
    assert "messages format; 10 of 10 rows kept" in page
    card = (tmp_path / "README.md").read_text()
    assert "base model" in card.lower()
    assert "| Steps | `10 (epoch 2.00)` |" in card
    run.save_model()
    assert (tmp_path / "README.md").read_text() == card
    folder = tmp_path / "checkpoint-10"
    names = {p.name for p in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json",
            "trainer_state.json", "optimizer.safetensors", "manifest.json"} <= names  # fmt: skip
    assert not list(tmp_path.glob("checkpoint-5"))
    from topwork import PeftModel

    again = PeftModel.from_pretrained(tiny.model(), tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again(ids).logits, run.model(ids).logits)


def test_the_report_says_what_is_trained(tmp_path, capsys):
    run = trainer(tmp_path, rows=[*ROWS, tiny.chat("x" * 200, "y")], max_length=120,
                  disable_tqdm=False)  # fmt: skip
    run.train()
    text = capsys.readouterr().err
    for words in (
        "messages format; 10 of 11 rows kept",
        "1 rows dropped, whose trained part lies beyond max_length=120",
        "end of turn: trained in every row",
        "⟦ab<|im_end|>⟧",
        "fits in",
        "trainable ",
    ):
        assert words in text


def test_transformers_models_train_too_and_give_the_same_losses(tmp_path):
    import transformers

    ours = tiny.model()
    ours.save_pretrained(tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager"
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    runs = [trainer(tmp_path, model=m, lora=lora) for m in (ours, theirs)]
    start = weights(runs[0])
    with torch.no_grad():
        for name, parameter in runs[1].model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name])
    for run in runs:
        run.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4)


def test_a_model_without_an_adapter_that_has_one_is_refused(tmp_path):
    model = get_peft_model(tiny.model(), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ConfigError, match="adapter already"):
        trainer(tmp_path, model=model)
    trainer(tmp_path, model=model, lora=None).train()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rte": 1}, "nearest: 'learning_rate'"),
        ({"fp16": True}, "use bf16=True"),
        ({"optim": "adamw"}, "nearest: 'adamw_torch'"),
        ({"lr_scheduler_type": "cosin"}, "nearest: 'cosine'"),
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"eval_strategy": "step"}, "nearest: 'steps'"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"report_to": "wandboard"}, "callback with on_log"),
        ({"packing_strategy": "bfb"}, "nearest: 'bfd'"),
        ({"loss_type": "nl"}, "nearest: 'nll'"),
    ],
)
def test_wrong_settings_name_the_field_and_the_way_out(values, words):
    with pytest.raises(ConfigError, match=words):
        SFTConfig.of(values)


def test_arguments_keep_the_defaults_that_people_know():
    args = TrainingArguments()
    assert (args.learning_rate, args.per_device_train_batch_size, args.num_train_epochs) == (
        5e-5, 8, 3.0,
    )  # fmt: skip
    assert SFTConfig().learning_rate == 2e-5
    assert SFTConfig().max_length == 1024
