"""`topwork train` and `topwork preview`: a run from a configuration file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from topwork.cli.settings import read_settings, typed
from topwork.errors import ConfigError, nearest

OWN = ("model", "data", "eval_data", "objective", "lora", "resume")


@dataclass(frozen=True)
class Run:
    """What a configuration file says, taken apart."""

    model: str
    data: Any
    eval_data: Any
    resume: bool | str
    lora: Any
    args: Any
    entry: Any
    models: dict[str, Any]
    """Further models of the objective, by the trainer's names for them."""


def read_run(path: Path | None, extra: list[str]) -> Run:
    """The run of `path` and `--field value` pairs. ConfigError naming what is wrong."""
    from topwork.objectives.registry import OBJECTIVES
    from topwork.peft import LoraConfig

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
    lora = own["lora"]
    if lora in (None, True):
        lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    return Run(
        str(own["model"]),
        own["data"],
        own["eval_data"],
        own["resume"] or False,
        None if lora is False else LoraConfig.from_dict(typed(lora, LoraConfig)),
        entry.config.of(typed(settings, entry.config)),
        entry,
        models,
    )


def train(path: Path | None, extra: list[str]) -> Path:
    """Train, write the result into `output_dir`, and return it."""
    run = read_run(path, extra)
    trainer = run.entry.trainer(
        run.model,
        args=run.args,
        train_dataset=run.data,
        eval_dataset=run.eval_data,
        peft_config=run.lora,
        **run.models,
    )
    trainer.train(resume_from_checkpoint=run.resume)
    trainer.save_model()
    return Path(run.args.output_dir)


def preview(path: Path | None, extra: list[str], count: int) -> None:
    """Show what a run would train on, without loading the model."""
    from rich.console import Console
    from rich.text import Text

    from topwork.text import AutoTokenizer

    run = read_run(path, extra)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    if run.args.chat_template is not None:
        tokenizer.chat_template = run.args.chat_template
    lines, rows = run.entry.preview(run.data, tokenizer, run.args)
    out = Console(highlight=False, soft_wrap=True)
    for line in lines:
        out.print(line, markup=False)
    for (title, runs), _ in zip(rows, range(count)):
        out.rule(title)
        shown = Text()
        for part, trained in runs:
            shown.append(part, style="black on green" if trained else "dim")
        out.print(shown)
