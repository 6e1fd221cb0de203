"""GOLD: which tokens are shared, its loss against TRL's, and the student's own answers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models

import tiny
from topwork import GOLDConfig, GOLDTrainer, LoraConfig, TrainerCallback
from topwork.errors import ConfigError
from topwork.objectives.gold import shared_tokens
from topwork.objectives.rollouts import Answer
from topwork.objectives.uld import token_ends
from topwork.ops import hybrid_distance
from topwork.text import Tokenizer
from topwork.training.distributed import World

ROWS = tiny.chats(6)
OPTIONS = {
    "per_device_train_batch_size": 6, "learning_rate": 1e-2, "max_steps": 1, "logging_steps": 1,
    "disable_tqdm": True, "save_strategy": "no", "shuffle": False, "max_new_tokens": 6,
}  # fmt: skip


def trainer(folder, rows=ROWS, callbacks=(), **options):
    torch.manual_seed(2)
    return GOLDTrainer(
        tiny.model(0, vocab_size=264), tiny.model(1, vocab_size=266, hidden_size=24),
        GOLDConfig(output_dir=str(folder), **{**OPTIONS, **options}), rows, rows,
        processing_class=tiny.tokenizer(), teacher_processing_class=tiny.other_tokenizer(),
        peft_config=LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"),
        callbacks=callbacks,
    )  # fmt: skip


def logged(run, name):
    return [e[name] for e in run.state.log_history if name in e]


# -- shared tokens ---------------------------------------------------------------------------------


def test_tokens_are_shared_that_say_the_same_however_they_are_spelt():
    pieces = ["<unk>", "</s>", "a", "▁the", "the", "é", "<0xC3>", "▁", "xy"]
    core = Core(models.Unigram([(p, 0.0) for p in pieces], unk_id=0, byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    other = Tokenizer(core, {"eos_token": "</s>"})
    alphabet = tiny.tokenizer().get_vocab()
    vocab = {**alphabet, "Ġthe": 300, "the": 301, "Ã©": 302}
    core = Core(models.BPE(vocab=vocab, merges=[]))
    core.decoder = decoders.ByteLevel()
    own = Tokenizer(core, {"eos_token": "<|im_end|>"})
    mine, theirs = shared_tokens(own, other)
    said = {other.get_vocab()[p] for p in ("a", "▁the", "the", "é", "▁", "</s>")}
    assert set(theirs) == said
    spelt = dict(zip(theirs, own.convert_ids_to_tokens(mine)))
    vocab = other.get_vocab()
    assert spelt[vocab["▁the"]] == "Ġthe"
    assert spelt[vocab["é"]] == "Ã©"
    assert spelt[vocab["</s>"]] == "<|im_end|>"


def test_spellings_in_one_alphabet_are_the_peers_pairs():
    one, two = tiny.tokenizer(), tiny.other_tokenizer()
    theirs = {two.get_vocab()[p]: i for p, i in one.get_vocab().items() if p in two.get_vocab()}
    mine = dict(zip(*reversed(shared_tokens(one, two))))
    assert mine == theirs
    assert len(mine) == 259


# -- the loss --------------------------------------------------------------------------------------


def sides(seed=0):
    torch.manual_seed(seed)
    head, other = torch.nn.Linear(8, 31, bias=False), torch.nn.Linear(6, 45, bias=False)
    student = torch.randn(300, 8, requires_grad=True)
    return head, student, torch.rand(300), 2.0, other, torch.randn(300, 6), torch.rand(300), 0.5


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_distance_in_chunks_is_that_of_whole_logits(beta):
    head, student, scale, heat, other, teacher, other_scale, other_heat = sides()
    same = torch.arange(20), 44 - torch.arange(20)
    found = hybrid_distance(head, student, scale, heat, other, teacher, other_scale, other_heat,
                            same, beta)  # fmt: skip
    p = (head(student) / heat).softmax(1) * scale[:, None]
    q = ((other(teacher) / other_heat).softmax(1) * other_scale[:, None]).detach()
    one, two = p[:, :20].clamp_min(1e-8), q[:, same[1]].clamp_min(1e-8)
    mixed = (1 - beta) * one + beta * two
    if beta == 0:
        apart = (two * (two / one).log() - two + one).sum(1)
    elif beta == 1:
        apart = (one * (one / two).log() - one + two).sum(1)
    else:
        apart = beta * (two * (two / mixed).log()).sum(1)
        apart = apart + (1 - beta) * (one * (one / mixed).log()).sum(1)
    rest, others = p[:, 20:].sort(1, descending=True).values, q[:, :25].sort(1, descending=True)
    gap = (rest - others.values[:, :11]).abs().sum(1) + others.values[:, 11:].sum(1)
    torch.testing.assert_close(found, torch.stack([apart, gap], 1), rtol=1e-4, atol=1e-6)
    assert (found >= -1e-6).all()
    weight = torch.randn(300, 2)
    mine, theirs = (
        torch.autograd.grad((x * weight).sum(), [student, head.weight])
        for x in (found, torch.stack([apart, gap], 1))
    )
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("weights", [(None, None), (0.7, 2.0)], ids=["shares", "given"])
def test_the_loss_and_its_gradients_equal_the_peers(tmp_path, monkeypatch, weights):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    from trl.experimental.gold.gold_trainer import ULDLoss

    names = ("uld_hybrid_matched_weight", "uld_hybrid_unmatched_weight")
    peer = ULDLoss(
        SimpleNamespace(
            uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=1.3,
            uld_teacher_temperature=0.8, uld_skip_student_eos=False, uld_skip_teacher_eos=False,
            use_extended_uld=True, uld_token_merge_strategy="bayesian", uld_use_hybrid_loss=True,
            beta=0.3, **dict(zip(names, weights)),
        ),
        tiny.tokenizer(), tiny.other_tokenizer(),
    )  # fmt: skip
    rows = [tiny.chat(f"say {i}", t) for i, t in enumerate(("ababab", "sayccc", "xsay ab"))]
    run = trainer(tmp_path, rows, temperature=1.3, teacher_temperature=0.8, beta=0.3,
                  **dict(zip(names, weights)))  # fmt: skip
    teacher = run.objective.teacher.model
    for sample in run.train_data:
        found = []
        for one, model, tokenizer in (
            (sample, run.model, tiny.tokenizer()),
            (sample.teacher, teacher, tiny.other_tokenizer()),
        ):
            ids = torch.tensor(one.ids)[None].long()
            mask = torch.tensor(one.trained)
            labels = torch.where(mask, ids[0], -100)[None]
            offsets = torch.zeros(1, len(one.ids), 2)
            ends = torch.tensor(token_ends(tokenizer, ids[0][mask].tolist(), 0.5)).float()
            offsets[0, mask, 1] = ends
            found.append((model(input_ids=ids).logits, labels, ids, offsets))
        (logits, labels, ids, offsets), (t_logits, t_labels, t_ids, t_offsets) = found
        theirs = peer(logits, t_logits.detach(), labels, t_labels, ids, t_ids, offsets, t_offsets)
        (batch,) = run.objective.assemble(run.model, [[sample]])
        ours = run.objective.loss(run.model, batch).over(run.objective.weight(batch))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        tensors = [p for p in run.model.parameters() if p.requires_grad]
        slopes = [torch.autograd.grad(x, tensors, retain_graph=True) for x in (ours, theirs)]
        for mine, slope in zip(*slopes):
            torch.testing.assert_close(mine, slope, rtol=1e-3, atol=1e-6)
    assert any(len(r) > 1 for s in run.train_data for r in s.mine)


def test_the_peers_reverse_divergence_is_least_below_the_teacher_and_ours_at_it(monkeypatch):
    """Of parts of distributions Σ p·log p/q is negative, and least where p is q/e."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gold import GOLDTrainer as Peer

    q = torch.tensor([[0.3, 0.2, 0.1]])
    half = q / 2
    theirs = [
        Peer.generalized_jsd_loss(p, q, beta=1.0, logits_are_probs=True).item() for p in (q, half)
    ]
    assert theirs[1] < theirs[0] == pytest.approx(0.0, abs=1e-6)
    logits = torch.cat([q, 1 - q.sum(1, keepdim=True)], 1).log()
    one, same = torch.ones(1), (torch.arange(3), torch.arange(3))
    ours = [
        hybrid_distance(torch.nn.Identity(), logits, one * scale, 1.0, torch.nn.Identity(), logits,
                        one, 1.0, same, 1.0)[0, 0].item()
        for scale in (1.0, 0.5)
    ]  # fmt: skip
    assert ours[1] > ours[0] == pytest.approx(0.0, abs=1e-6)


# -- runs ------------------------------------------------------------------------------------------


class Script:
    """Writes one line for each text, and remembers the texts."""

    def __init__(self, ids, ended=True):
        self.ids, self.ended, self.texts = ids, ended, []

    def write(self, model, texts, limits, seeds):
        self.texts += [list(t) for t in texts]
        return [Answer(list(self.ids), self.ended) for _ in texts]


def scripted(run, *args):
    writer = Script(*args)
    object.__setattr__(run.objective, "writer", writer)
    return writer


def test_the_teacher_reads_the_students_answers_in_its_own_tokens(tmp_path):
    run = trainer(tmp_path, lmbda=1.0)
    one, two = tiny.tokenizer(), tiny.other_tokenizer()
    ids = [*one("say abab")["input_ids"], 2]
    writer = scripted(run, ids)
    (batch,) = run.objective.assemble(run.model, [run.train_data[:2]], World())
    assert batch.batch.targets.tolist() == ids * 2
    wanted = [*two("say abab")["input_ids"], two.eos_token_id]
    assert batch.teacher.targets.tolist() == wanted * 2
    assert len(wanted) < len(ids)
    assert len(batch.mine.last) == len(batch.theirs.last) > 2
    for sample, text in zip(run.train_data, writer.texts):
        assert one.decode(text).endswith(
            "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert text == sample.ids[: len(text)].tolist()
    (kept,) = run.objective.assemble(run.model, [run.train_data[:2]])  # evaluation
    assert kept.batch.targets.tolist() != batch.batch.targets.tolist()
    scripted(run, [0], False)  # nothing that could be read: the rows stay as they are
    (same,) = run.objective.assemble(run.model, [run.train_data[:2]], World())
    assert same.batch.targets.tolist() == kept.batch.targets.tolist()


class Note(TrainerCallback):
    def __init__(self):
        self.grads = []

    def on_pre_optimizer_step(self, args, state, control, **more):
        self.grads.append([p.grad.clone() for p in more["trainer"].optimiser.parameters])


def test_the_cut_of_a_step_changes_no_gradient(tmp_path):
    """The peer takes the mean of each row's mean, and of each micro-batch's."""
    whole, parts = Note(), Note()
    trainer(tmp_path, callbacks=[whole], max_grad_norm=0).train()
    trainer(tmp_path, callbacks=[parts], max_grad_norm=0, per_device_train_batch_size=2,
            gradient_accumulation_steps=3).train()  # fmt: skip
    for mine, other in zip(whole.grads[0], parts.grads[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-7)


def test_the_student_comes_nearer_to_the_teacher(tmp_path):
    run = trainer(tmp_path, max_steps=15, lr_scheduler_type="constant", max_new_tokens=10,
                  learning_rate=2e-2)  # fmt: skip
    before = run.evaluate()["eval_distance/shared"]
    run.train()
    assert run.evaluate()["eval_distance/shared"] < 0.92 * before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"uld_hybrid_matched_weight": 1.0}, "set both"),
        ({"lmbda": 2}, r"lmbda=2 must be in \[0, 1\]"),
        ({"uld_token_merge_strategy": "observed"}, "wrong place"),
        ({"uld_use_hybrid_loss": False}, "it is ULDTrainer"),
        ({"use_uld_loss": False}, "take GKDTrainer"),
    ],
)
def test_what_cannot_be_meant_is_named(options, words):
    with pytest.raises(ConfigError, match=words):
        GOLDConfig(**options)


def test_names_of_the_peers_scripts_are_taken():
    args = GOLDConfig(use_uld_loss=True, uld_use_hybrid_loss=True, use_extended_uld=True)
    assert args.uld_use_hybrid_loss
