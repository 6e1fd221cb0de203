"""Two processes over gloo train as one does."""

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
sys.path.insert(0, {tests!r})
import tiny
from topwork import LoraConfig, SFTConfig, SFTTrainer
torch.set_num_threads(1)
args = SFTConfig(output_dir={out!r}, per_device_train_batch_size={micro}, max_steps=3,
                 learning_rate=1e-2, logging_steps=1, disable_tqdm=True, eval_strategy="steps",
                 eval_steps=3, use_cpu=True)
torch.manual_seed(1)
SFTTrainer(tiny.model(), args, tiny.chats(11), tiny.chats(5), processing_class=tiny.tokenizer(),
           peft_config=LoraConfig(r=4, target_modules="all-linear")).train()
"""


def launch(out, micro, world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = SCRIPT.format(tests=str(Path(__file__).parents[1]), out=str(out), micro=micro)
    env = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    running = [
        subprocess.Popen([sys.executable, "-c", code], env={**env, "RANK": str(rank)})
        for rank in range(world)
    ]
    assert [p.wait(timeout=120) for p in running] == [0] * world
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one_does(tmp_path):
    one, two = launch(tmp_path / "one", 4, 1), launch(tmp_path / "two", 2, 2)
    for ours, theirs in zip(two, one, strict=True):
        for key in ("loss", "grad_norm", "eval_loss", "train_loss"):
            if key in ours:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
