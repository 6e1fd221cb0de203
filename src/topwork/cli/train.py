"""`topwork train` and `topwork preview`: a run from a configuration file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from topwork.cli.settings import read_settings, typed
from topwork.errors import ConfigError, nearest

OBJECTIVES = ("sft",)
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


def read_run(path: Path | None, extra: list[str]) -> Run:
    """The run of `path` and `--field value` pairs. ConfigError naming what is wrong."""
    from topwork.objectives import SFTConfig
    from topwork.peft import LoraConfig

    settings = read_settings(path, extra)
    own = {name: settings.pop(name, None) for name in OWN}
    objective = own["objective"] or "sft"
    if objective not in OBJECTIVES:
        raise ConfigError(
            f"objective={objective!r}{nearest(str(objective), OBJECTIVES)}; "
            f"one of {', '.join(OBJECTIVES)}"
        )
    known = [f.name for f in fields(SFTConfig)]
    for name in settings:
        if name not in known and nearest(name, OWN):
            raise ConfigError(f"{name!r} is not known{nearest(name, OWN)}")
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
        SFTConfig.of(typed(settings, SFTConfig)),
    )


def train(path: Path | None, extra: list[str]) -> Path:
    """Train, write the result into `output_dir`, and return it."""
    from topwork.objectives import SFTTrainer

    run = read_run(path, extra)
    trainer = SFTTrainer(run.model, run.args, run.data, run.eval_data, peft_config=run.lora)
    trainer.train(resume_from_checkpoint=run.resume)
    trainer.save_model()
    return Path(run.args.output_dir)


def preview(path: Path | None, extra: list[str], count: int) -> None:
    """Show what a run would train on, without loading the model."""
    from rich.console import Console
    from rich.text import Text

    from topwork.data.prepare import marked_text, prepare
    from topwork.data.rows import read_rows
    from topwork.objectives.sft import marking_of, report
    from topwork.text import AutoTokenizer

    run = read_run(path, extra)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    if run.args.chat_template is not None:
        tokenizer.chat_template = run.args.chat_template
    rows = read_rows(run.data)
    prepared = prepare(rows, tokenizer, marking_of(run.args, tokenizer))
    out = Console(highlight=False, soft_wrap=True)
    for line in report(prepared, tokenizer)[:-2]:
        out.print(line, markup=False)
    for sample in prepared.samples[:count]:
        out.rule(f"row {sample.row}: {len(sample)} tokens, {sample.supervised} trained")
        shown = Text()
        for part, trained in marked_text(sample, tokenizer):
            shown.append(part, style="black on green" if trained else "dim")
        out.print(shown)
