"""The policy that a preference loss compares with: four ways to have it, one way to use it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from topwork.data.answers import PreparedAnswers, Rated
from topwork.data.formats import Format
from topwork.errors import ConfigError
from topwork.media import ImageTextProcessor
from topwork.models import AutoModelForCausalLM
from topwork.objectives.answers import AnswersConfig, read_answers, report
from topwork.objectives.familiar import settled
from topwork.objectives.setup import adapted, at_least, load_model
from topwork.objectives.sighted import load_reader, model_class
from topwork.objectives.vocabulary import added_ids, as_large
from topwork.peft import PeftConfig, PeftModel
from topwork.peft.state import fill
from topwork.text import Tokenizer
from topwork.training import Trainer, TrainerCallback
from topwork.training.distributed import World
from topwork.training.familiar import settings
from topwork.training.precision import cast

REF = "ref"


@settings
class ReferenceConfig(AnswersConfig):
    """What runs with a reference policy share."""

    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    precompute_ref_log_probs: bool = False
    """Compute the reference's log-probabilities once, before the first step, and keep them beside
    the run; the reference then needs neither time nor memory."""
    precompute_ref_batch_size: int | None = None
    """None: as `per_device_train_batch_size`."""
    sync_ref_model: bool = False
    """The reference follows the policy. With an adapter it is a second adapter, "ref", whose
    tensors are mixed one by one."""
    ref_model_mixup_alpha: float = 0.6
    """The policy's share in each mixture."""
    ref_model_sync_steps: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("beta", self.beta, 0, above=True)
        at_least("precompute_ref_batch_size", self.precompute_ref_batch_size, 1)
        at_least("ref_model_sync_steps", self.ref_model_sync_steps, 1)
        if not 0 <= self.ref_model_mixup_alpha <= 1:
            raise ConfigError(
                f"ref_model_mixup_alpha={self.ref_model_mixup_alpha} must be in [0, 1]"
            )
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ConfigError(
                "sync_ref_model moves the reference, so precompute_ref_log_probs cannot hold"
            )


@dataclass(frozen=True)
class Reference:
    """`model`: one of its own; else the policy under `adapter`, or without any adapter."""

    model: nn.Module | None = None
    adapter: str | None = None
    follows: bool = False

    @contextmanager
    def of(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The reference as a model, without gradients and dropout."""
        model: Any = policy if self.model is None else self.model
        using = nullcontext()
        if self.model is None and isinstance(policy, PeftModel):
            using = policy.use_adapter(self.adapter) if self.adapter else policy.disable_adapter()
        was = model.training
        if was:
            model.eval()
        try:
            with torch.no_grad(), using:
                yield model
        finally:
            if was:
                model.train()

    @torch.no_grad()
    def follow(self, policy: nn.Module, share: float) -> None:
        """reference ← share · policy + (1 - share) · reference (TR-DPO, arXiv:2404.09656)."""
        now = self._tensors(policy, own=False)
        for name, tensor in self._tensors(policy, own=True).items():
            tensor.lerp_(now[name].to(tensor.dtype), share)

    @torch.no_grad()
    def take(self, policy: nn.Module, values: Mapping[str, Tensor]) -> None:
        """reference ← `values`, under the names of the policy's own tensors."""
        for name, tensor in self._tensors(policy, own=True).items():
            if name in values:
                tensor.copy_(values[name])

    def _tensors(self, policy: nn.Module, own: bool) -> dict[str, Tensor]:
        """The reference's tensors (or the policy's that they follow), by name."""
        if self.model is not None:
            return dict((self.model if own else policy).named_parameters())
        assert isinstance(policy, PeftModel)
        assert self.adapter is not None
        return policy.adapter_state(self.adapter if own else policy.active_adapter)

    def state(self, policy: nn.Module) -> dict[str, Tensor]:
        """What changes in training, for checkpoints."""
        if not self.follows:
            return {}
        return {f"reference.{k}": v for k, v in self._tensors(policy, own=True).items()}


def choose_reference(
    model: nn.Module, given: nn.Module | None, fresh: bool, follows: bool, precomputed: bool
) -> Reference:
    """The reference of a policy: `given`; or its adapter "ref"; or the base below a `fresh`
    adapter; or a copy of the adapter or model as it is now."""
    if given is not None:
        if given is model:
            raise ConfigError("ref_model is the model itself: leave it out for a copy of its start")
        return Reference(given.requires_grad_(False).eval(), None, follows)
    if isinstance(model, PeftModel):
        if REF not in model.peft_config:
            if fresh and not follows:
                return Reference()
            copy_adapter(model, model.active_adapter, REF)
        return Reference(None, REF, follows)
    if precomputed:
        return Reference()
    return Reference(copy.deepcopy(model).requires_grad_(False).eval(), None, follows)


def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """A copy of adapter `source` as `target`, neither active nor trained."""
    config = replace(model.peft_config[source], inference_mode=True)
    if hasattr(config, "init_lora_weights"):  # some ways to begin change the base
        config = replace(config, init_lora_weights=True)  # type: ignore[call-arg]
    model.add_adapter(target, config)
    copied = model.adapter_state(target)
    fill(copied, model.adapter_state(source), f"adapter {source!r}")
    for tensor in copied.values():
        tensor.requires_grad_(False)


class FollowPolicy(TrainerCallback):
    """Lets the reference follow every `steps` steps."""

    def __init__(self, reference: Reference, steps: int, share: float) -> None:
        self.reference, self.steps, self.share = reference, steps, share

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step % self.steps == 0:
            self.reference.follow(more["model"], self.share)


Score = Callable[[Sequence[Rated]], Tensor]


def precompute(
    samples: Sequence[Rated], score: Score, size: int, folder: Path, key: str, world: World
) -> list[Rated]:
    """`samples` with the reference's log-probability of each answer.

    `score` gives those of `size` samples at a time [A]; they are kept in `folder` under `key` and
    read from there by the next run that has the same key.
    """
    path = folder / f"reference-{key[:16]}.safetensors"
    if path.is_file():
        found = load_file(path)["logprobs"]
    else:
        share = -(-len(samples) // world.size)
        own = samples[world.rank * share : (world.rank + 1) * share]
        pieces = [score(own[at : at + size]).float() for at in range(0, len(own), size)]
        found, _ = world.gather(torch.cat(pieces) if pieces else torch.zeros(0))
        found = found.cpu()
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            staged = path.with_suffix(".part")
            save_file({"logprobs": found.contiguous()}, staged)
            staged.replace(path)
        world.wait()
    counts = [len(s.answers) for s in samples]
    parts = found.split(counts)
    return [replace(s, reference=tuple(p.tolist())) for s, p in zip(samples, parts)]


def fingerprint(model: nn.Module, *facts: object) -> str:
    """A digest of every weight of `model` and of `facts`."""
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + str(tensor.dtype).encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(plain.numpy().data)
    return digest.hexdigest()


def with_reference(
    model: nn.Module, given: nn.Module | str | Path | None, config: PeftConfig | None,
    args: ReferenceConfig, auto: Any = AutoModelForCausalLM, words: Sequence[int] = (),
    follows: bool = False,
) -> tuple[nn.Module, Reference]:  # fmt: skip
    """The policy with its adapter, and its reference; `follows`: a callback moves that one."""
    if follows and args.precompute_ref_log_probs:
        raise ConfigError("a callback moves the reference, so precompute_ref_log_probs cannot hold")
    ref_model = None if given is None else load_model(given, args, auto)
    if ref_model is not None:
        as_large(ref_model, model)
    policy = adapted(model, config, words)
    reference = choose_reference(
        policy,
        ref_model,
        config is not None,
        args.sync_ref_model or follows,
        args.precompute_ref_log_probs,
    )
    return policy, reference


def followers(reference: Reference, args: ReferenceConfig) -> list[TrainerCallback]:
    """What lets the reference follow, if it shall."""
    if not args.sync_ref_model:
        return []
    return [FollowPolicy(reference, args.ref_model_sync_steps, args.ref_model_mixup_alpha)]


class ReferenceTrainer(Trainer):
    """A trainer over given answers that holds its policy to a reference.

    `ref_model`: a model or the name of one. Without it the reference is the base below a new
    adapter, the adapter "ref", or a copy of the model (its adapter) as it starts.
    """

    config_class: ClassVar[type[ReferenceConfig]] = ReferenceConfig
    formats: ClassVar[Sequence[Format]] = ()
    single: ClassVar[bool] = False
    """Each answer is a sample of its own."""

    def __init__(
        self,
        model: nn.Module | str | Path,
        ref_model: nn.Module | str | Path | None = None,
        args: ReferenceConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | ImageTextProcessor | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizer: torch.optim.Optimizer | None = None,
        **more: Any,
    ) -> None:
        args, optimizer = settled(args, self.config_class, optimizer, more)
        reader = load_reader(model, processing_class, args)
        data = read_answers(
            train_dataset, eval_dataset, reader.tokenizer, args, self.formats,
            single=self.single, placer=reader.placer,
        )  # fmt: skip
        self.prepared, self.prepared_eval = data.train, data.evals
        auto = model_class(reader)
        policy, reference = with_reference(
            reader.model, ref_model, peft_config, args, auto, added_ids(reader.tokenizer, args),
            any(getattr(callback, "update_ref_model", False) for callback in callbacks),
        )  # fmt: skip
        objective = replace(
            self.objective_of(args, reference, policy),
            placer=reader.placer,
            router=args.router_aux_loss_coef,
        )
        super().__init__(
            policy,
            args,
            objective,
            self.samples_of(data.train, args),
            {name: self.samples_of(prepared, args) for name, prepared in data.evals.items()},
            tokenizer=reader.processing,
            callbacks=[*callbacks, *followers(reference, args)],
            optimizer=optimizer,
            data_fingerprint=data.train.fingerprint,
            notes=[*report(data, reader.tokenizer), *self.notes_of(data.train, args)],
        )
        self._settle(reference, args)

    # -- what a trainer of this kind says --------------------------------------------------------

    def objective_of(self, args: Any, reference: Reference, policy: nn.Module) -> Any:
        """The objective of this run."""
        raise NotImplementedError

    def samples_of(self, prepared: PreparedAnswers, args: Any) -> Sequence[Rated]:
        return prepared.samples

    def notes_of(self, prepared: PreparedAnswers, args: Any) -> list[str]:
        """More lines about the data."""
        return []

    def facts_of(self, args: Any) -> tuple[object, ...]:
        """Settings that the reference's log-probabilities depend on."""
        return ()

    # -- the reference ---------------------------------------------------------------------------

    def _settle(self, reference: Reference, args: ReferenceConfig) -> None:
        """Bring the reference to the policy's device and precision, or do its work in advance."""
        if reference.model is not None:
            if args.bf16 is not None:
                cast(reference.model, args.bf16)
            reference.model.to(self.device)
        if not args.precompute_ref_log_probs:
            return
        objective: Any = self.objective
        size = args.precompute_ref_batch_size or args.per_device_train_batch_size
        facts = self.facts_of(args)
        weights = fingerprint(reference.model or self.model, reference.adapter, *facts)

        def done(samples: Sequence[Rated], data: str) -> Sequence[Any]:
            return precompute(
                samples,
                lambda part: objective.reference_of(self.model, part),
                size,
                Path(args.output_dir),
                hashlib.sha256(f"{weights}|{data}".encode()).hexdigest(),
                self.world,
            )

        self.train_data = done(self.train_data, self.prepared.fingerprint)
        self.eval_data = {
            name: done(samples, self.prepared_eval[name].fingerprint)
            for name, samples in self.eval_data.items()
        }
