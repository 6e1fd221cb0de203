"""`topwork train` and `topwork preview`: a run from a configuration file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from topwork.cli.settings import read_settings, typed
from topwork.errors import ConfigError, nearest

OWN = (
    "model", "data", "eval_data", "objective", "lora", "adapter", "load_in_4bit", "load_in_8bit",
    "resume",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a configuration file says, taken apart."""

    model: str
    data: Any
    eval_data: Any
    resume: bool | str
    adapter: Any
    args: Any
    entry: Any
    models: dict[str, Any]
    """Further models of the objective, by the trainer's names for them."""


def read_run(path: Path | None, extra: list[str]) -> Run:
    """The run of `path` and `--field value` pairs. ConfigError naming what is wrong."""
    from topwork.objectives.registry import OBJECTIVES

    settings = read_settings(path, extra)
    own = {name: settings.pop(name, None) for name in OWN}
    objective = own["objective"] or "sft"
    if objective not in OBJECTIVES:
        raise ConfigError(
            f"objective={objective!r}{nearest(str(objective), OBJECTIVES)}; "
            f"one of {', '.join(OBJECTIVES)}"
        )
    entry = OBJECTIVES[objective]
    models = {
        argument: settings.pop(key) for key, argument in entry.models.items() if key in settings
    }
    known = [f.name for f in fields(entry.config)]
    for name in settings:
        if name not in known and nearest(name, (*OWN, *entry.models)):
            raise ConfigError(f"{name!r} is not known{nearest(name, (*OWN, *entry.models))}")
    for name in ("model", "data"):
        if own[name] is None:
            raise ConfigError(f"the run lacks {name!r}: set it in the file or pass --{name}")
    if bits := [name for name in ("load_in_4bit", "load_in_8bit") if own[name]]:
        settings["model_init_kwargs"] = quantised(bits, settings.get("model_init_kwargs"))
    return Run(
        str(own["model"]),
        own["data"],
        own["eval_data"],
        own["resume"] or False,
        adapter_of(own["lora"], own["adapter"]),
        entry.config.of(typed(settings, entry.config)),
        entry,
        models,
    )


def adapter_of(lora: Any, adapter: Any) -> Any:
    """The adapter's configuration from the sections of the file; None where all is trained."""
    from topwork.peft import PeftConfig, methods

    if adapter is not None and lora is not None:
        raise ConfigError("the run has both lora and adapter: leave one out")
    if False in (lora, adapter):
        return None
    given = lora if adapter is None else adapter
    if given in (None, True):
        given = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    if not isinstance(given, dict):
        raise ConfigError(f"adapter={given!r}: expected fields, such as {{peft_type: ia3}}")
    kind = str(given.get("peft_type", "lora")).upper()
    fields_of = methods.config_class(kind)
    return PeftConfig.from_dict(typed({**given, "peft_type": kind}, fields_of))


def quantised(bits: list[str], init: Any) -> dict[str, Any]:
    """`init` with the base in 4 bits (NF4, its factors in 8, as QLoRA does) or in 8."""
    init = init or {}
    if len(bits) > 1 or "quantization_config" in init:
        raise ConfigError("the run says twice how the base is quantised: leave one out")
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return {**init, "quantization_config": {bits[0]: True, **(nf4 if "4bit" in bits[0] else {})}}


def train(path: Path | None, extra: list[str]) -> Path:
    """Train, write the result into `output_dir`, and return it."""
    run = read_run(path, extra)
    trainer = run.entry.trainer(
        run.model,
        args=run.args,
        train_dataset=run.data,
        eval_dataset=run.eval_data,
        peft_config=run.adapter,
        **run.models,
    )
    trainer.train(resume_from_checkpoint=run.resume)
    trainer.save_model()
    return Path(run.args.output_dir)


def preview(path: Path | None, extra: list[str], count: int) -> None:
    """Show what a run would train on, without loading the model."""
    from rich.console import Console
    from rich.text import Text

    from topwork.objectives.previews import Sight

    run = read_run(path, extra)
    sight = Sight.of(run.model, run.args, run.entry.images, run.models)
    lines, rows = run.entry.preview(run.data, sight)
    out = Console(highlight=False, soft_wrap=True)
    for line in lines:
        out.print(line, markup=False)
    for (title, runs), _ in zip(rows, range(count)):
        out.rule(title)
        shown = Text()
        for part, trained in runs:
            shown.append(part, style="black on green" if trained else "dim")
        out.print(shown)
