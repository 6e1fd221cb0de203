"""`topwork generate` and `topwork chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from topwork.errors import ConfigError, DataError


def base_of(model: str) -> tuple[str, str | None]:
    """The base and the adapter that `model` names: an adapter's folder names its base itself."""
    from topwork.peft import PeftConfig

    if not (Path(model) / "adapter_config.json").is_file():
        return model, None
    base = PeftConfig.from_pretrained(model).base_model_name_or_path
    if base is None:
        raise ConfigError(f"{model} is an adapter and does not name its base: pass it too")
    return base, model


def load(
    model: str, adapter: str | None, dtype: str, bits: list[str] | None = None
) -> tuple[Any, Any]:
    """A model, with an adapter if one is given (or if `model` itself is one), and its tokenizer.

    `bits`: "load_in_4bit" or "load_in_8bit" quantises the base.
    """
    return load_several(model, {} if adapter is None else {"default": adapter}, dtype, bits)


def load_several(
    model: str, adapters: dict[str, str], dtype: str, bits: list[str] | None = None
) -> tuple[Any, Any]:
    """The same with several adapters by name, the first of which is active."""
    from topwork.cli.train import quantised
    from topwork.models import AutoModelForCausalLM
    from topwork.peft import PeftModel
    from topwork.text import AutoTokenizer

    if not adapters:
        model, own = base_of(model)
        adapters = {} if own is None else {"default": own}
    net: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, **(quantised(bits, None) if bits else {})
    )
    home = model
    for name, path in adapters.items():
        if isinstance(net, PeftModel):
            net.load_adapter(path, adapter_name=name)
        else:
            net = PeftModel.from_pretrained(net, path, adapter_name=name)
            home = path if (Path(path) / "tokenizer.json").is_file() else home
    return net, AutoTokenizer.from_pretrained(home)


def answer(net: Any, tokenizer: Any, ids: list[int], streamer: Any, **options: Any) -> list[int]:
    """The tokens that follow `ids`, the end token left out."""
    import torch

    given = torch.tensor([ids], device=net.device)
    out = net.generate(given, streamer=streamer, **options)[0, len(ids) :].tolist()
    stops = set(tokenizer.all_special_ids)
    while out and out[-1] in stops:
        out.pop()
    return out


def generate(
    model: str, prompt: str, adapter: str | None, dtype: str, raw: bool, options: dict[str, Any],
    bits: list[str] | None = None,
) -> None:  # fmt: skip
    """Print what `model` answers to `prompt`, as it comes."""
    from topwork.generation import TextStreamer

    if not prompt:
        raise DataError("the prompt is empty")
    net, tokenizer = load(model, adapter, dtype, bits)
    if raw or tokenizer.chat_template is None:
        ids = tokenizer(prompt)["input_ids"]
    else:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer(net, tokenizer, ids, streamer, **options)


def chat(
    model: str, adapter: str | None, dtype: str, system: str | None, options: dict[str, Any],
    bits: list[str] | None = None,
) -> None:  # fmt: skip
    """A conversation in the terminal. /new starts another one, /quit or Ctrl-D ends it."""
    from topwork.generation import TextStreamer

    net, tokenizer = load(model, adapter, dtype, bits)
    if tokenizer.chat_template is None:
        raise ConfigError(f"{model}: its tokenizer has no chat template; use `topwork generate`")
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    print(f"{model}{f' + {adapter}' if adapter else ''}: /new starts again, /quit ends")
    while True:
        try:
            said = input("› ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if said in ("/quit", "/exit"):
            return
        if said == "/new":
            messages = list(start)
            continue
        if not said:
            continue
        messages.append({"role": "user", "content": said})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            out = answer(net, tokenizer, ids, streamer, **options)
        except KeyboardInterrupt:
            print()
            messages.pop()
            continue
        except ConfigError as error:  # the conversation has outgrown the context
            print(f"{error}; /new starts again")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": tokenizer.decode(out)})


def merge(model: str, adapter: str, output: Path, dtype: str) -> None:
    """Write the base with the adapter in its weights, and the tokenizer, into `output`."""
    net, tokenizer = load(model, adapter, dtype)
    net.merge_and_unload(safe_merge=True).save_pretrained(output)
    tokenizer.save_pretrained(output)
