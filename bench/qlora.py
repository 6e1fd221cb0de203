"""QLoRA side by side: ours, and transformers + peft + bitsandbytes, on SmolLM2-135M in NF4.

    python bench/qlora.py [--shape 1b]

Each side runs in its own process on the same rows: load a bf16 checkpoint into NF4 with double
quantisation, then LoRA r=16 on all linears, AdamW, 2 rows of 512 tokens a step. Prints the time and
memory of loading, tokens a second and the peak of training, then JSON. `--shape 1b`: a random model
of a billion parameters in place of SmolLM2, one step a side.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rows import Row, full_rows, smollm2_gguf

STEPS = {"ours": 4, "peer": 2}
FIELDS = {
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}  # fmt: skip
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
BILLION = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}  # fmt: skip


def prepare(folder: Path, shape: str) -> None:
    """The base in bf16, and the rows."""
    from topwork import AutoModelForCausalLM, AutoTokenizer, Config

    gguf = smollm2_gguf()
    rows = full_rows(AutoTokenizer.from_pretrained(gguf), 2 * max(STEPS.values()), 512)
    if shape == "1b":
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Config(**BILLION), dtype=torch.bfloat16)
        rows = [Row([i % BILLION["vocab_size"] for i in r.ids], r.trained) for r in rows]
    else:
        model = AutoModelForCausalLM.from_pretrained(gguf, dtype="bfloat16")
    model.save_pretrained(folder / "base", max_shard_size="500MB")
    (folder / "rows.json").write_text(json.dumps([row.ids for row in rows]))


def held(name: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most since the last reset."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(name + ":")[2].split()[0]) / 1024


def side(name: str, folder: Path, steps: int) -> dict:
    """One side in this process."""
    from profile_step import plain_step

    torch.manual_seed(1)
    if name == "ours":
        from topwork import AutoModelForCausalLM, BitsAndBytesConfig, LoraConfig, get_peft_model
    else:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        from peft import LoraConfig, get_peft_model
    config = BitsAndBytesConfig(**FIELDS)
    before, start = held("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.bfloat16, quantization_config=config
    )
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - start}
    found["load_peak_mib"] = held("VmHWM") - before
    found["loaded_mib"] = held("VmRSS") - before
    model = get_peft_model(model, LoraConfig(**LORA)).train()
    ids = json.loads((folder / "rows.json").read_text())
    batches = [[Row(r, [True] * len(r)) for r in ids[at : at + 2]] for at in range(0, 2 * steps, 2)]
    step = plain_step(model) if name == "ours" else peer_step(model)
    seconds, losses = [], []
    for batch in batches:
        start = time.perf_counter()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - start)
    timed = seconds[1:] or seconds
    tokens = sum(len(row.ids) for row in batches[0])
    return {
        **found, "tokens_per_second": tokens * len(timed) / sum(timed), "losses": losses,
        "peak_mib": held("VmHWM"),
    }  # fmt: skip


def peer_step(model: Any) -> Any:
    from sides import step_of

    def loss_of(batch: list[Row]) -> torch.Tensor:
        ids = torch.tensor([row.ids for row in batch])
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    return step_of([p for p in model.parameters() if p.requires_grad], loss_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=("smollm2", "1b"), default="smollm2")
    parser.add_argument("--side", nargs=3)
    given = parser.parse_args()
    if given.side:
        name, folder, steps = given.side
        print(json.dumps(side(name, Path(folder), int(steps))))
        return
    results = {}
    with tempfile.TemporaryDirectory() as home:
        prepare(Path(home), given.shape)
        for name, steps in STEPS.items():
            steps = 1 if given.shape == "1b" else steps
            command = [sys.executable, __file__, "--side", name, home, str(steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            results[name] = found = json.loads(done.stdout.strip().splitlines()[-1])
            print(
                f"{name:5} load {found['load_seconds']:5.1f} s, {found['load_peak_mib']:5.0f} MiB "
                f"at most, {found['loaded_mib']:5.0f} after; {found['tokens_per_second']:5.0f} "
                f"tok/s, peak {found['peak_mib']:5.0f} MiB; losses "
                + " ".join(f"{x:.4f}" for x in found["losses"]),
                flush=True,
            )
    ours, peer = results["ours"], results["peer"]
    print(
        f"{ours['tokens_per_second'] / peer['tokens_per_second']:.1f} x tokens/s, "
        f"{ours['peak_mib'] / peer['peak_mib']:.2f} of the peak, "
        f"{peer['load_seconds'] / ours['load_seconds']:.1f} x as fast to load, "
        f"{ours['load_peak_mib'] / peer['load_peak_mib']:.2f} of its memory while loading"
    )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
