"""Losses that look at a whole step look at all processes: two train as one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch
sys.path[:0] = [{tests!r}, {tests!r} + "/objectives"]
import tiny, topwork
from test_preferences import JUDGED, LORA, PAIRS
torch.set_num_threads(1)
options = dict(per_device_train_batch_size={micro}, max_steps=3, learning_rate=1e-2, use_cpu=True,
               logging_steps=1, disable_tqdm=True, save_strategy="no", seed=3)
for name, rows, own in (
    ("DPO", PAIRS, dict(loss_type=["aot_unpaired", "aot", "sft"], precompute_ref_log_probs=True)),
    ("KTO", JUDGED, dict(beta=0.5)),
):
    torch.manual_seed(1)
    model = topwork.get_peft_model(tiny.model(), topwork.LoraConfig(**LORA))
    torch.manual_seed(2)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_B" in path:
                parameter.normal_(std=0.3)
    args = getattr(topwork, name + "Config")(output_dir={out!r} + "/" + name, **options, **own)
    getattr(topwork, name + "Trainer")(
        *((model, tiny.model()) if name == "DPO" else (tiny.model(), model)), args, rows,
        processing_class=tiny.tokenizer(),
    ).train()
"""


def launch(out, micro, world, script=SCRIPT, names=("DPO", "KTO")):
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = script.format(tests=str(Path(__file__).parents[1]), out=str(out), micro=micro)
    env = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    running = [
        subprocess.Popen([sys.executable, "-c", code], env={**env, "RANK": str(rank)})
        for rank in range(world)
    ]
    assert [p.wait(timeout=120) for p in running] == [0] * world
    return [
        json.loads(line)
        for name in names
        for line in (out / name / "log.jsonl").read_text().splitlines()
        if "train_loss" not in line
    ]


def test_two_processes_train_as_one_does(tmp_path):
    one, two = launch(tmp_path / "one", 4, 1), launch(tmp_path / "two", 2, 2)
    assert len(one) == 6
    for ours, theirs in zip(two, one, strict=True):
        for key in ("loss", "grad_norm", "rewards/accuracies", "kl"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
    assert any(log.get("kl", 0) > 0 for log in one)


DRAWN = """
import sys, torch
sys.path.insert(0, {tests!r})
import tiny, topwork
from topwork.objectives.rollouts import Answer
torch.set_num_threads(1)

class Fixed:
    def follow(self, model, step):
        pass
    def write(self, model, texts, limits, seeds):
        sizes = [2 + text[-1] % 5 for text in texts]
        return [Answer([40 + t[-1] + i for i in range(n)], True) for t, n in zip(texts, sizes)]

def reward(completion_ids, **_):
    return [ids[0] % 7 / 7 for ids in completion_ids]

rows = [dict(prompt="go " + str(i)) for i in range(8)]
run = topwork.PPOTrainer(
    tiny.model(), reward,
    topwork.PPOConfig(
        output_dir={out!r} + "/PPO", per_device_train_batch_size={micro}, max_steps=4,
        learning_rate=1e-2, use_cpu=True, logging_steps=1, disable_tqdm=True, save_strategy="no",
        num_ppo_epochs=2, whiten_rewards=True, kl_coef=0.1, max_completion_length=8, seed=3,
    ),
    rows, processing_class=tiny.tokenizer(),
)
run.objective.draw.writer = Fixed()
run.train()
"""


def test_a_draw_is_whitened_over_all_processes(tmp_path):
    one = launch(tmp_path / "one", 4, 1, DRAWN, ["PPO"])
    two = launch(tmp_path / "two", 2, 2, DRAWN, ["PPO"])
    assert len(one) == 4
    for ours, theirs in zip(two, one, strict=True):
        for key in ("loss", "grad_norm", "reward", "value_loss", "kl"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
    assert one[-1]["kl"] != 0
