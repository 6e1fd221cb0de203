"""Where a training step's time goes: `profile_step.py [full|ragged] [--trace]`.

Runs our step on the rows of bench/sft.py in this process and prints seconds, tokens/s, page
faults, peak memory and torch's own time per operation.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rows import Row
from sft import prepare, useful_flops
from sides import Step, peak_mib, step_of
from topwork import AutoModelForCausalLM, PeftModel
from topwork.ops.memory import keep_freed_memory

FOLDER = Path(tempfile.gettempdir()) / "topwork-bench"


def plain_step(model: Any) -> Step:
    """Our step without a trainer: packed rows, only the trained tokens in the head."""
    keep_freed_memory()

    def loss_of(batch: list[Row]) -> torch.Tensor:
        ids = torch.tensor([i for row in batch for i in row.ids])
        trained = torch.tensor([t for row in batch for t in [*row.trained[1:], False]])
        hidden = model.backbone(ids[None], lengths=tuple(len(row.ids) for row in batch))
        at = trained.nonzero()[:, 0]
        return -model.token_logprobs(hidden[0, at], ids[at + 1]).mean()

    return step_of([p for p in model.parameters() if p.requires_grad], loss_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="?", default="full")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--table", action="store_true", help="torch.profiler of one step")
    given = parser.parse_args()
    if not (FOLDER / "ragged.json").exists():
        FOLDER.mkdir(exist_ok=True)
        prepare(FOLDER)
    batches = json.loads((FOLDER / f"{given.case}.json").read_text())[: given.steps]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "bfloat16")
    model = PeftModel.from_pretrained(model, FOLDER / "adapter-0.05", is_trainable=True).train()
    step = plain_step(model)
    for rows in batches:
        batch = [Row(**row) for row in rows]
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        loss = step(batch)
        took = time.perf_counter() - start
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        tokens = sum(len(row.ids) for row in batch)
        print(
            f"loss {loss:.4f}  {took:.3f} s  {tokens / took:.0f} tok/s  "
            f"{useful_flops(batch) / took / 1e12:.2f} TFLOP/s  {faults} faults  "
            f"{peak_mib():.0f} MiB peak",
            flush=True,
        )
    if given.table:
        with torch.profiler.profile() as profile:
            step(batch)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=32,
                                           max_name_column_width=45))  # fmt: skip


if __name__ == "__main__":
    main()
