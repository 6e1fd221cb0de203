"""`topwork adapters` and `topwork extract`: adapters as things one keeps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from topwork.errors import CheckpointError, ConfigError
from topwork.peft.files import AdapterFile, LoraPair, compare, elsewhere, find_adapters

AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}

SHOWN = ("base_model_name_or_path", "revision", "inference_mode")  # elsewhere, or says nothing


# -- looking ---------------------------------------------------------------------------------------


def listing(folder: Path) -> str:
    """One line for each adapter at or below `folder`; one that cannot be read says why."""
    rows = [("adapter", "method", "numbers", "size", "base")]
    for home in find_adapters(folder):
        try:
            file = AdapterFile.open(home)
        except (ConfigError, CheckpointError) as error:
            rows.append((str(home), "?", "", "", str(error)))
            continue
        base = file.config.base_model_name_or_path or "not recorded"
        method = _method(file)
        rows.append((str(home), method, f"{file.numbers:,}", _size(file.nbytes), base))
    if len(rows) == 1:
        raise ConfigError(f"{folder}: there is no adapter at or below it")
    return _table(rows)


def inspection(adapter: str, base: str | None) -> str:
    """What the adapter is, how much it changes and where; and, with a base, whether it fits."""
    file = AdapterFile.open(adapter)
    config = file.config
    defaults = type(config)().to_dict()
    lines = [
        f"{_method(file)}, {file.numbers:,} numbers, {_size(file.nbytes)}",
        f"base {config.base_model_name_or_path or 'not recorded'}"
        + (f" at {config.revision}" if config.revision else ""),
    ]
    for key, value in config.to_dict().items():
        if value != defaults.get(key) and key not in SHOWN:
            shown = f"{len(value)} names" if isinstance(value, list) and len(value) > 12 else value
            lines.append(f"{key}: {shown}")
    lines += ["", _contents(file)]
    lines += ["", *elsewhere(file)]
    if file.broken:
        lines.append(f"NOT FINITE: {', '.join(file.broken)}")
    named = base or config.base_model_name_or_path
    if base is not None or (named and Path(named).exists()):
        model = _fitted(file, str(named), base is not None)
        lines.append(f"fits {named} ({model.config.model_type}): every name and shape")
    return "\n".join(lines)


def _contents(file: AdapterFile) -> str:
    """The tensors by kind of module; for LoRA the sizes of the changes too."""
    try:
        pairs = file.pairs()
        rest = file.besides_pairs()
    except ConfigError:
        pairs, rest = {}, list(file.tensors)
    groups: dict[str, list[LoraPair]] = defaultdict(list)
    for path, pair in pairs.items():
        groups[_kind(path)].append(pair)
    rows = [("modules", "count", "rank", "norm of the change: least, mean, most")]
    for kind, found in groups.items():
        norms = [pair.norm for pair in found]
        ranks = sorted({len(pair.a) for pair in found})
        what = f"{min(norms):.4g}  {fmean(norms):.4g}  {max(norms):.4g}"
        rank = "-".join(map(str, (ranks[0], ranks[-1]) if len(ranks) > 1 else ranks))
        rows.append((kind, str(len(found)), rank, what if max(norms) else "0: changes nothing"))
    lines = [_table(rows)] if groups else []
    shapes: dict[tuple[str, tuple[int, ...]], int] = defaultdict(int)
    for key in rest:
        shapes[_kind(key), tuple(file.tensors[key].shape)] += 1
    if shapes:
        tensors = [("other tensors", "count", "shape")]
        tensors += [(k, str(n), "×".join(map(str, shape))) for (k, shape), n in shapes.items()]
        lines.append(_table(tensors))
    return "\n".join(lines)


def difference(first: str, second: str) -> str:
    """Where two adapters differ: settings, modules, sizes and directions of their changes."""
    found = compare(AdapterFile.open(first), AdapterFile.open(second))
    lines = [f"{key}: {a!r} → {b!r}" for key, (a, b) in found.settings.items()]
    for what, paths in (("first", found.only_first), ("second", found.only_second)):
        if paths:
            lines.append(f"only in the {what}: {len(paths)}: {', '.join(paths[:8])}")
    groups: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for path, numbers in found.modules.items():
        groups[_kind(path)].append(numbers)
    if not found.settings and all(_same(n) for ns in groups.values() for n in ns):
        lines.append("the same changes, to rounding")
    rows = [("modules", "count", "norm of the first", "of the second", "cosine")]
    for kind, numbers in groups.items():
        left, right = (f"{fmean(n[i] for n in numbers):.4g}" for i in (0, 1))
        cosine = fmean(n[2] for n in numbers)
        shown = "other shapes" if math.isnan(cosine) else f"{cosine:.4f}"
        rows.append((kind, str(len(numbers)), left, right, shown))
    return "\n".join([*lines, _table(rows)])


def _same(numbers: tuple[float, float, float]) -> bool:
    left, right, cosine = numbers
    return math.isclose(left, right, rel_tol=1e-5) and (cosine > 1 - 1e-9 or left == right == 0)


# -- making ----------------------------------------------------------------------------------------


def compose(
    output: Path, adapters: list[str], kind: str, base: str | None, density: float | None,
    rank: int | None,
) -> None:  # fmt: skip
    """One adapter out of several given as PATH or PATH:WEIGHT. The base's weights are not read."""
    from topwork.peft import PeftModel

    given = [_weighted(word) for word in adapters]
    files = [AdapterFile.open(path) for path, _ in given]
    named = {file.config.base_model_name_or_path for file in files}
    if base is None and len(named) > 1:
        raise ConfigError(
            f"the adapters name different bases ({', '.join(map(str, sorted(map(str, named))))}); "
            "if they are copies of one model, name it by --base"
        )
    source = base or named.pop()
    if source is None:
        raise ConfigError("no adapter names its base; name it by --base")
    model = _fitted(files[0], source, base is not None)
    names = [f"part{i}" for i in range(len(files))]
    adapted = PeftModel.from_pretrained(model, files[0].folder, names[0], config=_plain(files[0]))
    for name, file in zip(names[1:], files[1:]):
        adapted.load_adapter(file.folder, name)
    adapted.add_weighted_adapter(
        names, [weight for _, weight in given], "default", kind, density=density, svd_rank=rank
    )
    adapted.peft_config["default"].base_model_name_or_path = source
    adapted.save_pretrained(output, selected_adapters=["default"])


def convert(adapter: str, output: Path, rank: float | None, base: str | None) -> None:
    """Write an adapter in another form: a .gguf file for llama.cpp, or (with `rank`) as LoRA.

    `rank`: a number of directions, or below 1 the share of each change's energy that is kept.
    """
    from topwork.peft import AutoPeftModelForCausalLM, PeftModel, save_as_lora

    file = AdapterFile.open(adapter)
    named = base or file.config.base_model_name_or_path
    if named is None:
        raise ConfigError(f"{adapter} does not name its base; name it by --base")
    if output.suffix == ".gguf":
        from topwork.models import AutoConfig
        from topwork.weights.gguf_adapter import write_gguf_adapter

        _fitted(file, named, base is not None)
        if left := file.besides_pairs():
            raise ConfigError(f"llama.cpp takes LoRA of linears alone; {adapter} has {left[:5]}")
        config = AutoConfig.from_pretrained(named).to_dict()
        write_gguf_adapter(output, config, file.pairs(), Path(adapter).name)
        return
    if rank is None:
        raise ConfigError(f"{output}: name a .gguf file, or give --rank to write a LoRA folder")
    if base is None:
        model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    else:
        model = PeftModel.from_pretrained(_auto(file).from_pretrained(base), adapter)
    save_as_lora(output, model, int(rank) if rank >= 1 else rank)


def extract(tuned: str, base: str, output: Path, rank: float, dtype: str, save_rest: bool) -> str:
    """Write the change from `base` to `tuned` as a LoRA adapter; says how much of it that keeps."""
    from topwork.models import AutoModelForCausalLM
    from topwork.peft import card, extract_lora, state

    after, before = (AutoModelForCausalLM.from_pretrained(n, dtype=dtype) for n in (tuned, base))
    config, tensors = extract_lora(after, before, int(rank) if rank >= 1 else rank, save_rest)
    config = replace(config, base_model_name_or_path=base, task_type="CAUSAL_LM")
    state.write(tensors, config, output)
    card.write(output, config, sum(t.numel() for t in tensors.values()))
    kept = _kept(AdapterFile(output, config, tensors).pairs(), after, before)
    return (
        f"{output}: {len(kept)} linears, rank up to {config.r}; of their changes' energy the "
        f"adapter keeps {100 * fmean(kept.values()):.1f} % on average, "
        f"{100 * min(kept.values()):.1f} % at least ({min(kept, key=lambda p: kept[p])})"
    )


@torch.no_grad()
def _kept(pairs: Mapping[str, LoraPair], tuned: nn.Module, base: nn.Module) -> dict[str, float]:
    """The share of each change's squared norm that its pair holds."""
    from topwork.peft import sites

    found = {}
    for path, pair in pairs.items():
        after, before = (sites.read_weight(m.get_submodule(path)).float() for m in (tuned, base))
        found[path] = min(1.0, pair.norm**2 / max(float((after - before).norm()) ** 2, 1e-30))
    return found


# -- bases -----------------------------------------------------------------------------------------


def _auto(file: AdapterFile) -> Any:
    from topwork import models

    return getattr(models, AUTO.get(str(file.config.task_type), "AutoModelForCausalLM"))


def _fitted(file: AdapterFile, base: str, told: bool) -> Any:
    """The base as a skeleton without weights. ConfigError or CheckpointError: it does not fit."""
    from topwork.models import AutoConfig
    from topwork.peft import PeftModel

    named = file.config.base_model_name_or_path
    if not told and named not in (None, base):
        raise ConfigError(f"{file.folder} was made for {named}, not for {base}")
    model = hollow(_auto(file), AutoConfig.from_pretrained(base))
    return PeftModel.from_pretrained(model, file.folder, config=_plain(file)).unload()


def hollow(auto: Any, config: Any) -> nn.Module:
    """A model whose weights are zeros that take no memory: for names and shapes."""
    with torch.device("meta"):
        model = auto.from_config(config)
    for module in model.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            blank = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            setattr(module, name, nn.Parameter(blank, requires_grad=False))
    return model


def _plain(file: AdapterFile) -> Any:
    """The configuration without a start that is computed from the base's weights."""
    if hasattr(file.config, "init_lora_weights"):
        return replace(file.config, init_lora_weights=True)  # type: ignore[call-arg]
    return file.config


def _weighted(word: str) -> tuple[str, float]:
    """PATH:WEIGHT, or PATH alone with weight 1."""
    path, colon, weight = word.rpartition(":")
    if not colon:
        return word, 1.0
    try:
        return path, float(weight)
    except ValueError:
        return word, 1.0


# -- words -----------------------------------------------------------------------------------------


def _method(file: AdapterFile) -> str:
    rank = getattr(file.config, "r", None)
    return f"{file.config.peft_type}{f' r={rank}' if rank else ''}"


def _kind(path: str) -> str:
    """A path with its layer numbers as stars."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )
