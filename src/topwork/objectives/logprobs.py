"""Log-probabilities of a packed batch's targets, from our models and from transformers'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.data.packing import Batch
from topwork.errors import ConfigError


@dataclass(frozen=True)
class Scored:
    """What a model says at the N supervised positions of a batch.

    `logprobs` [N] fp32 of the targets. `seen` [N, C] is what `model`'s head makes logits of; for a
    model without Topwork's contract it is the logits themselves.
    """

    logprobs: Tensor
    seen: Tensor
    targets: Tensor
    model: Any

    def statistics(self, temperature: float = 1.0) -> ops.TokenStatistics:
        """Entropy and the like at each position, for one more pass through the head; `temperature`
        is that of the scores."""
        head = self.model.head if _has_contract(self.model) else lambda logits: logits
        if temperature != 1 and _has_contract(self.model):
            plain = head
            head = lambda rows: plain(rows).float() / temperature  # noqa: E731
        return ops.token_statistics(head, self.seen.detach(), self.targets)


def score(
    model: nn.Module, batch: Batch, *, noise: float = 0.0, smoothing: float = 0.0,
    temperature: float = 1.0,
) -> Scored:  # fmt: skip
    """The supervised positions of `batch` under `model`.

    `noise`: NEFTune's on the embeddings; `smoothing`: that of the labels; `temperature` divides
    the logits.

    A model with Topwork's contract (`backbone`, `token_logprobs`) computes no padding, shared
    prompts once, and logits for these positions alone; any other gets padded rows and the familiar
    call.
    """
    any_model: Any = model
    if _has_contract(model):
        given = {"input_ids": batch.input_ids, **batch.images, **_tasks(any_model, batch)}
        if noise and batch.images:
            raise ConfigError("neftune_noise_alpha does not go with images: leave it out")
        if noise:
            del given["input_ids"]
            given["inputs_embeds"] = noisy_embeddings(any_model, batch, noise)
        hidden = any_model.backbone(**given, lengths=batch.lengths)
        seen = hidden[0, batch.positions]
        if smoothing or temperature != 1:
            head = any_model.head
            cooled = head if temperature == 1 else lambda rows: head(rows).float() / temperature
            found = ops.token_logprobs_of(cooled, seen, batch.targets, smoothing)
        else:
            found = any_model.token_logprobs(seen, batch.targets)
        return Scored(found, seen, batch.targets, model)
    if batch.images:
        raise ConfigError("rows with images need a model of topwork's")
    if noise or smoothing:
        raise ConfigError(
            "neftune_noise_alpha and label_smoothing_factor need a model of topwork's"
        )
    logits = _padded_logits(any_model, batch)[batch.positions].float() / temperature
    found = logits.gather(1, batch.targets[:, None])[:, 0] - logits.logsumexp(1)
    return Scored(found, logits, batch.targets, model)


def noisy_embeddings(model: Any, batch: Batch, alpha: float) -> Tensor:
    """The embeddings [1, T, C] of `batch` with uniform noise in ±α / √(tokens · C), the tokens
    those of each document (NEFTune, arXiv:2310.05914)."""
    embedded = model.get_input_embeddings()(batch.input_ids)
    plain = torch.tensor([n for n in batch.lengths if isinstance(n, int)], device=embedded.device)
    size = alpha / (plain.repeat_interleave(plain) * embedded.shape[-1]).sqrt()
    return embedded + size[None, :, None].to(embedded.dtype) * (2 * torch.rand_like(embedded) - 1)


def token_logprobs(model: nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
    """log p(target) [N] fp32 for each supervised position of `batch`; see `score`."""
    return score(model, batch, temperature=temperature).logprobs


def _has_contract(model: Any) -> bool:
    return callable(getattr(model, "token_logprobs", None))


def _tasks(model: Any, batch: Batch) -> dict[str, Tensor]:
    """What the model is told of the documents' tasks, if its adapter learns by task."""
    if not getattr(model, "learns_by_task", False):
        return {}
    if batch.tasks is None:
        raise ConfigError(
            f"{model.peft_type} learns by task: its rows need a column `task_ids`, each with the "
            "number of its task"
        )
    return {"task_ids": batch.tasks}


def padded(batch: Batch) -> tuple[Tensor, Tensor, ops.Unshared]:
    """Right-padded rows [A, S] of the documents, their mask, and how they lie in the flat row."""
    plain = ops.unshared(batch.lengths, batch.input_ids.device)
    ids, width = batch.input_ids[0, plain.take], max(plain.lengths)
    rows = ids.new_zeros(len(plain.lengths), width)
    keep = torch.zeros_like(rows)
    for i, part in enumerate(ids.split(plain.lengths)):
        rows[i, : len(part)], keep[i, : len(part)] = part, 1
    return rows, keep, plain


def _padded_logits(model: Any, batch: Batch) -> Tensor:
    """Logits [T, V] of the flat row through right-padded rows."""
    rows, keep, plain = padded(batch)
    tasks = _tasks(model, batch)
    logits = model(input_ids=rows, attention_mask=keep, **tasks).logits[keep.bool()]
    return logits[plain.back]
