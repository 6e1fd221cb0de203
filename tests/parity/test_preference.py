"""Preference losses against TRL's in the same process: losses, gradients, metrics."""

from __future__ import annotations

import pytest
import torch
import transformers
import trl
from datasets import Dataset

import tiny
from topwork import DPOConfig, DPOTrainer

# No template line feed behind the end of the turn: TRL would train it, though no model writes it.
TEMPLATE = tiny.CHATML.replace("'<|im_end|>' + '\n'", "'<|im_end|>'")


def text_pairs(count=4):
    words = ["yes", "no", "perhaps so", "it is"]
    return [
        {
            "prompt": f"ask {i}{'?' * (i % 3)}",
            "chosen": f" {words[i % 4]} {'a' * (i % 5)}",
            "rejected": f" {words[(i + 1) % 4]}{'b' * (2 * i % 7)}.",
        }
        for i in range(count)
    ]


def chat_pairs(count=4):
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
            "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
        }
        for row in text_pairs(count)
    ]


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Folders of a base and of a policy that has moved away from it."""
    folder = tmp_path_factory.mktemp("models")
    base, other = tiny.model(0), tiny.model(1)
    base.save_pretrained(folder / "base")
    with torch.no_grad():
        for p, q in zip(base.parameters(), other.parameters()):
            p.add_(0.3 * q)
    base.save_pretrained(folder / "policy")
    for name in ("base", "policy"):
        tiny.tokenizer(TEMPLATE).save_pretrained(folder / name)
    return folder


def peer_options(folder, **options):
    return {
        "output_dir": str(folder / "theirs"), "use_cpu": True, "bf16": False, "report_to": "none",
        "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
        "learning_rate": 0, "optim": "sgd", "max_steps": 1, "logging_steps": 1, "seed": 0,
        "per_device_train_batch_size": 4, "max_grad_norm": 1e9, **options,
    }  # fmt: skip


def our_options(folder, **options):
    return {
        "output_dir": str(folder / "ours"), "disable_tqdm": True, "save_strategy": "no",
        "learning_rate": 0.0, "max_steps": 1, "logging_steps": 1, "optim": "sgd", "seed": 0,
        "per_device_train_batch_size": 4, "max_grad_norm": 1e9, **options,
    }  # fmt: skip


def both_dpo(homes, tmp_path, rows=None, theirs=None, ours=None, **options):
    """The logs of one step of both."""
    import topwork

    rows = rows or text_pairs()
    name = "policy"
    run = DPOTrainer(
        topwork.AutoModelForCausalLM.from_pretrained(homes / name),
        topwork.AutoModelForCausalLM.from_pretrained(homes / "base"),
        DPOConfig(**our_options(tmp_path, **{**options, **(ours or {})})),
        rows,
        processing_class=topwork.AutoTokenizer.from_pretrained(homes / name),
    )
    run.train()
    peer = trl.DPOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(homes / name),
        transformers.AutoModelForCausalLM.from_pretrained(homes / "base"),
        trl.DPOConfig(**peer_options(tmp_path, **{**options, **(theirs or {})})),
        train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(homes / name),
    )
    peer.train()
    return run.state.log_history[0], peer.state.log_history[0]


def assert_same(ours, theirs, *more, rel=2e-5):
    for key in ("loss", "grad_norm", *more):
        assert ours[key] == pytest.approx(float(theirs[key]), rel=rel, abs=1e-6), key


METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
           "logps/chosen", "logps/rejected")  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "hinge"},
        {"loss_type": "ipo"},
        {"loss_type": "sigmoid_norm"},
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": "exo_pair", "label_smoothing": 0.01},
        {"loss_type": "nca_pair"},
        {"loss_type": "bco_pair"},
        {"loss_type": "sppo_hard"},
        {"loss_type": "aot", "label_smoothing": 0.1},
        {"loss_type": "aot_unpaired", "label_smoothing": 0.1},
        {"loss_type": "apo_zero"},
        {"loss_type": "apo_down"},
        {"loss_type": "discopop"},
        {"loss_type": "sft"},
        {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"},
        {"loss_type": "hinge", "f_divergence_type": "js_divergence"},
        {"loss_type": "ipo", "f_divergence_type": "alpha_divergence"},
        {"loss_type": "sigmoid", "ld_alpha": 0.3},
        {"loss_type": "sigmoid", "use_weighting": True},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5]},
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)
def test_dpo_losses_gradients_and_metrics_equal_the_peer(homes, tmp_path, options):
    assert_same(*both_dpo(homes, tmp_path, beta=0.3, **options), *METRICS)


@pytest.mark.parametrize("implicit", [False, True])
def test_chats_become_the_peers_tokens(homes, tmp_path, implicit):
    rows = chat_pairs()
    if implicit:
        rows = [{k: r["prompt"] + r[k] for k in ("chosen", "rejected")} for r in rows]
    assert_same(*both_dpo(homes, tmp_path, rows, loss_type="ipo", max_length=40), *METRICS)


def test_long_answers_are_cut_as_the_peer_cuts_them(homes, tmp_path):
    options = {"loss_type": "sigmoid", "max_length": 10, "beta": 0.3}
    assert_same(*both_dpo(homes, tmp_path, **options), *METRICS)


def test_the_peers_answer_term_depends_on_the_cut_of_a_step_and_ours_does_not(homes, tmp_path):
    """Its mean over tokens is taken in each micro-batch; ours equals its uncut step."""
    options = {"loss_type": ["sigmoid", "sft"]}
    cut = {**options, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    whole = both_dpo(homes, tmp_path, **options)
    ours, theirs = both_dpo(homes, tmp_path, ours=cut, theirs=cut)
    assert ours["loss"] == pytest.approx(whole[1]["loss"], rel=1e-5)
    assert theirs["loss"] != pytest.approx(whole[1]["loss"], rel=1e-3)


def test_the_peer_crashes_on_a_weighted_answer_term(homes, tmp_path):
    with pytest.raises(RuntimeError, match=r"expanded|single memory location"):
        both_dpo(homes, tmp_path, loss_type=["sigmoid", "sft"], use_weighting=True)


# -- without a reference ---------------------------------------------------------------------------


def both(
    homes, tmp_path, ours, theirs, rows, home="policy", labels=None, peer_extra=None, **options
):
    """The logs of one step of any two trainers without a reference."""
    import topwork

    (ours, config), (theirs, peer_config) = ours, theirs
    auto, extra = "AutoModelForCausalLM", {}
    if labels:
        auto, extra = "AutoModelForSequenceClassification", {"num_labels": labels}
    run = ours(
        getattr(topwork, auto).from_pretrained(homes / home, **extra),
        args=config(**our_options(tmp_path, **options)), train_dataset=rows,
        processing_class=topwork.AutoTokenizer.from_pretrained(homes / home),
    )  # fmt: skip
    run.train()
    peer = theirs(
        getattr(transformers, auto).from_pretrained(homes / home, **extra),
        args=peer_config(**peer_options(tmp_path, **options, **(peer_extra or {}))),
        train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(homes / home),
    )
    peer.train()
    return run.state.log_history[0], peer.state.log_history[0]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


def test_orpo_equals_the_peer(homes, tmp_path):
    from trl.experimental.orpo import ORPOConfig as PeerConfig
    from trl.experimental.orpo import ORPOTrainer as Peer

    import topwork

    found = both(
        homes, tmp_path, (topwork.ORPOTrainer, topwork.ORPOConfig), (Peer, PeerConfig),
        text_pairs(), beta=0.7, peer_extra={"remove_unused_columns": False},
    )  # fmt: skip
    assert_same(*found, *METRICS, "nll_loss", "log_odds_ratio", "log_odds_chosen")


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sigmoid", "label_smoothing": 0.1},
        {"loss_type": "hinge", "cpo_alpha": 0.5},
        {"loss_type": "ipo"},
        {"loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0},
        {"loss_type": "simpo", "alpha": 0.3, "cpo_alpha": 0.2},
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)
def test_cpo_equals_the_peer(homes, tmp_path, options):
    from trl.experimental.cpo import CPOConfig as PeerConfig
    from trl.experimental.cpo import CPOTrainer as Peer

    import topwork

    found = both(
        homes, tmp_path, (topwork.CPOTrainer, topwork.CPOConfig), (Peer, PeerConfig),
        text_pairs(), beta=0.3, peer_extra={"remove_unused_columns": False}, **options,
    )  # fmt: skip
    keys = (*METRICS, "nll_loss") if options.get("cpo_alpha", 1) else METRICS
    assert_same(*found, *keys)


def triples(count=4):
    return [{**row, "reference": f" {'so' * (1 + 3 * i % 4)}"} for i, row in
            enumerate(text_pairs(count))]  # fmt: skip


def both_tpo(homes, tmp_path, **options):
    from trl.experimental.tpo import TPOConfig as PeerConfig
    from trl.experimental.tpo import TPOTrainer as Peer

    import topwork

    return both(
        homes, tmp_path, (topwork.TPOTrainer, topwork.TPOConfig), (Peer, PeerConfig), triples(),
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sigmoid", "label_smoothing": 0.1},
        {"loss_type": "hinge", "tpo_alpha": 0.5},
        {"loss_type": "ipo"},
        {"loss_type": "tpo-l", "tpo_l_gamma": 0.7},
    ],
    ids=lambda o: o["loss_type"],
)
def test_tpo_equals_the_peer(homes, tmp_path, options):
    assert_same(*both_tpo(homes, tmp_path, beta=0.3, **options), *METRICS)


def test_the_peers_reference_term_depends_on_the_cut_of_a_step_and_ours_does_not(homes, tmp_path):
    whole = both_tpo(homes, tmp_path)
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    ours, theirs = both_tpo(homes, tmp_path, **cut)
    assert ours["loss"] == pytest.approx(whole[1]["loss"], rel=1e-5)
    assert theirs["loss"] != pytest.approx(whole[1]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"center_rewards_coefficient": 0.1}], ids=["plain", "centred"]
)
@pytest.mark.parametrize("margins", [False, True], ids=["", "margins"])
def test_reward_models_equal_the_peer(homes, tmp_path, options, margins):
    import topwork

    home = homes / "scored"
    if not home.exists():
        config = topwork.Config(**{**tiny.model().config.to_dict(), "num_labels": 1})
        torch.manual_seed(2)
        topwork.AutoModelForSequenceClassification.from_config(config).save_pretrained(home)
        tiny.tokenizer(TEMPLATE).save_pretrained(home)
    rows = chat_pairs() if options else text_pairs()
    if margins:
        rows = [{**row, "margin": 0.5 * i} for i, row in enumerate(rows)]
    found = both(
        homes, tmp_path, (topwork.RewardTrainer, topwork.RewardConfig),
        (trl.RewardTrainer, trl.RewardConfig), rows, "scored", labels=1, **options,
    )  # fmt: skip
    assert_same(*found, "accuracy", "margin", "mean_reward", "min_reward", "max_reward")


# -- single answers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.7},
        {"loss_type": "apo_zero_unpaired"},
    ],
    ids=lambda o: o["loss_type"],
)
def test_kto_equals_the_peer(homes, tmp_path, options):
    import topwork

    rows = [
        {"prompt": r["prompt"], "completion": r["chosen" if i % 3 else "rejected"],
         "label": bool(i % 3)}
        for i, r in enumerate(text_pairs(6))
    ]  # fmt: skip
    # The answers that fit the policy are those that fit no prompt: their KL is above 0.
    policy, base = ("base", "policy")
    options = {"per_device_train_batch_size": 6, "beta": 0.05, **options}
    run = topwork.KTOTrainer(
        topwork.AutoModelForCausalLM.from_pretrained(homes / policy),
        topwork.AutoModelForCausalLM.from_pretrained(homes / base),
        topwork.KTOConfig(**our_options(tmp_path, shuffle=False, **options)), rows,
        processing_class=topwork.AutoTokenizer.from_pretrained(homes / policy),
    )  # fmt: skip
    run.train()
    peer = trl.KTOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(homes / policy),
        transformers.AutoModelForCausalLM.from_pretrained(homes / base),
        trl.KTOConfig(**peer_options(tmp_path, **options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(homes / policy),
    )
    peer.train()
    ours, theirs = run.state.log_history[0], peer.state.log_history[0]
    assert_same(ours, theirs, *(k for k in METRICS if k[-4:] in ("osen", "cted")), "kl")
    if options["loss_type"] == "kto":
        assert ours["kl"] > 0.1


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_divergence_equals_the_peers(beta):
    from trl.experimental.gkd import GKDTrainer

    from topwork.ops import divergence

    torch.manual_seed(0)
    student, teacher = torch.randn(2, 7, 40), torch.randn(2, 7, 40)
    wanted = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="sum")
    found = divergence(
        student.log_softmax(-1).flatten(0, 1), teacher.log_softmax(-1).flatten(0, 1), beta
    )
    torch.testing.assert_close(found.sum(), wanted)


def test_models_of_transformers_are_trained_as_ours_are(homes, tmp_path):
    import topwork

    logs = []
    for load in (topwork.AutoModelForCausalLM, transformers.AutoModelForCausalLM):
        run = DPOTrainer(
            load.from_pretrained(homes / "policy"), load.from_pretrained(homes / "base"),
            DPOConfig(**our_options(tmp_path)), chat_pairs(),
            processing_class=topwork.AutoTokenizer.from_pretrained(homes / "policy"),
        )  # fmt: skip
        run.train()
        logs.append(run.state.log_history[0])
    assert_same(*logs, *METRICS)
    logs = []
    config = topwork.Config(**{**tiny.model().config.to_dict(), "num_labels": 1})
    torch.manual_seed(2)
    scored = topwork.AutoModelForSequenceClassification.from_config(config)
    scored.save_pretrained(tmp_path / "scored")
    for module in (topwork, transformers):
        model = module.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "scored", num_labels=1
        )
        run = topwork.RewardTrainer(
            model, topwork.RewardConfig(**our_options(tmp_path)), chat_pairs(),
            processing_class=topwork.AutoTokenizer.from_pretrained(homes / "policy"),
        )  # fmt: skip
        run.train()
        logs.append(run.state.log_history[0])
    assert_same(*logs, "accuracy", "margin")
