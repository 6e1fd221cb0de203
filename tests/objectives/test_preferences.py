"""KTO, ORPO, CPO and reward models: formulas, and what must not depend on how a step is cut."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
import topwork
from topwork import LoraConfig, TrainerCallback
from topwork.errors import ConfigError
from topwork.objectives import formulas

PAIRS = [
    {
        "prompt": f"ask {i}{'?' * (i % 3)}",
        "chosen": f" {'yes' * (1 + i % 3)} {i}",
        "rejected": f" no{'b' * (3 * i % 7)}",
        "margin": 0.25 * i,
    }
    for i in range(6)
]
JUDGED = [
    {"prompt": r["prompt"], "completion": r["chosen" if i % 3 else "rejected"], "label": i % 3 > 0}
    for i, r in enumerate(PAIRS)
]
STEPS = [
    {"prompt": f"{i} + {i}", "completions": ["add", "them" * (1 + i % 2), "up"][: 1 + i % 3],
     "labels": [True, i % 2 == 0, False][: 1 + i % 3]}
    for i in range(6)
]  # fmt: skip
LORA = {"r": 4, "target_modules": ["q_proj", "up_proj", "down_proj"]}
TRIPLES = [{**row, "reference": f" {'well' * (1 + 2 * i % 5)} {i}"} for i, row in enumerate(PAIRS)]
ROWS = {"KTO": JUDGED, "PRM": STEPS, "TPO": TRIPLES}


def model_for(name):
    if name not in ("Reward", "PRM"):
        return tiny.model()
    auto, labels = {
        "Reward": (topwork.AutoModelForSequenceClassification, 1),
        "PRM": (topwork.AutoModelForTokenClassification, 2),
    }[name]
    torch.manual_seed(0)
    values = {**tiny.model().config.to_dict(), "num_labels": labels, "classifier_dropout": 0.0}
    return auto.from_config(topwork.Config(**values))


def far():
    """A model that finds the answers less likely than `tiny.model()` does."""
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


class Note(TrainerCallback):
    def __init__(self):
        self.grads = []

    def on_pre_optimizer_step(self, args, state, control, **more):
        self.grads.append([p.grad.clone() for p in more["trainer"].optimiser.parameters])


def trainer(folder, name, rows=None, model=None, callbacks=(), evals=None, lora=True,
            ref_model=None, **options):  # fmt: skip
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 6, "learning_rate": 1e-2,
        "max_steps": 1, "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no",
        "max_grad_norm": 0, "shuffle": False,
    }  # fmt: skip
    torch.manual_seed(5)
    more = {"ref_model": ref_model} if ref_model is not None else {}
    run = getattr(topwork, f"{name}Trainer")(
        model or model_for(name),
        args=getattr(topwork, f"{name}Config")(**{**values, **options}),
        train_dataset=ROWS.get(name, PAIRS) if rows is None else rows, eval_dataset=evals,
        processing_class=tiny.tokenizer(), callbacks=callbacks,
        peft_config=LoraConfig(**LORA) if lora else None, **more,
    )  # fmt: skip
    torch.manual_seed(6)
    with torch.no_grad():
        for path, parameter in run.model.named_parameters():
            if "lora_B" in path:
                parameter.normal_(std=0.3)
    return run


CASES = [
    ("KTO", {"beta": 0.3, "desirable_weight": 1.5}),
    ("KTO", {"loss_type": "apo_zero_unpaired"}),
    ("ORPO", {"beta": 0.5}),
    ("ORPO", {"prompt_nll": False}),
    ("CPO", {"label_smoothing": 0.1}),
    ("CPO", {"loss_type": "simpo", "alpha": 0.2}),
    ("TPO", {"beta": 0.3, "label_smoothing": 0.1}),
    ("TPO", {"loss_type": "tpo-l"}),
    ("Reward", {"center_rewards_coefficient": 0.1}),
    ("PRM", {}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda c: str(c))
def test_the_cut_of_a_step_changes_neither_loss_nor_gradients(tmp_path, name, options):
    found = []
    for micro, accumulation in ((6, 1), (4, 2), (1, 6)):
        note = Note()
        run = trainer(tmp_path, name, callbacks=[note], per_device_train_batch_size=micro,
                      gradient_accumulation_steps=accumulation, **options)  # fmt: skip
        run.train()
        found.append((run.state.log_history[0], note.grads[0]))
    (log, grads), *others = found
    for other, more in others:
        for key in set(log) & {"loss", "kl", "rewards/accuracies", "accuracy", "nll_loss"}:
            assert other[key] == pytest.approx(log[key], rel=1e-5, abs=1e-7), key
        for one, two in zip(grads, more, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda c: str(c))
def test_training_lowers_the_loss_and_evaluates(tmp_path, name, options):
    rows = ROWS.get(name, PAIRS)
    run = trainer(tmp_path, name, max_steps=25, evals={"same": rows[:4]}, **options)
    run.train()
    losses = [e["loss"] for e in run.state.log_history if "loss" in e]
    assert losses[-1] < losses[0] - 0.02
    assert math.isfinite(run.evaluate()["eval_same_loss"])


# -- formulas ------------------------------------------------------------------------------------


def test_kto_pulls_good_answers_above_the_kl_and_bad_ones_below():
    ratios, good = torch.tensor([0.7, 0.7, -0.2]), torch.tensor([1.0, 0.0, 0.0])
    found = formulas.kto(ratios, good, 0.4, 0.5)
    wanted = [1 - 1 / (1 + math.exp(-0.5 * s)) for s in (0.7 - 0.4, 0.4 - 0.7, 0.4 + 0.2)]
    assert found.tolist() == pytest.approx(wanted)


def test_the_kl_is_that_of_answers_to_other_prompts_and_never_negative(tmp_path):
    reference = far()
    run = trainer(tmp_path, "KTO", rows=JUDGED[:3], lora=False, ref_model=reference)
    swapped = trainer(tmp_path, "KTO", rows=JUDGED[:3], model=far(), lora=False,
                      ref_model=tiny.model())  # fmt: skip
    run._prepare()
    samples, total = run.train_data, 0.0
    for own, other in zip(samples, (samples[-1], *samples)):
        ids = torch.tensor([*own.prompt, *other.answers[0].ids]).long()
        at = torch.arange(len(own.prompt), len(ids))
        for sign, model in ((1, run.model), (-1, reference)):
            with torch.no_grad():
                logits = model(ids[None]).logits
            said = logits[0, at - 1].log_softmax(-1).gather(1, ids[at, None])
            total += sign * float(said.sum())
    (batch,) = run.objective.assemble(run.model, [samples])
    assert batch.kl == pytest.approx(total / 3, rel=1e-4)
    assert batch.kl > 1
    # One sample at a time has an answer to another prompt, too (the peer's would be its own).
    parts = [run.objective._mismatched(run.model, [[s]])[0] for s in samples]
    assert sum(parts) == pytest.approx(total, rel=1e-4)
    (other,) = swapped.objective.assemble(swapped.model, [samples])
    assert other.kl == 0


def test_precomputed_references_know_the_mismatched_answers(tmp_path):
    logs = []
    for known in (False, True):
        run = trainer(tmp_path, "KTO", model=far(), lora=False, ref_model=tiny.model(), max_steps=3,
                      precompute_ref_log_probs=known)  # fmt: skip
        run.train()
        logs.append([(e["loss"], e["kl"]) for e in run.state.log_history if "loss" in e])
    assert logs[0] == [pytest.approx(pair, rel=1e-5) for pair in logs[1]]


def test_log_odds_are_exact_near_certainty():
    logs = torch.tensor([-1e-6, -0.1, -3.0, -40.0], dtype=torch.float64)
    wanted = [x - math.log(-math.expm1(x)) for x in logs.tolist()]
    assert formulas.log_odds(logs).tolist() == pytest.approx(wanted)
    assert torch.isfinite(formulas.log_odds(torch.zeros(1)))


def test_orpo_without_prompts_trains_answers_alone(tmp_path):
    run = trainer(tmp_path, "ORPO", prompt_nll=False)
    (batch,) = run.objective.assemble(run.model, [run.train_data])
    whole = trainer(tmp_path, "ORPO")
    (other,) = whole.objective.assemble(whole.model, [whole.train_data])
    prompts = sum(len(s.prompt) - 1 for s in run.train_data)
    chosen = sum(len(s.answers[0].ids) for s in run.train_data)
    assert run.objective.weight(batch)[0] == chosen
    assert whole.objective.weight(other)[0] == chosen + prompts


def test_alpha_rewards_become_log_probabilities():
    logs = torch.tensor([-0.5, -2.0], dtype=torch.float64)
    assert torch.equal(formulas.alpha_reward(logs, 0.0), logs)
    torch.testing.assert_close(formulas.alpha_reward(logs, 1e-9), logs)
    torch.testing.assert_close(formulas.alpha_reward(logs, 0.5), (1 - logs.exp() ** -0.5) / 0.5)


def test_tpo_is_a_pair_and_the_likelihood_of_a_third_answer(tmp_path):
    run = trainer(tmp_path, "TPO", lora=False, loss_type="tpo-l", beta=0.7, tpo_alpha=0.3,
                  tpo_l_gamma=0.2)  # fmt: skip
    run.train()
    model, tokenizer = tiny.model(), tiny.tokenizer()
    sums, counts = [], []
    for row in TRIPLES:
        for name in ("chosen", "rejected", "reference"):
            begin, answer = (tokenizer(row[k]).input_ids for k in ("prompt", name))
            ids = torch.tensor([[*begin, *answer, tokenizer.eos_token_id]])
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
            own = logprobs.gather(1, ids[0, 1:, None])[len(begin) - 1 :, 0]
            sums.append(float(own.detach().sum()))
            counts.append(len(own))
    chosen, rejected, reference = (sums[k::3] for k in range(3))
    lengths = [counts[k::3] for k in range(3)]
    pairs = [
        math.log1p(math.exp(-(0.7 * (c / n - r / m) - 0.2)))
        for c, n, r, m in zip(chosen, lengths[0], rejected, lengths[1])
    ]
    wanted = sum(pairs) / 6 - 0.3 * sum(reference) / sum(lengths[2])
    assert run.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-5)


def test_triples_name_their_answers_and_lose_rows_whose_pair_is_one_answer(tmp_path):
    rows = [*TRIPLES, {**TRIPLES[0], "rejected": TRIPLES[0]["chosen"]}]
    run = trainer(tmp_path, "TPO", rows)
    assert run.prepared.dropped == {"whose answers are the same tokens": 1}
    assert any(line.startswith("  reference: ") for line in run.notes)
    same = [{**row, "reference": row["chosen"]} for row in TRIPLES]
    assert len(trainer(tmp_path, "TPO", same).prepared.samples) == 6


def test_simpo_asks_for_its_margin():
    delta = torch.tensor([0.4])
    found = formulas.cpo(delta, "simpo", beta=2.0, gamma=0.5)
    assert float(found) == pytest.approx(math.log(1 + math.exp(-(2 * 0.4 - 0.5))))


def test_rewards_obey_bradley_terry_with_margins(tmp_path):
    run = trainer(tmp_path, "Reward", rows=PAIRS[:4])
    run._prepare()
    (batch,) = run.objective.assemble(run.model, [run.train_data])
    wanted = 0.0
    for sample in run.train_data:
        found = []
        for answer in sample.answers:
            ids = torch.tensor([*sample.prompt, *answer.ids]).long()
            with torch.no_grad():
                found.append(float(run.model(ids[None]).logits))
        wanted += math.log(1 + math.exp(-(found[0] - found[1] - sample.value)))
    assert float(run.objective.loss(run.model, batch).total.detach()) == pytest.approx(wanted)


def test_a_reward_adapter_holds_its_head(tmp_path):
    run = trainer(tmp_path, "Reward")
    run.train()
    run.save_model(tmp_path / "saved")
    assert any("score" in name for name in run.model.adapter_state())
    again = topwork.PeftModel.from_pretrained(model_for("Reward"), tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again(ids).logits, run.model(ids).logits)


def test_an_adapter_on_all_linear_layers_leaves_the_head_whole(tmp_path):
    run = topwork.RewardTrainer(
        model_for("Reward"),
        topwork.RewardConfig(output_dir=str(tmp_path), max_steps=1, disable_tqdm=True), PAIRS,
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip
    before = run.model.get_base_model().score.original_module.weight.clone()
    run.train()
    head = run.model.get_base_model().score
    assert torch.equal(head.original_module.weight, before)
    assert not torch.equal(head.modules_to_save["default"].weight, before)
    assert not any("score" in n and "lora" in n for n, _ in run.model.named_parameters())


def test_steps_are_judged_at_their_ends(tmp_path):
    run = trainer(tmp_path, "PRM", max_length=20)
    decode = tiny.tokenizer().decode
    sample = run.train_data[2]
    assert decode(sample.ids) == "2 + 2add\nthem\nup\n"
    assert [decode([int(sample.ids[e])]) for e in sample.ends] == ["\n"] * 3
    assert sample.labels == (1, 1, 0)
    last = trainer(tmp_path, "PRM", train_on_last_step_only=True)
    assert [s.labels for s in last.train_data] == [(int(r["labels"][-1]),) for r in STEPS]
    short = trainer(tmp_path, "PRM", max_length=11)
    assert "rows cut" in " ".join(short.notes)
    assert all(max(s.ends) < 11 for s in short.train_data)


# -- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("KTO", {"loss_type": "bco"}, "loss_type"),
        ("KTO", {"desirable_weight": -1}, "desirable_weight"),
        ("ORPO", {"beta": 0}, "beta"),
        ("CPO", {"loss_type": "simp"}, "nearest: 'simpo'"),
        ("CPO", {"loss_type": "hinge", "label_smoothing": 0.1}, "not read by hinge"),
        ("TPO", {"tpo_alpha": 0}, "CPO with cpo_alpha=0"),
        ("TPO", {"loss_type": "tpo_l"}, "nearest: 'tpo-l'"),
        ("CPO", {"label_smoothing": 0.5}, "label_smoothing"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(name, options, error):
    with pytest.raises(ConfigError, match=error):
        getattr(topwork, f"{name}Config")(**options)


def test_a_head_that_would_stay_untrained_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="leaves the head untrained"):
        topwork.RewardTrainer(
            model_for("Reward"), topwork.RewardConfig(output_dir=str(tmp_path)), PAIRS,
            processing_class=tiny.tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        )  # fmt: skip


def test_a_classifier_of_more_labels_is_no_reward_model(tmp_path):
    config = topwork.Config(**{**tiny.model().config.to_dict(), "num_labels": 3})
    with pytest.raises(ConfigError, match="has 3"):
        topwork.RewardTrainer(
            topwork.AutoModelForSequenceClassification.from_config(config),
            topwork.RewardConfig(output_dir=str(tmp_path)), PAIRS,
            processing_class=tiny.tokenizer(),
        )  # fmt: skip


def test_weights_that_do_not_balance_are_told(tmp_path):
    rows = [{**r, "label": i == 0} for i, r in enumerate(JUDGED)]
    notes = " ".join(trainer(tmp_path, "KTO", rows=rows).notes)
    assert "1 good and 5 bad answers" in notes
    assert "desirable_weight from 5.00 to 6.67" in notes
    pairs = trainer(tmp_path, "KTO", rows=PAIRS)
    assert "6 good and 6 bad answers" in " ".join(pairs.notes)
