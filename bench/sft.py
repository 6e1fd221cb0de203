"""LoRA fine-tuning side by side: ours, transformers + peft in a plain loop, and trl.SFTTrainer.

    python bench/sft.py [--quick] [--case full|ragged|ragged-fp32] [--side NAME ...]

Each side runs in its own process, one after the other, on the same rows and optimiser steps:
SmolLM2-135M, LoRA r=16, alpha 32, dropout 0.05, all linears, AdamW. Prints a table, then JSON.
The peers run at their defaults and, as `*-best`, at the best settings found for this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rows import Row, chat_rows, full_rows, smollm2_gguf

RANK, ALPHA, DROPOUT, RATE = 16, 32, 0.05, 5e-4
SIDES = ("ours", "ours-checkpointing", "peft", "peft-best", "trl", "trl-best")
# case → rows of a batch, dtype, dropout, and the steps of (ours, peers) in a whole and a quick run.
# The peers' steps are the first of ours: they are too slow to run as many.
CASES = {
    "full": (4, "bfloat16", DROPOUT, (8, 3), (4, 2)),
    "ragged": (8, "bfloat16", DROPOUT, (8, 3), (8, 2)),
    "ragged-fp32": (4, "float32", 0.0, (6, 6), (3, 3)),
}
SIDES_OF = {"ragged-fp32": ("ours", "peft")}


def rows_of(case: str, tokenizer: Any) -> list[list[Row]]:
    """The case's batches."""
    batch, _, _, (steps, _), _ = CASES[case]
    count = batch * steps
    rows = full_rows(tokenizer, count, 512) if case == "full" else chat_rows(tokenizer, count)
    if case == "ragged-fp32":  # small, so that fp32 stays affordable
        rows = [Row(row.ids[-96:], row.trained[-96:]) for row in rows]
    return [rows[at : at + batch] for at in range(0, count, batch)]


def prepare(folder: Path) -> None:
    """Write the base in bf16 and fp32, the adapter that every side starts from, and the rows."""
    from transformers import AutoTokenizer

    from topwork import AutoModelForCausalLM, LoraConfig, get_peft_model

    gguf = smollm2_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf)
    for dtype in (torch.float32, torch.bfloat16):
        home = folder / str(dtype).removeprefix("torch.")
        model.to(dtype).save_pretrained(home)
        tokenizer.save_pretrained(home)
    torch.manual_seed(0)
    for rate in (DROPOUT, 0.0):
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=rate, target_modules="all-linear"
        )
        base = AutoModelForCausalLM.from_pretrained(folder / "bfloat16")
        torch.manual_seed(0)
        get_peft_model(base, config).save_pretrained(folder / f"adapter-{rate}")
    for case in CASES:
        batches = [[asdict(row) for row in batch] for batch in rows_of(case, tokenizer)]
        (folder / f"{case}.json").write_text(json.dumps(batches))


def matmul_peak() -> float:
    """The machine's bf16 matmul rate in FLOP/s: the best of a few shapes, each tried often."""
    best = 0.0
    for m, k, n in ((2048, 576, 3072), (2048, 576, 576), (4096, 1024, 1024)):
        x, w = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
        for _ in range(30):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            best = max(best, 2 * m * k * n / (time.perf_counter() - start))
    return best


def useful_flops(batch: list[Row]) -> float:
    """What one step must compute on SmolLM2-135M: no padding, only trained tokens in the head."""
    hidden, heads, kv, head, wide, layers, vocab = 576, 9, 3, 64, 1536, 30, 49152
    linears = [(hidden, heads * head), (hidden, kv * head), (hidden, kv * head)]
    linears += [(heads * head, hidden), (hidden, wide), (hidden, wide), (wide, hidden)]
    tokens = sum(len(row.ids) for row in batch)
    scored = sum(sum(row.trained[1:]) for row in batch)
    frozen = 4 * tokens * layers * sum(i * o for i, o in linears)
    adapters = 6 * tokens * layers * sum(RANK * (i + o) for i, o in linears)
    pairs = sum(len(row.ids) ** 2 / 2 for row in batch)
    return frozen + adapters + 12 * pairs * heads * head * layers + 4 * scored * hidden * vocab


def run_side(side: str, case: str, folder: Path, steps: int) -> dict:
    """Run one side in its own process; what it reports."""
    command = [sys.executable, str(Path(__file__).with_name("sides.py"))]
    command += [side, case, str(folder), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        tail = done.stderr.strip().splitlines()[-12:]
        return {"error": "\n".join(tail)}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(case: str, sides: list[str], folder: Path, quick: bool, peak: float) -> list[dict]:
    text = (folder / f"{case}.json").read_text()
    batches = [[Row(**row) for row in batch] for batch in json.loads(text)]
    ours, theirs = CASES[case][4 if quick else 3]
    found = []
    for side in sides:
        steps = ours if side.startswith("ours") else theirs
        result = run_side(side, case, folder, steps)
        result = {"case": case, "side": side, "steps": steps, **result}
        if "seconds" in result:
            # The first step warms up (allocator, kernels, caches) unless it is the only one.
            timed = range(1 if steps > 1 else 0, steps)
            seconds = sum(result["seconds"][i] for i in timed)
            tokens = sum(len(row.ids) for i in timed for row in batches[i])
            result["tokens_per_second"] = tokens / seconds
            result["share_of_peak"] = sum(useful_flops(batches[i]) for i in timed) / seconds / peak
        found.append(result)
        print(f"{case:12} {side:18} {line(result)}", file=sys.stderr, flush=True)
    return found


def line(result: dict) -> str:
    if "error" in result:
        return result["error"]
    return (
        f"{result['tokens_per_second']:7.0f} tok/s {result['peak_mib']:7.0f} MiB "
        f"{100 * result['share_of_peak']:5.1f} % of peak  losses "
        + " ".join(f"{x:.4f}" for x in result["losses"])
    )


def table(results: list[dict], peak: float) -> str:
    """The results as markdown."""
    lines = [
        f"bf16 matmul peak {peak / 1e12:.2f} TFLOP/s; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {_processor()}",
        "",
        "| case | side | tokens/s | peak MiB | share of peak | loss, first to last common step |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        if "error" in result:
            lines.append(f"| {result['case']} | {result['side']} | failed | | | |")
            continue
        common = min(r["steps"] for r in results if r["case"] == result["case"])
        lines.append(
            f"| {result['case']} | {result['side']} | {result['tokens_per_second']:.0f} "
            f"| {result['peak_mib']:.0f} | {100 * result['share_of_peak']:.0f} % "
            f"| {' '.join(f'{x:.4f}' for x in result['losses'][:common])} |"
        )
    for ours in results:
        for peer in results:
            same = ours["case"] == peer["case"] and ours["side"] == "ours" != peer["side"]
            if (
                same
                and not peer["side"].startswith("ours")
                and "losses" in ours
                and "losses" in peer
            ):
                lines.append(_against(ours, peer))
    return "\n".join(lines)


def _against(ours: dict, peer: dict) -> str:
    gaps = [abs(a - b) for a, b in zip(ours["losses"], peer["losses"])]
    return (
        f"\n{ours['case']}: ours against {peer['side']}: "
        f"{ours['tokens_per_second'] / peer['tokens_per_second']:.1f} x tokens/s, "
        f"{ours['peak_mib'] / peer['peak_mib']:.2f} of its memory, "
        f"largest loss difference {max(gaps):.1e}"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for text in cpuinfo.read_text().splitlines():
            if text.startswith("model name"):
                return text.partition(": ")[2]
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--side", choices=SIDES, action="append")
    given = parser.parse_args()
    peak = matmul_peak()
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as home:
        prepare(Path(home))
        for case in given.case or CASES:
            sides = [s for s in given.side or SIDES if s in SIDES_OF.get(case, SIDES)]
            results += measure(case, sides, Path(home), given.quick, peak)
    print(table(results, peak))
    print(json.dumps({"peak_flops": peak, "results": results}))


if __name__ == "__main__":
    main()
