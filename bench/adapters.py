"""Every adapter method side by side with peft: trainable share, tokens a second, peak memory.

    python bench/adapters.py [--method NAME ...] [--steps N]

A model of SmolLM2's shape with 8 of its 30 layers, bf16, adapters on q, v and the MLP's down
projection where a method does not say otherwise, 2 rows of 256 tokens, AdamW. Each side runs in its
own process, one after the other; ours packs the rows and holds no logits, as its trainer does.
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

TARGETS = ["q_proj", "v_proj", "down_proj"]
# name → configuration class and its options.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 16}),
    "lora-dropout": ("LoraConfig", {"r": 16, "lora_dropout": 0.05}),
    "lora-all": ("LoraConfig", {"r": 16, "target_modules": "all-linear"}),
    "dora": ("LoraConfig", {"r": 16, "use_dora": True}),
    "dora-all": ("LoraConfig", {"r": 16, "use_dora": True, "target_modules": "all-linear"}),
    "adalora": ("AdaLoraConfig", {"init_r": 12, "total_step": 100}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "loha": ("LoHaConfig", {"r": 8}),
    "lokr": ("LoKrConfig", {"r": 8}),
    "vera": ("VeraConfig", {"r": 64}),
    "randlora": ("RandLoraConfig", {"r": 32}),
    "vblora": ("VBLoRAConfig", {"vector_length": 64}),
    "oft": ("OFTConfig", {"oft_block_size": 32}),
    "boft": ("BOFTConfig", {"boft_block_size": 8}),
    "hra": ("HRAConfig", {"r": 8}),
    "fourierft": ("FourierFTConfig", {}),
    "c3a": ("C3AConfig", {"block_size": 64}),
    "road": ("RoadConfig", {}),
    "miss": ("MissConfig", {"r": 32}),
    "hira": ("HiraConfig", {"r": 16}),
    "delora": ("DeloraConfig", {"r": 8}),
    "shira": ("ShiraConfig", {"r": 16, "random_seed": 0}),
    "ln_tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 16, "target_modules": None}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 16, "target_modules": None}),
}
ROWS, TOKENS = 2, 256


def prepare(folder: Path) -> None:
    """The base and the rows."""
    from topwork import AutoModelForCausalLM, AutoTokenizer, Config

    tokenizer = AutoTokenizer.from_pretrained(smollm2_gguf())
    (folder / "rows.json").write_text(
        json.dumps([row.ids for row in full_rows(tokenizer, ROWS, TOKENS)])
    )
    config = Config(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
        num_hidden_layers=8, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=2048, tie_word_embeddings=True, rope_theta=100000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "base")


def side(name: str, method: str, folder: Path, steps: int) -> dict[str, Any]:
    """One side in this process."""
    from profile_step import plain_step
    from sides import peak_mib, step_of

    kind, options = METHODS[method]
    options = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    if options["target_modules"] is None:
        del options["target_modules"]
    torch.manual_seed(1)
    if name == "ours":
        import topwork as home
        from topwork import AutoModelForCausalLM
    else:
        from transformers import AutoModelForCausalLM

        import peft as home
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = home.get_peft_model(base, getattr(home, kind)(**options)).train()
    ids = json.loads((folder / "rows.json").read_text())
    batch = [Row(row, [True] * len(row)) for row in ids]

    def loss_of(rows: list[Row]) -> torch.Tensor:
        ids = torch.tensor([row.ids for row in rows])
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    trained = [p for p in model.parameters() if p.requires_grad]
    step = plain_step(model) if name == "ours" else step_of(trained, loss_of)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - start)
    count, whole = model.get_nb_trainable_parameters()
    rate = ROWS * TOKENS / min(seconds[1:])  # the first step warms up
    return {"share": count / whole, "tokens_per_second": rate, "peak_mib": peak_mib()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--side", nargs=3)
    given = parser.parse_args()
    if given.side:
        name, method, folder = given.side
        print(json.dumps(side(name, method, Path(folder), given.steps)))
        return
    print("| method | trained | peft tok/s | ours | ratio | peft MiB | ours | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as home:
        prepare(Path(home))
        for method in given.method or METHODS:
            found = {}
            for name in ("peft", "ours"):
                command = [sys.executable, __file__, "--side", name, method, home]
                done = subprocess.run(
                    [*command, "--steps", str(given.steps)],
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                if done.returncode:
                    print(f"{method} {name}: {done.stderr.strip()[-400:]}", flush=True)
                    break
                found[name] = json.loads(done.stdout.strip().splitlines()[-1])
            if len(found) < 2:
                continue
            peft, ours = found["peft"], found["ours"]
            print(
                f"| {method} | {100 * ours['share']:.3f} % | {peft['tokens_per_second']:.0f} "
                f"| {ours['tokens_per_second']:.0f} "
                f"| {ours['tokens_per_second'] / peft['tokens_per_second']:.1f} "
                f"| {peft['peak_mib']:.0f} | {ours['peak_mib']:.0f} "
                f"| {ours['peak_mib'] / peft['peak_mib']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
