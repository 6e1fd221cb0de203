"""Distillation from a teacher behind a server, over vLLM's public API: of each token of a text it
tells the log-probability, and those of the few that it would rather have written.

    vllm serve TEACHER --max-logprobs 20
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.data.packing import Batch
from topwork.data.prepare import Prepared, Sample
from topwork.errors import ConfigError, DataError, TrainingError
from topwork.objectives.answers import means
from topwork.objectives.distill import Distillation, DistillationConfig, head_of, seen_at
from topwork.objectives.familiar import Familiar, refused
from topwork.objectives.gkd import GKD, GKDConfig, GKDTrainer
from topwork.objectives.reference import Reference
from topwork.objectives.routing import routed
from topwork.objectives.server import REQUESTS, address_of, ask
from topwork.objectives.setup import at_least
from topwork.text import Tokenizer
from topwork.training import Loss
from topwork.training.distributed import World
from topwork.training.familiar import settings

FIELD = "teacher_model_server_url"


@settings
class ServerDistillationConfig(GKDConfig):
    """A run of distillation from a teacher behind a server, on the student's own answers or on
    those of the rows."""

    teacher_model_server_url: str | None = None
    """The teacher's server, such as http://localhost:8000; its tokens are the student's."""
    teacher_server_timeout: float = 600.0
    """Seconds after which a server that does not answer stops the run."""
    loss_top_k: int = 1
    """The tokens that the teacher finds likeliest, by which it is known."""
    loss_add_tail: bool = True
    """All other tokens count as one more; else not at all."""
    lmbda: float = 1.0
    beta: float = 1.0
    """0: KL(teacher ‖ student) over the teacher's likeliest tokens; 1: KL(student ‖ teacher) over
    the token that was written; between: Jensen-Shannon over both."""
    temperature: float = 1.0
    max_new_tokens: int = 512

    familiar: ClassVar[dict[str, Familiar]] = refused(
        reverse_kl_top_1_mode=("sampled", "a server cannot be asked for the student's likeliest"),
        teacher_model_name_or_path=(None, "the teacher is behind teacher_model_server_url"),
        teacher_model_revision=(None, "the teacher is behind teacher_model_server_url"),
        use_teacher_server=(True, "the teacher is behind teacher_model_server_url"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("loss_top_k", self.loss_top_k, 1)
        at_least("teacher_server_timeout", self.teacher_server_timeout, 0, above=True)
        if self.temperature != 1:
            raise ConfigError(
                f"temperature={self.temperature}: of a few tokens' log-probabilities those at "
                "another temperature do not follow; leave it at 1"
            )
        if self.teacher_model_init_kwargs is not None:
            raise ConfigError("teacher_model_init_kwargs: the server has loaded its model")
        if self.seq_kd:
            raise ConfigError("seq_kd: have the server answer the rows before the run")
        if not self.loss_add_tail and (self.beta == 1 or (self.loss_top_k == 1 and not self.beta)):
            raise ConfigError(
                "loss_add_tail=False leaves one token alone, of whose share nothing can be learnt: "
                "set beta below 1 and loss_top_k above 1"
            )


# -- what the teacher tells ------------------------------------------------------------------------


@dataclass(frozen=True)
class TeacherServer:
    """The model `name` behind the server at `url`."""

    url: str
    name: str
    timeout: float = 600.0

    @classmethod
    def at(cls, url: str | None, timeout: float) -> TeacherServer:
        """The one at `url`, under the name that it has there. TrainingError if nobody answers."""
        if url is None:
            raise ConfigError(f"ServerDistillationTrainer needs {FIELD}")
        url = address_of(url, FIELD)
        found = ask(url, "models", None, timeout, FIELD)
        try:
            return cls(url, str(found["data"][0]["id"]), timeout)
        except (KeyError, IndexError, TypeError) as error:
            raise TrainingError(f"{url}/v1/models names no model: {str(found)[:300]}") from error

    def read(self, texts: Sequence[Sequence[int]], count: int) -> list[tuple[Tensor, ...]]:
        """Of each text of T tokens the log-probability of each [T], and the ids [T, K] and
        log-probabilities [T, K] of the likeliest `count` in its place; nothing of the first one."""
        with ThreadPoolExecutor(min(REQUESTS, len(texts))) as pool:
            return list(pool.map(lambda text: self._one(list(text), count), texts))

    def _one(self, text: list[int], count: int) -> tuple[Tensor, ...]:
        body = {"model": self.name, "prompt": text, "max_tokens": 1, "temperature": 0.0,
                "prompt_logprobs": count}  # fmt: skip
        found = ask(self.url, "completions", body, self.timeout, FIELD)
        written = torch.full((len(text),), -math.inf)
        ids = torch.zeros(len(text), count, dtype=torch.long)
        likeliest = torch.full((len(text), count), -math.inf)
        try:
            told = found["choices"][0]["prompt_logprobs"]
            for place, entry in enumerate(told[1:], 1):
                written[place] = entry[str(text[place])]["logprob"]
                best = sorted(entry.items(), key=lambda item: -item[1]["logprob"])[:count]
                for k, (token, facts) in enumerate(best):
                    ids[place, k], likeliest[place, k] = int(token), facts["logprob"]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TrainingError(
                f"{self.url}: the answer has no prompt_logprobs of the tokens that were sent "
                f"({type(error).__name__}: {error}): {str(found)[:300]}"
            ) from error
        if len(told) != len(text):
            raise TrainingError(f"{self.url}: {len(told)} prompt_logprobs for {len(text)} tokens")
        return written, ids, likeliest


@dataclass
class Told:
    """A micro-batch, and what the teacher says in the place of each trained token: the
    log-probability of that one [N], the likeliest tokens [N, K] and theirs [N, K]."""

    batch: Batch
    written: Tensor
    ids: Tensor
    likeliest: Tensor

    def support(self, beta: float) -> tuple[Tensor, Tensor]:
        """The tokens on which the two are compared, and the teacher's log-probabilities of them:
        what it finds likeliest, what was written, or both."""
        targets, written = self.batch.targets[:, None], self.written[:, None]
        if beta == 0:
            return self.ids, self.likeliest
        if beta == 1:
            return targets, written
        twice = ((self.ids == targets) & (self.likeliest > -math.inf)).any(1, keepdim=True)
        ids = torch.cat((self.ids, targets), 1)
        return ids, torch.cat((self.likeliest, written.masked_fill(twice, -math.inf)), 1)


# -- the objective ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServerDistillation(GKD):
    """The divergence from what the teacher tells, at each trained token, summed. The units are
    tokens."""

    server: TeacherServer | None = None
    count: int = 1
    rest: bool = True

    def assemble(  # type: ignore[override]
        self, model: nn.Module, groups: Sequence[Sequence[Sample]], world: World | None = None
    ) -> list[Told]:
        """The micro-batches of a step, of which the teacher reads all texts at once."""
        batches = super().assemble(model, groups, world)
        texts = [text for batch in batches for text in _texts(batch)]
        assert self.server is not None
        told = iter(self.server.read([t.tolist() for t in texts], self.count))
        return [self._told(model, batch, [next(told) for _ in batch.lengths]) for batch in batches]

    def _told(self, model: Any, batch: Batch, told: Sequence[tuple[Tensor, ...]]) -> Told:
        device, places = batch.input_ids.device, batch.positions.cpu() + 1
        written, ids, likeliest = (torch.cat(parts)[places].to(device) for parts in zip(*told))
        if len(ids) and int(ids.max()) >= model.config.vocab_size:
            raise TrainingError(
                f"{FIELD}: the teacher's token {int(ids.max())} is none of the student's "
                f"{model.config.vocab_size}: both must have one vocabulary"
            )
        return Told(batch, written, ids, likeliest)

    def sketch(self, model: nn.Module, sample: Sample) -> Told:  # type: ignore[override]
        """A batch of the usual shape without the server, to plan the memory."""
        batch = super().sketch(model, sample)
        size = (len(batch.targets), self.count)
        zeros = torch.zeros(size, device=batch.input_ids.device)
        return Told(batch, zeros[:, 0] - 1, zeros.long(), zeros - 1)

    def weight(self, batch: Told) -> float:  # type: ignore[override]
        return len(batch.batch.targets)

    def tokens(self, batch: Told) -> int:  # type: ignore[override]
        return batch.batch.tokens

    def rows(self, batch: Told) -> Sequence[int]:  # type: ignore[override]
        return batch.batch.rows

    def loss(self, model: nn.Module, batch: Told) -> Loss:  # type: ignore[override]
        student: Any = model
        with routed(model, batch.batch, self.router) as routers:
            seen = seen_at(student, batch.batch)
        apart = ops.sparse_divergence(
            head_of(student), seen, *batch.support(self.beta), beta=self.beta, rest=self.rest
        )
        total, metrics = apart.sum(), means({"divergence": apart})
        if self.sft_weight:
            logprobs = student.token_logprobs(seen, batch.batch.targets)
            total = total - self.sft_weight * logprobs.sum()
            metrics |= means({"nll_loss": -logprobs})
        return routers.beside(Loss(total, metrics), self.weight(batch))


def _texts(batch: Batch) -> tuple[Tensor, ...]:
    """The ids of each document."""
    return batch.input_ids[0].split([n for n in batch.lengths if isinstance(n, int)])


class ServerDistillationTrainer(GKDTrainer):
    """The trainer with the objective of a teacher behind a server, which `args` name; other
    arguments as DistillationTrainer's."""

    config_class: ClassVar[type[DistillationConfig]] = ServerDistillationConfig

    def _teacher(self, given: nn.Module | str | Path | None, args: Any, reader: Any) -> Reference:
        if given is not None:
            raise ConfigError(f"the teacher is behind {FIELD}: leave teacher_model out")
        if not callable(getattr(reader.model, "backbone", None)):
            raise ConfigError("model: load it with topwork.AutoModelForCausalLM")
        return Reference()

    def _objective(
        self, args: Any, teacher: Reference, tokenizer: Tokenizer, train: Prepared
    ) -> Distillation:
        if any(sample.images for sample in train.samples):
            raise DataError("the rows have images, which a teacher behind a server does not see")
        plain = super()._objective(args, teacher, tokenizer, train)
        server = TeacherServer.at(args.teacher_model_server_url, args.teacher_server_timeout)
        return ServerDistillation(
            **vars(plain), server=server, count=args.loss_top_k, rest=args.loss_add_tail
        )


__all__ = ["ServerDistillation", "ServerDistillationConfig", "ServerDistillationTrainer"]
