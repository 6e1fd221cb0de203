"""One side of the comparison in its own process: `sides.py SIDE CASE FOLDER STEPS` → JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rows import Row
from sft import ALPHA, CASES, DROPOUT, RANK, RATE


def peak_mib() -> float:
    """The most memory that this process has held."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


Step = Callable[[list[Row]], float]


def step_of(parameters: list[Any], loss_of: Callable[[list[Row]], torch.Tensor]) -> Step:
    """The plain training step: loss, backward, AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)

    def step(batch: list[Row]) -> float:
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def loop(step: Step, batches: list[list[Row]]) -> dict:
    losses, seconds = [], []
    for batch in batches:
        start = time.perf_counter()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - start)
    return {"losses": losses, "seconds": seconds}


class Clock:
    """Seconds of each step, for the callbacks of either trainer."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds[-1] = time.perf_counter() - self.seconds[-1]


def as_columns(batches: list[list[Row]]) -> list[dict[str, list[int]]]:
    rows = (row for batch in batches for row in batch)
    return [
        {"input_ids": r.ids, "labels": [i if t else -100 for i, t in zip(r.ids, r.trained)]}
        for r in rows
    ]


def ours(batches: list[list[Row]], dtype: str, base: Path, adapter: Path, side: str) -> dict:
    from topwork import (
        AutoModelForCausalLM,
        AutoTokenizer,
        PeftModel,
        SFTConfig,
        SFTTrainer,
        TrainerCallback,
    )

    class OurClock(Clock, TrainerCallback):
        pass

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    args = SFTConfig(
        output_dir=str(base.parent / "ours"),
        per_device_train_batch_size=len(batches[0]),
        max_steps=len(batches),
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_length=None,
        shuffle=False,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=side == "ours-checkpointing",
    )
    clock = OurClock()
    trainer = SFTTrainer(
        PeftModel.from_pretrained(model, adapter, is_trainable=True),
        args,
        as_columns(batches),
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[clock],
    )
    torch.manual_seed(1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "seconds": clock.seconds}


def peft(batches: list[list[Row]], dtype: str, base: Path, adapter: Path, side: str) -> dict:
    import transformers

    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    # Best: adapters in the base's dtype, not the default fp32 that is cast at every use.
    model = peft.PeftModel.from_pretrained(
        model, adapter, is_trainable=True, autocast_adapter_dtype=side == "peft"
    ).train()

    def loss_of(batch: list[Row]) -> torch.Tensor:
        longest = max(len(row.ids) for row in batch)
        ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in batch])
        mask = torch.tensor([[1] * len(r.ids) + [0] * (longest - len(r.ids)) for r in batch])
        marks = [row.trained + [False] * (longest - len(row.ids)) for row in batch]
        labels = ids.masked_fill(~torch.tensor(marks), -100)
        return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss

    return loop(step_of([p for p in model.parameters() if p.requires_grad], loss_of), batches)


def trl(batches: list[list[Row]], dtype: str, base: Path, adapter: Path, side: str) -> dict:
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer

    import peft

    data = datasets.Dataset.from_list(as_columns(batches))
    best = {"gradient_checkpointing": False} if side == "trl-best" else {}
    args = SFTConfig(
        output_dir=str(base.parent / "trl"),
        per_device_train_batch_size=len(batches[0]),
        max_steps=len(batches),
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=True,
        use_cpu=True,
        disable_tqdm=True,
        **best,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )

    class TheirClock(Clock, transformers.TrainerCallback):
        pass

    clock = TheirClock()
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=data,
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
        peft_config=config,
        callbacks=[clock],
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "seconds": clock.seconds}


def main() -> None:
    side, case, folder, steps = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    _, dtype, rate, *_ = CASES[case]
    batches = json.loads((folder / f"{case}.json").read_text())[:steps]
    run = {"ours": ours, "peft": peft, "trl": trl}[side.partition("-")[0]]
    torch.manual_seed(1)
    result = run(
        [[Row(**row) for row in batch] for batch in batches],
        dtype,
        folder / dtype,
        folder / f"adapter-{rate}",
        side,
    )
    print(json.dumps({**result, "peak_mib": peak_mib()}))


if __name__ == "__main__":
    main()
