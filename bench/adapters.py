"""Every adapter method side by side with peft: trainable share, tokens a second, peak memory.

    python bench/adapters.py [--method NAME ...] [--steps N] [--into FILE] [--cpu]
    python bench/adapters.py --table FILE

A model of SmolLM2's shape with 8 of its 30 layers, bf16, adapters on q, v and the MLP's down
projection where a method does not say otherwise, 2 rows of 256 tokens, AdamW. Each side runs in its
own process, one after the other; ours packs the rows and holds no logits, as its trainer does.
`--into` adds each result as a line of JSON, so that a table can be made of several runs (`--table`
prints the last result of each method). `--cpu` counts the processor's time of one thread: for a
machine that is not alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rows import Row, full_rows, smollm2_gguf

TARGETS = ["q_proj", "v_proj", "down_proj"]
WORDS = {"target_modules": None}  # no layers: virtual tokens
# name → configuration class and its options.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 16}),
    "lora-dropout": ("LoraConfig", {"r": 16, "lora_dropout": 0.05}),
    "lora-all": ("LoraConfig", {"r": 16, "target_modules": "all-linear"}),
    "dora": ("LoraConfig", {"r": 16, "use_dora": True}),
    "dora-all": ("LoraConfig", {"r": 16, "use_dora": True, "target_modules": "all-linear"}),
    "adalora": ("AdaLoraConfig", {"init_r": 12, "total_step": 100}),
    "adamss": ("AdamssConfig", {}),
    "adaption_prompt": ("AdaptionPromptConfig", {"adapter_len": 10, "adapter_layers": 6, **WORDS}),
    "beft": ("BeftConfig", {"target_modules": ["v_proj"]}),
    "boft": ("BOFTConfig", {"boft_block_size": 8}),
    "c3a": ("C3AConfig", {"block_size": 64}),
    "cartridge": ("CartridgeConfig", {"num_virtual_tokens": 16, **WORDS}),
    "cpt": ("CPTConfig", {
        "cpt_token_ids": [5] * 16, "cpt_mask": [1] * 16,
        "cpt_tokens_type_mask": [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4, **WORDS,
    }),
    "deft": ("DeftConfig", {"r": 8}),
    "delora": ("DeloraConfig", {"r": 8}),
    "fourierft": ("FourierFTConfig", {}),
    "frod": ("FrodConfig", {"progressbar": False}),
    "glora": ("GloraConfig", {"r": 8}),
    "gralora": ("GraloraConfig", {"r": 16}),
    "hira": ("HiraConfig", {"r": 16}),
    "hra": ("HRAConfig", {"r": 8}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "lily": ("LilyConfig", {"r": 16}),
    "ln_tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    "loha": ("LoHaConfig", {"r": 8}),
    "lokr": ("LoKrConfig", {"r": 8}),
    "miss": ("MissConfig", {"r": 32}),
    "multitask_prompt": ("MultitaskPromptTuningConfig", {
        "num_virtual_tokens": 16, "num_tasks": 2, **WORDS,
    }),
    "oft": ("OFTConfig", {"oft_block_size": 32}),
    "osf": ("OSFConfig", {}),
    "p_tuning": ("PromptEncoderConfig", {
        "num_virtual_tokens": 16, "encoder_hidden_size": 576, **WORDS,
    }),
    "peanut": ("PeanutConfig", {"r": 8}),
    "poly": ("PolyConfig", {"r": 8, "n_tasks": 2, "n_skills": 2}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 16, **WORDS}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 16, **WORDS}),
    "psoft": ("PsoftConfig", {"r": 32}),
    "pvera": ("PveraConfig", {"r": 64}),
    "randlora": ("RandLoraConfig", {"r": 32}),
    "road": ("RoadConfig", {}),
    "shadow": ("ShadowConfig", {"task_type": "CAUSAL_LM", **WORDS}),
    "shira": ("ShiraConfig", {"r": 16, "random_seed": 0}),
    "supertuning": ("SupertuningConfig", {}),
    "tinylora": ("TinyLoraConfig", {}),
    "trainable_tokens": ("TrainableTokensConfig", {
        "token_indices": list(range(64)), "target_modules": ["embed_tokens"],
    }),
    "unilora": ("UniLoraConfig", {}),
    "vblora": ("VBLoRAConfig", {"vector_length": 64}),
    "vera": ("VeraConfig", {"r": 64}),
    "waveft": ("WaveFTConfig", {}),
    "xlora": ("XLoraConfig", {"xlora_size": 64, "target_modules": None}),
}  # fmt: skip
OF_TASKS = ("multitask_prompt", "poly")
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


def adapted(home: Any, base: Any, method: str, folder: Path) -> Any:
    """`base` with the adapter, of the library `home`."""
    kind, options = METHODS[method]
    options = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    if options["target_modules"] is None:
        del options["target_modules"]
    if method == "xlora":
        options |= {"hidden_size": 576, "adapters": lora_files(home, folder)}
    return home.get_peft_model(base, getattr(home, kind)(**options)).train()


def lora_files(home: Any, folder: Path) -> dict[str, str]:
    """Two LoRA adapters, which X-LoRA mixes."""
    places = {name: str(folder / name) for name in ("0", "1")}
    if not Path(places["1"]).exists():
        from topwork import AutoModelForCausalLM, LoraConfig, get_peft_model

        for place in places.values():
            base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
            config = LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False)
            get_peft_model(base, config).save_pretrained(place)
    return places


def call_loss(model: Any, rows: list[Row], extra: dict[str, Any]) -> torch.Tensor:
    """The loss of the familiar call."""
    ids = torch.tensor([row.ids for row in rows])
    return model(input_ids=ids, labels=ids, **extra).loss


def our_loss(model: Any, extra: dict[str, Any]) -> Callable[[list[Row]], torch.Tensor]:
    """As the trainer computes it: packed rows, no logits of them."""

    def loss_of(rows: list[Row]) -> torch.Tensor:
        ids = torch.tensor([i for row in rows for i in row.ids])
        lengths = tuple(len(row.ids) for row in rows)
        ends = torch.tensor(lengths).cumsum(0) - 1
        at = torch.ones(len(ids), dtype=torch.bool).index_fill(0, ends, False).nonzero()[:, 0]
        with model.beside() as tell:
            hidden = model.backbone(ids[None], lengths=lengths, **extra)
            own = tell(at, ids[at + 1])
        total = -model.token_logprobs(hidden[0, at], ids[at + 1]).sum()
        units = len(at) + model.own_targets * len(rows)
        loss, penalty = (total if own is None else total + own) / units, model.penalty()
        return loss if penalty is None else loss + penalty

    return loss_of


def side(name: str, method: str, folder: Path, steps: int, cpu: bool) -> dict[str, Any]:
    """One side in this process."""
    from sides import peak_mib, step_of

    if cpu:
        torch.set_num_threads(1)
    torch.manual_seed(1)
    if name == "ours":
        import topwork as home
        from topwork import AutoModelForCausalLM
        from topwork.ops.memory import keep_freed_memory

        keep_freed_memory()
    else:
        from transformers import AutoModelForCausalLM

        import peft as home
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    base.config.use_cache = False  # X-LoRA of the peer asks for it
    model = adapted(home, base, method, folder)
    ids = json.loads((folder / "rows.json").read_text())
    batch = [Row(row, [True] * len(row)) for row in ids]
    extra = {"task_ids": torch.tensor([0, 1])} if method in OF_TASKS else {}

    def peers_loss(rows: list[Row]) -> torch.Tensor:
        return call_loss(model, rows, {"use_cache": False, **extra})

    trained = [p for p in model.parameters() if p.requires_grad]
    step = step_of(trained, our_loss(model, extra) if name == "ours" else peers_loss)
    clock = time.process_time if cpu else time.perf_counter
    seconds, losses = [], []
    for _ in range(steps):
        start = clock()
        losses.append(step(batch))
        seconds.append(clock() - start)
    count, whole = model.get_nb_trainable_parameters()
    return {
        "share": count / whole,
        "tokens_per_second": ROWS * TOKENS / min(seconds[1:]),  # the first step warms up
        "peak_mib": peak_mib(),
        "losses": [round(loss, 3) for loss in losses],
    }


HEAD = """| method | trained | peft tok/s | ours | ratio | peft MiB | ours | ratio |
|---|---|---|---|---|---|---|---|"""


def line(found: dict[str, Any]) -> str:
    """One row of the table."""
    peft, ours = found["peft"], found["ours"]
    rates, peaks = (
        [s[what] for s in (peft, ours)] for what in ("tokens_per_second", "peak_mib")
    )  # fmt: skip
    return (
        f"| {found['method']} | {100 * ours['share']:.3f} % | {rates[0]:.0f} | {rates[1]:.0f} "
        f"| {rates[1] / rates[0]:.2f} | {peaks[0]:.0f} | {peaks[1]:.0f} "
        f"| {peaks[1] / peaks[0]:.2f} |"
    )


def measured(method: str, folder: Path, steps: int, cpu: bool, sides: list[str]) -> dict[str, Any]:
    """The sides of one method, each in its own process; "failed" where one ends badly."""
    found: dict[str, Any] = {"method": method, "cpu": cpu}
    for name in sides:
        command = [sys.executable, __file__, "--side", name, method, str(folder)]
        command += ["--steps", str(steps), *(["--cpu"] if cpu else [])]
        threads = {"OMP_NUM_THREADS": "1"} if cpu else {}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | threads
        )
        if done.returncode:
            return {**found, "failed": f"{name}: {done.stderr.strip()[-400:]}"}
        found[name] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--into", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--only", choices=("peft", "ours"), action="append")
    parser.add_argument("--side", nargs=3)
    given = parser.parse_args()
    if given.side:
        name, method, folder = given.side
        print(json.dumps(side(name, method, Path(folder), given.steps, given.cpu)))
        return
    print(HEAD)
    if given.table:
        results = [json.loads(text) for text in given.table.read_text().splitlines()]
        latest = {found["method"]: found for found in results}
        print("\n".join(line(latest[name]) for name in METHODS if name in latest))
        return
    folder = Path(tempfile.gettempdir()) / "topwork-bench" / "adapters"
    if not (folder / "base").exists():
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder)
    for method in given.method or METHODS:
        found = measured(method, folder, given.steps, given.cpu, given.only or ["peft", "ours"])
        if "failed" in found or given.only:
            print(json.dumps(found), flush=True)
            continue
        print(line(found), flush=True)
        if given.into:
            with given.into.open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
