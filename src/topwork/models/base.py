"""What every model has, and the contract of causal ones: backbone, head, token log-probs, files."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork import hub, ops, quant, weights
from topwork.errors import ConfigError
from topwork.models import vocabulary
from topwork.models.config import Config, Remembered
from topwork.models.output import Output
from topwork.models.packing import Padding, check_lengths, document_ends, packed_positions
from topwork.models.states import block_inputs, hidden_states, refuse_attentions
from topwork.nn.cache import KVCache


@dataclass
class CausalLMOutput(Output):
    """`logits` [B, T, V]; `loss`, the mean over the labelled tokens, when labels were given.

    `aux_loss`: the routers' load-balancing loss, where the configuration asks for it.
    `hidden_states`, when asked for: what each block was given, and the last, after the final norm.
    """

    loss: Tensor | None
    logits: Tensor
    past_key_values: KVCache | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class Model(nn.Module):
    """What every model has: a configuration, tied weights (alias → owner), its files.

    `trunk` is the part below the head; it holds `checkpointing`. `table` says how the tensors are
    named and laid out on disk.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.generation_config: dict[str, Any] = Remembered()
        self.tied: dict[str, str] = {}
        self.table = weights.PLAIN
        self.quantization_config: quant.BitsAndBytesConfig | None = None

    def __call__(self, *args: Any, return_dict: bool | None = None, **inputs: Any) -> Any:
        """What `forward` gives, with `return_dict=False` as a tuple."""
        found = super().__call__(*args, **inputs)
        return found.to_tuple() if return_dict is False else found

    @property
    def trunk(self) -> Any:
        raise NotImplementedError

    @property
    def layer_count(self) -> int:
        raise NotImplementedError

    @property
    def windows(self) -> list[int | None]:
        """How many tokens each layer sees; None: all earlier ones."""
        return [None] * self.layer_count

    @property
    def turning_point(self) -> int | None:
        """The length beyond which the angles of all positions are other ones; None: never."""
        return None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False) -> int:
        chosen = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        packed = 0 if only_trainable else quant.Summary.of(self).numbers
        return sum(p.numel() for p in chosen) + packed

    @property
    def base_model(self) -> Any:
        """The part below the head."""
        return self.trunk

    @property
    def name_or_path(self) -> str:
        return self.config.get("_name_or_path", "")

    @property
    def num_labels(self) -> int:
        return self.config.num_labels

    def get_memory_footprint(self) -> int:
        """The bytes of its parameters and buffers."""
        tensors = (*self.parameters(), *self.buffers())
        return sum(t.numel() * t.element_size() for t in tensors)

    def dequantize(self) -> Self:
        """Put plain linears of the same values in place of quantised ones."""
        quant.dequantise(self)
        self.quantization_config = None
        return self

    def new_cache(self, batch_size: int | None = None) -> KVCache:
        return KVCache(self.layer_count)

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.get_submodule(self.trunk.embedding)

    def set_input_embeddings(self, value: nn.Module) -> None:
        for path, module in list(self.named_modules(remove_duplicate=False)):
            if module is self.get_input_embeddings():
                self.set_submodule(path, value)
                return

    def get_output_embeddings(self) -> nn.Module | None:
        return None

    def enable_input_require_grads(self) -> None:
        """Let gradients reach the embeddings' output. Adapters and checkpointing do not need it."""
        self._inputs_hook = self.get_input_embeddings().register_forward_hook(
            lambda _, inputs, output: output.requires_grad_()
        )

    def disable_input_require_grads(self) -> None:
        self._inputs_hook.remove()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.trunk.checkpointing

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Make room for other numbers of tokens, in the embedding and in the head over the
        vocabulary, tied or not; the configuration says so too.

        `pad_to_multiple_of`: rows up to the next multiple. New rows are the mean of the old ones;
        `mean_resizing=False`: drawn. ConfigError where an adapter stands around either already.
        """
        return vocabulary.resize(self, new_num_tokens, pad_to_multiple_of, mean_resizing)

    def tie_weights(self) -> None:
        """Let each tied alias be its owner's parameter."""
        for alias, owner in self.tied.items():
            path, _, name = alias.rpartition(".")
            setattr(self.get_submodule(path), name, self.get_parameter(owner))

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Keep only each block's input for the backward pass and compute the rest again."""
        self.trunk.checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.trunk.checkpointing = False

    def compute_transition_scores(self, *args: Any, **kwargs: Any) -> Tensor:
        """How each new token was scored; see `topwork.generation.transition_scores`."""
        return importlib.import_module("topwork.generation").transition_scores(*args, **kwargs)

    # -- files -----------------------------------------------------------------------------------

    def save_pretrained(
        self, folder: str | Path, max_shard_size: str | int = "5GB", safe_serialization: bool = True
    ) -> None:
        """Write config.json, generation_config.json and safetensors as they stand on the Hub."""
        if not safe_serialization:
            raise ConfigError("safe_serialization=False: weights are saved as safetensors alone")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        saved = Config(**self.config.to_dict())
        for inert in ("torch_dtype", "_name_or_path"):
            saved.__dict__.pop(inert, None)
        saved.__dict__["dtype"] = str(self.dtype).removeprefix("torch.")
        saved.__dict__.pop("quantization_config", None)
        if self.quantization_config is not None:
            quantised = self.quantization_config
            if quantised.load_in_8bit and quantised.llm_int8_threshold is None:
                raise ConfigError(
                    "a file in 8 bits says at which llm_int8_threshold it computes, and this model "
                    "has none; call dequantize() first"
                )
            saved.__dict__["quantization_config"] = self.quantization_config.to_dict()
        saved.save_pretrained(folder)
        if self.generation_config:
            text = json.dumps(self.generation_config, indent=2, sort_keys=True) + "\n"
            (folder / "generation_config.json").write_text(text, encoding="utf-8")
        weights.save_weights(
            self, folder, table=self.table, tied=self.tied, max_shard_size=max_shard_size
        )

    def push_to_hub(self, repo_id: str, *, max_shard_size: str | int = "5GB", **where: Any) -> str:
        """Put its files into a repository of the Hub; `where` as in `hub.upload`."""
        return hub.upload(lambda home: self.save_pretrained(home, max_shard_size), repo_id, **where)


def backbone(
    self: Model,
    input_ids: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    positions: Tensor | None = None,
    lengths: ops.Lengths | None = None,
    attention_mask: Tensor | None = None,
    cache: KVCache | None = None,
    blocks: ops.Blocks | None = None,
) -> Tensor:
    """Hidden states [B, T, C] after the final norm.

    Either `lengths`, the documents packed in a single row (B = 1), or `attention_mask`
    [B, S] over cached and new tokens, 1 where a token is real; neither: all are real.
    Without a cache, padded rows are computed as packed ones; padding comes back as zeros.
    `blocks`: which tokens see each other whatever their order.
    """
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is None:
        raise ConfigError("backbone needs input_ids or inputs_embeds")
    batch, tokens = given.shape[:2]
    if lengths is not None:
        check_lengths(lengths, batch, tokens)
        if cache is not None:
            raise ConfigError("lengths and a cache exclude each other: pad the rows instead")
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    if attention_mask is not None and cache is None and lengths is None:
        rows = Padding.of(attention_mask)
        packed = backbone(
            self,
            None if input_ids is None else rows.pack(input_ids),
            inputs_embeds=None if inputs_embeds is None else rows.pack(inputs_embeds),
            positions=None if positions is None else rows.pack(positions),
            lengths=rows.lengths,
            blocks=None if blocks is None else replace(blocks, ids=rows.pack(blocks.ids)),
        )
        return rows.unpack(packed)
    past = cache.length if cache is not None else 0
    keep = None if attention_mask is None else attention_mask.bool()
    if keep is not None and keep.shape[1] != past + tokens:
        raise ConfigError(
            f"attention_mask has {keep.shape[1]} columns, but there are {past} cached and "
            f"{tokens} new tokens"
        )
    if positions is None:
        positions = _positions(given, lengths, keep, past)
        if cache is not None and cache.ahead is not None:
            positions = positions + cache.ahead[:, None]
    return self.trunk(
        input_ids if inputs_embeds is None else None,
        inputs_embeds=inputs_embeds,
        positions=positions,
        layout=ops.Layout(lengths, past, keep, blocks),
        cache=cache,
    )


class CausalModel(Model):
    """A language model that predicts the next token.

    A subclass sets `lm_head` and `tied`, and offers `trunk` and `layer_count`.
    """

    lm_head: nn.Module

    # -- the contract ----------------------------------------------------------------------------

    backbone = backbone

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., C]."""
        # For rows that lie apart torch would repeat a frozen weight, once for each of them.
        return self.get_output_embeddings()(hidden.contiguous())

    def token_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probability [N] fp32 of `targets` [N] after `hidden` [N, C]; exact, in chunks."""
        linear = self.get_output_embeddings()
        if type(linear) is nn.Linear and linear.bias is None:
            return ops.token_logprobs(hidden, linear.weight, targets)
        swapped = getattr(linear, "swapped", lambda: None)()  # an adapter's rows of the weight
        if swapped is not None:
            return ops.token_logprobs_swapped(hidden, targets, *swapped)
        return ops.token_logprobs_of(self.head, hidden, targets)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        lengths: ops.Lengths | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **inputs: Any,
    ) -> CausalLMOutput:
        """The familiar call. `labels` [B, T] are not shifted; -100 marks tokens without loss.

        `inputs`: what else the model's `backbone` takes (images).
        """
        refuse_attentions(output_attentions)
        cache = past_key_values
        if cache is None and use_cache:
            cache = self.new_cache()
        with block_inputs(self.trunk, output_hidden_states) as found:
            hidden = self.backbone(
                input_ids,
                inputs_embeds=inputs_embeds,
                positions=position_ids,
                lengths=lengths,
                attention_mask=attention_mask,
                cache=cache,
                **inputs,
            )
        states = hidden_states(found, hidden, attention_mask) if output_hidden_states else None
        logits = self.head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            following = F.pad(labels, (0, 1), value=-100)[:, 1:]
            if lengths is not None:
                if any(isinstance(n, tuple) for n in lengths):
                    raise ConfigError("labels need plain lengths; for branches use token_logprobs")
                ends = document_ends(lengths, following.device)
                following = following.clone()
                following[0, ends.to(following.device)] = -100
            loss = F.cross_entropy(logits.flatten(0, 1).float(), following.flatten())
        return CausalLMOutput(loss, logits, cache, hidden_states=states)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate tokens; see `topwork.generation.generate`."""
        # The one call to a layer above, by name: models are used without generation, not the
        # other way round.
        return importlib.import_module("topwork.generation").generate(self, *args, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def _positions(
    given: Tensor, lengths: ops.Lengths | None, keep: Tensor | None, past: int
) -> Tensor:
    batch, tokens = given.shape[:2]
    if lengths is not None:
        return packed_positions(lengths, given.device)
    if keep is not None:
        return (keep.long().cumsum(1) - 1).clamp_(min=0)[:, past:]
    return torch.arange(past, past + tokens, device=given.device).expand(batch, tokens)
