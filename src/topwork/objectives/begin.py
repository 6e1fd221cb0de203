"""How the trainers over drawn answers begin: policy, reference, jury, data, and who writes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from topwork.data.prepare import marked_text
from topwork.errors import ConfigError
from topwork.media.placed import Placer
from topwork.objectives.ahead import Ahead, SnapshotWriter
from topwork.objectives.draws import Draw, DrawsConfig
from topwork.objectives.episodes import Stage, set_stage
from topwork.objectives.reference import Reference, choose_reference
from topwork.objectives.rewards import check_columns, convene
from topwork.objectives.rollouts import (
    EngineWriter,
    Prompt,
    SeeingWriter,
    Writer,
    read_prompts,
    sampling_options,
)
from topwork.objectives.server import ServerWriter
from topwork.objectives.setup import adapted, load_model, load_pair, named_sets
from topwork.objectives.sighted import Reader, described, load_reader, model_class
from topwork.objectives.vocabulary import added_ids, as_large
from topwork.peft import PeftConfig, PeftModel
from topwork.text import Tokenizer
from topwork.training.distributed import join


@dataclass
class Setup:
    """What the trainers over drawn answers begin with."""

    policy: nn.Module
    reference: Reference | None
    draw: Draw
    train: Sequence[Prompt]
    evals: dict[str, Sequence[Any]]
    notes: list[str]
    processing: Any

    def given(self) -> dict[str, Any]:
        """The trainer's arguments about data."""
        return {
            "train_data": self.train, "eval_data": self.evals, "tokenizer": self.processing,
            "data_fingerprint": prompts_fingerprint(self.train), "notes": self.notes,
        }  # fmt: skip

    def attach(self, trainer: Any) -> None:
        """Let the draws know the run, and bring a reference of its own to the run's device."""
        self.draw.attach(trainer)
        if self.reference is not None and self.reference.model is not None:
            self.reference.model.to(trainer.device)


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """A digest of every prompt's tokens."""
    digest = hashlib.sha256()
    for prompt in prompts:
        for fact in prompt.sample().facts():
            digest.update(fact)
    return digest.hexdigest()


def set_up(
    model: nn.Module | str | Path, reward_funcs: Any, args: DrawsConfig, train_dataset: Any,
    eval_dataset: Any, processing: Any, reward_tokenizers: Any,
    peft_config: PeftConfig | None, held: float, tools: Any = (), environment_factory: Any = None,
    ref_model: nn.Module | str | Path | None = None, sees: bool = False,
) -> Setup:  # fmt: skip
    """The policy with its adapter, its start (or `ref_model`) as reference if it is `held` to it,
    jury and data. `sees`: the trainer's prompts may have images."""
    reader = _reader(model, processing, args, sees, bool(tools) or environment_factory is not None)
    model, tokenizer = reader.model, reader.tokenizer
    if train_dataset is None:
        raise ConfigError("the trainer needs train_dataset: rows with `prompt`")
    stage = set_stage(tokenizer, tools or (), environment_factory, args.max_tool_calling_iterations)
    own = [] if stage is None else stage.rewards()
    jury = convene(reward_funcs, reward_tokenizers, args, own)
    schemas = None if stage is None else stage.schemas
    how = (tokenizer, args.max_prompt_length, schemas, reader.placer)
    train, long = read_prompts(train_dataset, *how)
    check_columns(jury.funcs, list(train[0].columns))
    evals: dict[str, Sequence[Any]] = {
        name: read_prompts(rows, *how)[0] for name, rows in named_sets(eval_dataset).items()
    }
    other = None if ref_model is None else load_model(ref_model, args, model_class(reader))
    if other is not None:
        as_large(other, model)
    reference = _start(model, peft_config, other) if held else None
    notes = describe_prompts(train, long, args, tokenizer)
    draw = Draw(args, tokenizer, jury, *_writing(args, tokenizer, stage, reader.placer))
    draw.placer = reader.placer
    if draw.ahead is not None:
        draw.ahead.play = draw.play
    policy = adapted(model, peft_config, added_ids(tokenizer, args))
    return Setup(policy, reference, draw, train, evals, notes, reader.processing)


def _reader(model: Any, processing: Any, args: DrawsConfig, sees: bool, tools: bool) -> Reader:
    """The model and what reads its prompts. ConfigError for ways to draw that see no images."""
    if not sees:
        model, tokenizer = load_pair(model, processing, args)
        return Reader(model, tokenizer, tokenizer)
    reader = load_reader(model, processing, args)
    if reader.placer is not None and (args.rollout_server or args.max_staleness):
        raise ConfigError(
            "answers to images are drawn in this process, when they are needed: leave "
            "rollout_server and max_staleness out"
        )
    if reader.placer is not None and tools:
        raise ConfigError(
            "tools and environments go with texts alone: pass the processor's tokenizer as "
            "processing_class"
        )
    return reader


def _writing(
    args: DrawsConfig, tokenizer: Tokenizer, stage: Stage | None, placer: Placer | None
) -> tuple[Writer, list[Stage], Ahead | None]:
    """Who writes, on which stages, and who draws ahead."""
    options, depth = sampling_options(args, tokenizer), args.max_staleness
    if placer is not None:
        return SeeingWriter(options, placer), [], None
    writer: Writer = EngineWriter(options)
    early: Writer = SnapshotWriter(EngineWriter(options))
    if args.rollout_server is not None:
        folder = Path(args.output_dir) / "rollout_adapters"
        writer = early = ServerWriter(
            args.rollout_server, options, folder, depth + 2, args.rollout_timeout, join()
        )
    stages = [] if stage is None else [replace(stage, pool={}) for _ in range(depth + 2)]
    return writer, stages, Ahead(early, depth) if depth else None


def describe_prompts(
    prompts: Sequence[Prompt], long: int, args: Any, tokenizer: Tokenizer
) -> list[str]:
    """What the run answers, how many prompts were too `long`, and one as the model reads it."""
    count = args.num_generations
    each = f"{count} answers to each" if count > 1 else "an answer to each"
    lines = [f"prompts: {len(prompts):,} rows, {each}"]
    if long:
        lines.append(f"{long} rows dropped, prompts over {args.max_prompt_length} tokens")
    lines += described(prompts)
    lines.append(f"row {prompts[0].row}, as the model reads it:")
    return [*lines, quoted("".join(t for t, _ in marked_text(prompts[0].sample(), tokenizer)))]


def quoted(text: str, limit: int = 1500) -> str:
    """`text`, cut at `limit`, for a report's notes."""
    return "  " + text[:limit].replace("\n", "\n  ") + (" …" if len(text) > limit else "")


def _start(model: nn.Module, config: PeftConfig | None, given: nn.Module | None) -> Reference:
    """What is given, or the policy as it starts: the bare base below a new adapter, else a copy."""
    if given is None and config is not None and not isinstance(model, PeftModel):
        return Reference()
    return choose_reference(model, given, False, False, False)
