"""`topwork`: the commands and their options. Each imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from topwork._version import __version__
from topwork.errors import TopworkError

app = typer.Typer(
    name="topwork",
    help="Load open language models, adapt them, talk to the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Extra = {"ignore_unknown_options": True}
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG.yaml] [--FIELD VALUE]…", help="YAML file, then fields."),
]
Model = Annotated[str, typer.Argument(help="Folder, Hub id, .gguf file, or an adapter's folder.")]
Adapter = Annotated[str | None, typer.Option(help="Folder or Hub id of an adapter to switch on.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16 or float32.")]
FourBit = Annotated[bool, typer.Option("--load-in-4bit", help="Quantise the base to NF4.")]
EightBit = Annotated[bool, typer.Option("--load-in-8bit", help="Quantise the base to 8 bits.")]
NewTokens = Annotated[int, typer.Option(help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens of this joint share.")]
Seed = Annotated[int | None, typer.Option(help="Makes the draws repeatable.")]


@app.callback(invoke_without_command=True)
def common(version: Annotated[bool, typer.Option("--version", help="Print it.")] = False) -> None:
    if version:
        print(f"topwork {__version__}")
        raise typer.Exit


@app.command(context_settings=Extra)
def train(words: Words = None) -> None:
    """Train by a YAML file; every field can be given as --field value too.

    The file needs `model` and `data`. Beside the fields of the objective's configuration
    (output_dir, learning_rate, max_length, beta …) it may have `objective` (sft, dpo, grpo …),
    `eval_data`, `resume`, `lora` (its fields, or false), or `adapter` (those of any method, by its
    `peft_type`), `load_in_4bit` or `load_in_8bit`. `topwork fields` lists them all.

        topwork train --model HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl
    """
    from topwork.cli.train import train

    print(train(*_config(words)))


@app.command()
def models(
    markdown: Annotated[bool, typer.Option(help="As the page docs/families.md.")] = False,
) -> None:
    """List the families of models and what each can do."""
    from topwork.models.capabilities import capabilities, families_page

    if markdown:
        print(families_page(), end="")
        return
    for name, row in capabilities().items():
        print(f"{name:14} {', '.join(task for task, can in row.items() if can)}")


@app.command("fields")
def list_fields(
    name: Annotated[str | None, typer.Argument(help="sft, grpo …, or lora, ia3 …")] = None,
) -> None:
    """List what the file of a run may say: of an objective, or of an adapter's method."""
    from topwork.cli.fields import page

    for line in page(name):
        print(line)


@app.command(context_settings=Extra)
def preview(
    words: Words = None,
    rows: Annotated[int, typer.Option(help="Rows to show.")] = 3,
) -> None:
    """Show what `topwork train` would train on: counts, and rows with trained tokens coloured."""
    from topwork.cli.train import preview

    preview(*_config(words), rows)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text, or - to read it from stdin.")],
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    raw: Annotated[
        bool, typer.Option(help="Go on with the text itself, no chat template.")
    ] = False,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    load_in_4bit: FourBit = False,
    load_in_8bit: EightBit = False,
) -> None:
    """Print the answer to one prompt, as it comes."""
    from topwork.cli import talk

    text = sys.stdin.read() if prompt == "-" else prompt
    draws = _draws(max_new_tokens, temperature, top_p, seed)
    talk.generate(model, text, adapter, dtype, raw, draws, _bits(load_in_4bit, load_in_8bit))


@app.command()
def chat(
    model: Model,
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    dtype: Dtype = "auto",
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.2,
    top_p: TopP = 0.9,
    seed: Seed = None,
    load_in_4bit: FourBit = False,
    load_in_8bit: EightBit = False,
) -> None:
    """Talk to a model in the terminal."""
    from topwork.cli import talk

    draws = _draws(max_new_tokens, temperature, top_p, seed)
    talk.chat(model, adapter, dtype, system, draws, _bits(load_in_4bit, load_in_8bit))


@app.command()
def serve(
    model: Model,
    adapter: Annotated[
        list[str] | None, typer.Option(help="PATH or NAME=PATH of an adapter; several.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    load_in_8bit: EightBit = False,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="TOPWORK_API_KEY", help="What clients must know; off loopback needed."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="A page's origin that may ask; several.")
    ] = None,
    max_rows: Annotated[int, typer.Option(help="Answers that are made at a time.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 4096,
    cache_tokens: Annotated[int, typer.Option(help="Tokens that are kept at a time.")] = 32768,
    load_adapters: Annotated[
        bool, typer.Option("--load-adapters", help="Clients may have adapters loaded.")
    ] = False,
    processed_logprobs: Annotated[
        bool, typer.Option("--processed-logprobs", help="Tell those of the draws.")
    ] = False,
) -> None:
    """Serve a model and its adapters over OpenAI's protocol, with a page to talk to them."""
    from topwork.cli import serve as serving
    from topwork.serve import Door, Limits

    serving.serve(
        model, adapter or [], name, dtype, _bits(load_in_4bit, load_in_8bit),
        door=Door.at(host, api_key, allow_origin or ()),
        limits=Limits(max_rows=max_rows, max_new_tokens=max_new_tokens, cache_tokens=cache_tokens),
        host=host, port=port,
        loads_adapters=load_adapters, processed_logprobs=processed_logprobs,
    )  # fmt: skip


@app.command()
def merge(
    model: Annotated[str, typer.Argument(help="The base.")],
    adapter: Annotated[str, typer.Argument(help="The adapter's folder or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    dtype: Dtype = "auto",
) -> None:
    """Write the base with the adapter in its weights, as a model of its own."""
    from topwork.cli import talk

    talk.merge(model, adapter, output, dtype)
    print(output)


adapters = typer.Typer(
    help="Look at adapters, compare them, make others of them.", no_args_is_help=True
)
app.add_typer(adapters, name="adapters")
adapters.command("merge")(merge)
AnAdapter = Annotated[str, typer.Argument(help="Folder or Hub id of an adapter.")]
Base = Annotated[
    str | None, typer.Option(help="The base (folder or Hub id), if not the one it names.")
]


@adapters.command("list")
def list_adapters(
    folder: Annotated[Path, typer.Argument(help="Where to look, and below.")] = Path(),
) -> None:
    """List the adapters in a folder: method, size, base."""
    from topwork.cli.adapters import listing

    print(listing(folder))


@adapters.command()
def inspect(adapter: AnAdapter, base: Base = None) -> None:
    """Say what an adapter is, how much it changes where, and whether it fits its base."""
    from topwork.cli.adapters import inspection

    print(inspection(adapter, base))


@adapters.command()
def diff(first: AnAdapter, second: AnAdapter) -> None:
    """Compare two adapters: settings, modules, sizes and directions of their changes."""
    from topwork.cli.adapters import difference

    print(difference(first, second))


@adapters.command()
def compose(
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    parts: Annotated[list[str], typer.Argument(help="PATH or PATH:WEIGHT, several.")],
    kind: Annotated[
        str, typer.Option(help="linear, cat, svd, ties, dare_linear, dare_ties, …")
    ] = "cat",
    density: Annotated[float | None, typer.Option(help="Share kept by ties and dare.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the result, for the svd kinds.")] = None,
    base: Base = None,
) -> None:
    """Make one adapter out of several, each with a weight.

    topwork adapters compose both first:0.7 second:0.3 --kind svd --rank 16
    """
    from topwork.cli.adapters import compose

    compose(output, parts, kind, base, density, rank)
    print(output)


@adapters.command()
def convert(
    adapter: AnAdapter,
    output: Annotated[Path, typer.Argument(help="A .gguf file, or a folder (with --rank).")],
    rank: Annotated[
        float | None, typer.Option(help="Write as LoRA: directions, or share of energy below 1.")
    ] = None,
    base: Base = None,
) -> None:
    """Write an adapter as a .gguf file for llama.cpp, or any method's adapter as LoRA."""
    from topwork.cli.adapters import convert

    convert(adapter, output, rank, base)
    print(output)


@app.command()
def extract(
    tuned: Annotated[str, typer.Argument(help="The tuned model.")],
    base: Annotated[str, typer.Argument(help="What it was tuned from.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    rank: Annotated[float, typer.Option(help="Directions, or share of energy below 1.")] = 16,
    dtype: Dtype = "float32",
    save_rest: Annotated[
        bool, typer.Option("--save-rest", help="Keep changed norms and embeddings whole.")
    ] = False,
) -> None:
    """Write the difference of two models as a LoRA adapter."""
    from topwork.cli.adapters import extract

    print(extract(tuned, base, output, rank, dtype, save_rest))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the adapter goes.")] = Path("demo"),
    model: Annotated[str | None, typer.Option(help="Another model than SmolLM2.")] = None,
) -> None:
    """Tune SmolLM2-135M on a small real task and show what it gained. Some minutes on 2 cores."""
    from topwork.cli.demo import demo

    demo(output, model)


def _config(words: list[str] | None) -> tuple[Path | None, list[str]]:
    """The file in front, if one is there, and the fields."""
    words = words or []
    if words and not words[0].startswith("--"):
        return Path(words[0]), words[1:]
    return None, words


def _bits(four: bool, eight: bool) -> list[str]:
    return [name for name, on in (("load_in_4bit", four), ("load_in_8bit", eight)) if on]


def _draws(new: int, temperature: float, top_p: float, seed: int | None) -> dict[str, Any]:
    if temperature == 0:
        return {"max_new_tokens": new, "do_sample": False}
    return {
        "max_new_tokens": new, "do_sample": True, "temperature": temperature, "top_p": top_p,
        "seed": seed,
    }  # fmt: skip


def main() -> None:
    """The entry point: errors that Topwork means come as one line, with exit status 2."""
    try:
        app()
    except TopworkError as error:
        print(f"topwork: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
