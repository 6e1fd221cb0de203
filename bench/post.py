"""Post-training side by side with trl: DPO, a reward model, and GRPO with its rollouts.

    python bench/post.py [--quick] [--case dpo|reward|grpo]
                         [--side ours|ours-checkpointing|trl|trl-best]

SmolLM2-135M in bf16, LoRA r=16 on all linears, the same rows, each side in its own process, one
after the other. Tokens are those of every prompt with its answer, counted alike for both sides
(ours computes a prompt that answers share once). `trl` checkpoints its activations, `trl-best` does
not; `ours-checkpointing` and `ours` are set beside both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from statistics import median
from typing import Any

import torch

from rows import smollm2_gguf
from sides import Clock, peak_mib

SIDES = ("ours", "ours-checkpointing", "trl", "trl-best")
# case → prompts of a batch, and the steps of (ours, trl) in a whole and a quick run.
CASES = {"dpo": (4, (8, 4), (6, 3)), "reward": (4, (8, 4), (6, 4)), "grpo": (16, (5, 3), (4, 2))}
GENERATIONS, NEW_TOKENS = 8, 64
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
COMMON = {
    "learning_rate": 1e-5, "lr_scheduler_type": "constant", "logging_steps": 1, "seed": 0,
    "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "bf16": True,
    "max_grad_norm": 0.0,
}  # fmt: skip


def rows_of(case: str, count: int) -> list[dict[str, str]]:
    """Texts of this Python's documentation: prompts of 20 to 150 words, and two answers each."""
    chance = Random(0)
    words = " ".join(topics.values()).split()

    def text(least: int, most: int) -> str:
        size = chance.randint(least, most)
        start = chance.randrange(len(words) - size)
        return " ".join(words[start : start + size])

    rows = []
    for _ in range(count):
        prompt = f"<|im_start|>user\n{text(20, 150)}<|im_end|>\n<|im_start|>assistant\n"
        row = {"prompt": prompt}
        if case != "grpo":
            row |= {
                "chosen": text(20, 150) + "<|im_end|>",
                "rejected": text(20, 150) + "<|im_end|>",
            }
        rows.append(row)
    return rows


def by_length(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between the answers of a group."""
    return [float(len(set(text)) % 7) for text in completions]


def settings(case: str, batch: int, steps: int, folder: Path) -> dict[str, Any]:
    found = {**COMMON, "output_dir": str(folder / "run"), "max_steps": steps,
             "per_device_train_batch_size": batch}  # fmt: skip
    if case == "grpo":
        found |= {"num_generations": GENERATIONS, "max_completion_length": NEW_TOKENS, "beta": 0.0,
                  "temperature": 1.0}  # fmt: skip
    else:
        found |= {"max_length": 1024}
    return found


def ours(
    case: str, folder: Path, rows: list[dict[str, str]], steps: int, batch: int, side: str
) -> Any:
    from topwork import (
        AutoTokenizer,
        DPOConfig,
        DPOTrainer,
        GRPOConfig,
        GRPOTrainer,
        LoraConfig,
        RewardConfig,
        RewardTrainer,
        TrainerCallback,
    )  # fmt: skip

    class OurClock(Clock, TrainerCallback):
        pass

    clock = OurClock()
    shared: dict[str, Any] = {
        "train_dataset": rows, "processing_class": AutoTokenizer.from_pretrained(folder / "base"),
        "peft_config": LoraConfig(**LORA), "callbacks": [clock],
    }  # fmt: skip
    given = settings(case, batch, steps, folder) | {"shuffle": False}
    given["gradient_checkpointing"] = side == "ours-checkpointing"
    name = str(folder / "base")
    if case == "dpo":
        trainer: Any = DPOTrainer(name, args=DPOConfig(**given), **shared)
    elif case == "reward":
        trainer = RewardTrainer(name, args=RewardConfig(**given), **shared)
    else:
        trainer = GRPOTrainer(name, [by_length], GRPOConfig(**given), **shared)
    trainer.train()
    return clock, trainer.state.log_history


def trl(
    case: str, folder: Path, rows: list[dict[str, str]], steps: int, batch: int, side: str
) -> Any:
    import datasets
    import transformers
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

    import peft

    class TheirClock(Clock, transformers.TrainerCallback):
        pass

    clock, data = TheirClock(), datasets.Dataset.from_list(rows)
    base = folder / "base"
    kind = transformers.AutoModelForCausalLM
    more: dict[str, Any] = {}
    if case == "reward":
        kind, more = transformers.AutoModelForSequenceClassification, {"num_labels": 1}
    model = kind.from_pretrained(base, dtype="bfloat16", **more)
    task = "SEQ_CLS" if case == "reward" else "CAUSAL_LM"
    shared: dict[str, Any] = {
        "train_dataset": data, "processing_class": transformers.AutoTokenizer.from_pretrained(base),
        "peft_config": peft.LoraConfig(**LORA, task_type=task), "callbacks": [clock],
    }  # fmt: skip
    given = settings(case, batch, steps, folder) | {"report_to": "none", "weight_decay": 0.0}
    given["gradient_checkpointing"] = side != "trl-best"
    if case == "dpo":
        trainer: Any = DPOTrainer(model, args=DPOConfig(**given), **shared)
    elif case == "reward":
        trainer = RewardTrainer(model, args=RewardConfig(**given), **shared)
    else:
        trainer = GRPOTrainer(model, [by_length], GRPOConfig(**given), **shared)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
    if case == "grpo":
        del trainer._get_train_sampler  # its sampler repeats each prompt for the group
    trainer.train()
    return clock, trainer.state.log_history


def child(side: str, case: str, folder: Path, steps: int) -> None:
    """One side in this process; prints what it measured as JSON."""
    torch.manual_seed(0)
    batch = CASES[case][0]
    rows = json.loads((folder / f"{case}.json").read_text())
    if side.startswith("ours"):
        clock, history = ours(case, folder, rows, steps, batch, side)
    else:
        clock, history = trl(case, folder, rows, steps, batch, side)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    tokens = [entry["num_tokens"] for entry in history if "num_tokens" in entry]
    print(json.dumps({"seconds": clock.seconds, "losses": losses, "counted": tokens,
                      "peak_mib": peak_mib()}))  # fmt: skip


def step_tokens(case: str, rows: list[dict[str, str]], steps: int, tokenizer: Any) -> list[int]:
    """The tokens of each step's prompts with their answers."""
    batch = CASES[case][0]

    def size(text: str) -> int:
        return len(tokenizer.encode(text))

    if case == "grpo":
        prompts = batch // GENERATIONS
        groups = [rows[i * prompts : (i + 1) * prompts] for i in range(steps)]
        return [sum(GENERATIONS * (size(r["prompt"]) + NEW_TOKENS) for r in g) for g in groups]
    groups = [rows[i * batch : (i + 1) * batch] for i in range(steps)]
    return [
        sum(2 * size(r["prompt"]) + size(r["chosen"]) + size(r["rejected"]) for r in group)
        for group in groups
    ]


def measure(case: str, side: str, folder: Path, quick: bool) -> dict[str, Any]:
    from topwork import AutoTokenizer

    _, *counts = CASES[case]
    steps = counts[1 if quick else 0][0 if side.startswith("ours") else 1]
    command = [sys.executable, __file__, "--child", side, case, str(folder), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"case": case, "side": side, "error": done.stderr.strip()[-800:]}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    rows = json.loads((folder / f"{case}.json").read_text())
    tokens = step_tokens(case, rows, steps, AutoTokenizer.from_pretrained(folder / "base"))
    rates = [n / s for n, s in zip(tokens, found["seconds"])]
    rate = median(rates[1:])  # the first step warms up
    return {"case": case, "side": side, "tokens_per_second": rate, **found}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--side", choices=SIDES, action="append")
    given = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from topwork import AutoModelForCausalLM, AutoTokenizer

        gguf = smollm2_gguf()
        AutoModelForCausalLM.from_pretrained(gguf, dtype="bfloat16").save_pretrained(
            folder / "base"
        )
        AutoTokenizer.from_pretrained(gguf).save_pretrained(folder / "base")
        for case in given.case or CASES:
            (folder / f"{case}.json").write_text(json.dumps(rows_of(case, 64)))
            results = {}
            for side in given.side or SIDES:
                results[side] = found = measure(case, side, folder, given.quick)
                if "error" in found:
                    print(f"{case:7} {side:9} failed: {found['error']}", flush=True)
                    continue
                losses = " ".join(f"{x:.4f}" for x in found["losses"])
                line = f"{case:7} {side:9} {found['tokens_per_second']:7.0f} tok/s"
                line += f" {found['peak_mib']:6.0f} MiB  losses {losses}"
                for name, own in results.items():
                    if side.startswith("ours") or "tokens_per_second" not in own:
                        continue
                    if name.startswith("ours"):
                        times = own["tokens_per_second"] / found["tokens_per_second"]
                        share = own["peak_mib"] / found["peak_mib"]
                        line += f"  | {name}: {times:.1f} x tokens/s, {share:.2f} of the memory"
                print(line, flush=True)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
