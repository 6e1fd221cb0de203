from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

import tiny
from topwork import DPOConfig, DPOTrainer, LoraConfig, TrainerCallback, get_peft_model
from topwork.errors import ConfigError, TrainingError
from topwork.objectives import formulas
from topwork.objectives.formulas import Dials, Pairs
from topwork.objectives.reference import Reference

ROWS = [
    {
        "prompt": f"ask {i}{'?' * (i % 3)}",
        "chosen": f" {'yes' * (1 + i % 3)} {i}",
        "rejected": f" no{'b' * (3 * i % 7)}",
    }
    for i in range(8)
]
LORA = {"r": 4, "target_modules": ["q_proj", "up_proj", "down_proj"]}


def moved(seed=7):
    """A tiny policy with an adapter that differs from its base."""
    model = get_peft_model(tiny.model(), LoraConfig(**LORA))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


class Note(TrainerCallback):
    def __init__(self):
        self.grads = []

    def on_pre_optimizer_step(self, args, state, control, **more):
        self.grads.append([p.grad.clone() for p in more["trainer"].optimiser.parameters])


def trainer(folder, model=None, rows=ROWS, ref_model=None, lora=None, callbacks=(), **options):
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "learning_rate": 1e-2,
        "max_steps": 1, "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no",
        "max_grad_norm": 0, "shuffle": False,
    }  # fmt: skip
    return DPOTrainer(
        moved() if model is None else model, ref_model, DPOConfig(**{**values, **options}), rows,
        processing_class=tiny.tokenizer(), peft_config=lora, callbacks=callbacks,
    )  # fmt: skip


def losses(run):
    return [e["loss"] for e in run.state.log_history if "loss" in e]


def one_step(folder, **options):
    note = Note()
    run = trainer(folder, callbacks=[note], **options)
    run.train()
    return run.state.log_history[0], note.grads[0]


# -- formulas ------------------------------------------------------------------------------------


def sig(x):
    return 1 / (1 + math.exp(-x))


C, R, RC, RR, NC, NR, BETA, EPS = -3.0, -2.5, -3.6, -1.9, 4.0, 3.0, 0.5, 0.2
X = BETA * ((C - RC) - (R - RR))
MEAN = (C - RC) / NC - (R - RR) / NR


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("sigmoid", -(1 - EPS) * math.log(sig(X)) - EPS * math.log(sig(-X))),
        ("hinge", max(0.0, 1 - X)),
        ("ipo", (MEAN - 1 / (2 * BETA)) ** 2),
        ("sigmoid_norm", -(1 - EPS) * math.log(sig(BETA * MEAN))
         - EPS * math.log(sig(-BETA * MEAN))),
        ("robust", (-(1 - EPS) * math.log(sig(X)) + EPS * math.log(sig(-X))) / (1 - 2 * EPS)),
        ("exo_pair", sig(X) * math.log(sig(X) / (1 - EPS)) + sig(-X) * math.log(sig(-X) / EPS)),
        ("nca_pair", -math.log(sig(0.3)) - 0.5 * math.log(sig(-0.3)) - 0.5 * math.log(sig(0.3))),
        ("bco_pair", -math.log(sig(0.3)) - math.log(sig(0.3))),
        ("sppo_hard", (0.6 - 1) ** 2 + (-0.6 + 1) ** 2),
        ("apo_zero", 1 - sig(0.3) + sig(-0.3)),
        ("apo_down", sig(0.3) + 1 - sig(0.6)),
        ("discopop", -math.log(sig(X)) * (1 - sig(X / 0.05)) + math.exp(-X) * sig(X / 0.05)),
    ],
)  # fmt: skip
def test_a_loss_is_what_its_paper_says(name, wanted):
    given = (torch.tensor([v], dtype=torch.float64) for v in (C, R, RC, RR, NC, NR))
    found = formulas.PAIRWISE[name](Pairs(*given), Dials(BETA, EPS, 0.05))
    assert float(found) == pytest.approx(wanted, rel=1e-6)


def test_links_are_the_derivatives_of_their_divergences():
    """f'(u) up to a constant, by automatic differentiation of f."""
    u = torch.tensor([0.3, 0.9, 1.7, 4.0], dtype=torch.float64, requires_grad=True)
    alpha = 0.4
    generators = {
        "reverse_kl": u * u.log() - u,
        "forward_kl": u - u.log() - 1,
        "js_divergence": u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "alpha_divergence": (u**alpha / alpha - u) / (alpha - 1),
    }
    for name, f in generators.items():
        (slope,) = torch.autograd.grad(f.sum(), u, retain_graph=True)
        found = formulas.link_of(name, alpha)(u.detach().log())
        torch.testing.assert_close(found - found[0], slope - slope[0], msg=name)
    assert formulas.link_of("alpha_divergence", 1.0) is formulas.reverse_kl


def test_stochastic_dominance_compares_sorted_pairs():
    torch.manual_seed(0)
    c, r, rc, rr = (torch.randn(6, dtype=torch.float64) for _ in range(4))
    ones = torch.ones(6)
    pairs, dials = Pairs(c, r, rc, rr, ones, ones), Dials(0.7)
    margins = sorted((c - r).tolist()), sorted((rc - rr).tolist())
    wanted = sum(-math.log(sig(0.7 * (a - b))) for a, b in zip(*margins))
    assert float(formulas.aot(pairs, dials).sum()) == pytest.approx(wanted)
    apart = sorted((c - rc).tolist()), sorted((r - rr).tolist())
    wanted = sum(-math.log(sig(0.7 * (a - b))) for a, b in zip(*apart))
    assert float(formulas.aot_unpaired(pairs, dials).sum()) == pytest.approx(wanted)


# -- what the peer gets wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "sft"]},
        {"loss_type": ["sigmoid", "sft"], "use_weighting": True},
        {"loss_type": ["ipo", "sft"], "loss_weights": [0.5, 2.0], "ld_alpha": 0.4},
        {"loss_type": "aot"},
        {"loss_type": ["aot_unpaired", "sft", "hinge"]},
    ],
    ids=lambda o: str(o["loss_type"]),
)
def test_the_cut_of_a_step_changes_neither_loss_nor_gradients(tmp_path, options):
    whole, wanted = one_step(tmp_path, **options)
    for micro, accumulation in ((4, 2), (3, 3), (1, 8)):
        log, grads = one_step(
            tmp_path, per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation, **options,
        )  # fmt: skip
        for key in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
            assert log[key] == pytest.approx(whole[key], rel=1e-5), key
        for one, other in zip(grads, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_term_of_answers_is_their_mean_over_the_tokens_of_the_step(tmp_path):
    both, _ = one_step(tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 3.0])
    pairs, _ = one_step(tmp_path, loss_type="sigmoid")
    tokens, _ = one_step(tmp_path, loss_type="sft")
    assert both["loss"] == pytest.approx(pairs["loss"] + 3 * tokens["loss"], rel=1e-5)


def test_weighting_scales_each_pair_by_the_policy(tmp_path):
    """Σ over pairs of w·loss / pairs, with w by hand from the logits."""
    run = trainer(tmp_path, ref_model=tiny.model(), use_weighting=True, rows=ROWS[:3])
    run._prepare()
    (batch,) = run.objective.assemble(run.model, [run.train_data])
    found = float(run.objective.loss(run.model, batch).total.detach())
    reference, total = tiny.model(), 0.0
    for sample in run.train_data:
        weight, ratios = 1.0, []
        for answer in sample.answers:
            ids = torch.tensor([*sample.prompt, *answer.ids]).long()
            at = torch.arange(len(sample.prompt), len(ids))
            with torch.no_grad():
                now, before = (
                    m(ids[None]).logits[0, at - 1].log_softmax(-1) for m in (run.model, reference)
                )
            said = now.gather(1, ids[at, None])[:, 0]
            weight *= float((said - now.exp().pow(2).sum(1).log()).mean().exp())
            ratios.append(float((said - before.gather(1, ids[at, None])[:, 0]).sum()))
        total += weight * -math.log(sig(0.1 * (ratios[0] - ratios[1])))
    assert found == pytest.approx(total, rel=1e-4)


# -- references ------------------------------------------------------------------------------------


def test_a_new_adapter_has_its_base_as_reference(tmp_path):
    run = trainer(tmp_path, tiny.model(), lora=LoraConfig(**LORA))
    assert run.objective.reference == Reference()
    run.train()
    assert losses(run)[0] == pytest.approx(math.log(2), rel=1e-6)
    apart = trainer(tmp_path, run.model, ref_model=tiny.model(), learning_rate=0.0)
    apart.train()
    with run.model.disable_adapter():
        same = trainer(tmp_path, tiny.model(), ref_model=tiny.model(), learning_rate=0.0)
    same.train()
    assert losses(apart)[0] < losses(same)[0] == pytest.approx(math.log(2), rel=1e-6)


def test_an_adapter_that_goes_on_is_compared_with_its_own_start(tmp_path):
    model = moved()
    start = {k: v.clone() for k, v in model.adapter_state().items()}
    run = trainer(tmp_path, model, max_steps=3)
    assert list(model.peft_config) == ["default", "ref"]
    run.train()
    assert losses(run)[0] == pytest.approx(math.log(2), rel=1e-6)
    assert losses(run)[-1] < losses(run)[0]
    for name, tensor in model.adapter_state("ref").items():
        assert torch.equal(tensor, start[name])
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".ref." in n)
    assert any(not torch.equal(t, start[n]) for n, t in model.adapter_state("default").items())


def test_a_whole_model_is_compared_with_a_copy_of_its_start(tmp_path):
    run = trainer(tmp_path, tiny.model(), max_steps=2, optim="sgd", learning_rate=0.1)
    run.train()
    before = tiny.model().state_dict()
    assert losses(run)[0] == pytest.approx(math.log(2), rel=1e-6)
    assert losses(run)[1] < math.log(2)
    for name, tensor in run.objective.reference.model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_precomputed_references_change_nothing_and_are_kept(tmp_path, ld_alpha, monkeypatch):
    options = {"max_steps": 3, "ld_alpha": ld_alpha, "per_device_train_batch_size": 3}
    model = moved()
    wanted = trainer(tmp_path / "a", moved(), **options)
    wanted.train()
    run = trainer(tmp_path / "b", model, precompute_ref_log_probs=True,
                  precompute_ref_batch_size=5, **options)  # fmt: skip
    (kept,) = (tmp_path / "b").glob("reference-*.safetensors")
    assert load_file(kept)["logprobs"].shape == (16,)
    run.train()
    assert losses(run) == pytest.approx(losses(wanted), rel=1e-6)
    monkeypatch.setattr("topwork.objectives.dpo.token_logprobs", None)  # no second computation
    again = trainer(tmp_path / "b", moved(), precompute_ref_log_probs=True, **options)
    assert [s.reference for s in again.train_data] == [s.reference for s in run.train_data]


def test_other_weights_or_rows_are_precomputed_anew(tmp_path):
    options = {"precompute_ref_log_probs": True}
    trainer(tmp_path, moved(7), **options)
    trainer(tmp_path, moved(8), **options)
    trainer(tmp_path, moved(7), rows=ROWS[:5], **options)
    trainer(tmp_path, moved(7), ld_alpha=0.5, **options)
    assert len(list(tmp_path.glob("reference-*.safetensors"))) == 4


@pytest.mark.parametrize("whole", [False, True])
def test_a_reference_that_follows_is_the_mixture_and_survives_a_stop(tmp_path, whole):
    def model():
        return tiny.model() if whole else moved()

    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25,
               "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
               "save_strategy": "steps", "save_steps": 1}  # fmt: skip
    run = trainer(tmp_path / "a", model(), **options)
    start = {k: v.clone() for k, v in run.objective.reference._tensors(run.model, True).items()}
    run.train()
    (tmp_path / "b").mkdir()
    again = trainer(tmp_path / "b", model(), **options)
    again.train(tmp_path / "a" / "checkpoint-3")
    assert losses(again) == losses(run)
    found, other = (r.objective.reference._tensors(r.model, True) for r in (run, again))
    assert all(torch.equal(found[k], other[k]) for k in found)
    two = trainer(tmp_path / "c", model(), **{**options, "max_steps": 2})
    two.train()
    now = two.objective.reference._tensors(two.model, False)
    mixed = two.objective.reference._tensors(two.model, True)
    for name, tensor in mixed.items():
        torch.testing.assert_close(tensor, 0.25 * now[name] + 0.75 * start[name])


# -- the rest --------------------------------------------------------------------------------------


def test_training_raises_margins_and_reads_each_prompt_once(tmp_path):
    model = moved()
    run = trainer(tmp_path, model, max_steps=30, learning_rate=5e-3)
    assert sum(run.objective.size(s) for s in run.train_data) == sum(
        len(s.prompt) + sum(len(a) for a in s.answers) for s in run.train_data
    )
    run.train()
    logs = run.state.log_history[:-1]
    assert logs[-1]["rewards/margins"] > logs[0]["rewards/margins"] + 1
    assert logs[-1]["rewards/accuracies"] == 1
    assert any("shared prompts are computed once" in line for line in run.notes)


def test_dropout_is_off_unless_asked_for(tmp_path):
    lora = {**LORA, "lora_dropout": 0.5}
    for off in (True, False):
        torch.manual_seed(0)
        run = trainer(tmp_path, tiny.model(), lora=LoraConfig(**lora), disable_dropout=off,
                      loss_type="sft", gradient_checkpointing=True)  # fmt: skip
        with torch.no_grad():
            for name, parameter in run.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        run._prepare()
        (batch,) = run.objective.assemble(run.model, [run.train_data])
        first, second = (
            float(run.objective.loss(run.model, batch).total[1].detach()) for _ in range(2)
        )
        assert (first == second) is off


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"loss_type": "sigmoyd"}, "nearest: 'sigmoid'"),
        ({"loss_type": []}, "different losses"),
        ({"loss_type": ["ipo", "ipo"]}, "different losses"),
        ({"loss_type": ["ipo", "sft"], "loss_weights": [1.0]}, "1 numbers for 2"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "labels say nothing"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "not read by"),
        ({"loss_type": "exo_pair"}, "label_smoothing above 0"),
        ({"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, "no meaning for"),
        ({"f_divergence_type": "kl"}, "f_divergence_type"),
        ({"ld_alpha": 1.5}, "ld_alpha"),
        ({"beta": 0.0}, "beta"),
        ({"loss_type": "aot", "use_weighting": True}, "tears them apart"),
        ({"loss_type": "aot", "disable_dropout": False}, "disable_dropout"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "moves the reference"),
        ({"max_length": 1}, "max_length"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(options, error):
    with pytest.raises(ConfigError, match=error):
        DPOConfig(**options)


def test_the_model_cannot_be_its_own_reference(tmp_path):
    model = tiny.model()
    with pytest.raises(ConfigError, match="is the model itself"):
        trainer(tmp_path, model, ref_model=model)


def test_a_loss_that_is_no_number_names_the_rows(tmp_path):
    run = trainer(tmp_path, ref_model=tiny.model(), loss_type="discopop", beta=1e6)
    with pytest.raises(TrainingError, match="No step was taken"):
        run.train()
