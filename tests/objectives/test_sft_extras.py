from __future__ import annotations

import json
import math

import pytest
import torch

import tiny
from topwork import SFTConfig, SFTTrainer
from topwork.data.packing import collate
from topwork.data.rows import read_rows
from topwork.errors import ConfigError, DataError
from topwork.objectives.logprobs import noisy_embeddings

ROWS = tiny.chats(6)


def trainer(folder, **options):
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 6, "max_steps": 1,
        "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 0.0,
    }  # fmt: skip
    return SFTTrainer(tiny.model(), SFTConfig(**{**values, **options}), ROWS, ROWS[:3],
                      processing_class=tiny.tokenizer())  # fmt: skip


def distributions(run):
    """Log-probabilities [V] at each trained position, with the token that is trained there."""
    for sample in run.train_data:
        ids = torch.from_numpy(sample.ids).long()
        at = torch.from_numpy(sample.trained).nonzero()[:, 0]
        with torch.no_grad():
            logits = run.model(ids[None]).logits[0, at - 1]
        yield from zip(logits.log_softmax(1), ids[at])


def test_entropy_and_accuracy_are_those_of_the_trained_tokens(tmp_path):
    run = trainer(tmp_path, token_metrics=True)
    run.train()
    found = list(distributions(run))
    entropy = sum(float(-(p.exp() * p).sum()) for p, _ in found) / len(found)
    right = sum(int(p.argmax()) == int(t) for p, t in found) / len(found)
    log = run.state.log_history[0]
    assert log["entropy"] == pytest.approx(entropy, rel=1e-4)
    assert log["mean_token_accuracy"] == pytest.approx(right)
    evaluated = run.evaluate()
    assert 0 < evaluated["eval_entropy"] < math.log(259)
    plain = trainer(tmp_path)
    plain.train()
    assert "entropy" not in plain.state.log_history[0]


def test_smoothed_labels_share_with_all_tokens(tmp_path):
    run = trainer(tmp_path, label_smoothing_factor=0.2)
    run.train()
    found = list(distributions(run))
    wanted = sum(-0.8 * float(p[t]) - 0.2 * float(p.mean()) for p, t in found) / len(found)
    assert run.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-5)
    plain = trainer(tmp_path)
    assert run.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])


def test_noise_is_uniform_by_the_size_of_its_document(tmp_path):
    run = trainer(tmp_path, neftune_noise_alpha=5.0)
    batch = collate(run.train_data)
    plain = run.model.get_input_embeddings()(batch.input_ids)
    torch.manual_seed(0)
    parts = (noisy_embeddings(run.model, batch, 5.0) - plain)[0].split(batch.lengths)
    for part, length in zip(parts, batch.lengths):
        most = 5 / math.sqrt(length * 16)
        assert 0.9 * most < float(part.detach().abs().max()) <= most * 1.001
        assert abs(float(part.detach().mean())) < 0.2 * most
    run.train()
    quiet = trainer(tmp_path)
    quiet.train()
    noisy, still = (r.state.log_history[0]["loss"] for r in (run, quiet))
    assert noisy != pytest.approx(still, rel=1e-4)
    assert run.evaluate()["eval_loss"] == pytest.approx(quiet.evaluate()["eval_loss"])


def test_mixtures_repeat_and_draw_rows_by_their_weights(tmp_path):
    for name in ("a", "b"):
        rows = [{"text": f"{name}{i}"} for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = [{"path": str(tmp_path / "a.jsonl"), "weight": 2.3}, {"path": tmp_path / "b.jsonl"}]
    texts = [row["text"] for row in read_rows(parts)]
    assert [texts.count(f"b{i}") for i in range(10)] == [1] * 10
    assert sorted(texts.count(f"a{i}") for i in range(10)) == [2] * 7 + [3] * 3
    assert [row["text"] for row in read_rows(parts)] == texts
    with pytest.raises(DataError, match="weight=0 must be"):
        read_rows([{"path": tmp_path / "a.jsonl", "weight": 0}])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor"),
        ({"label_smoothing_factor": 0.1, "loss_type": "dft"}, "dft"),
        ({"neftune_noise_alpha": -1}, "neftune_noise_alpha"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(options, error):
    with pytest.raises(ConfigError, match=error):
        SFTConfig(**options)
