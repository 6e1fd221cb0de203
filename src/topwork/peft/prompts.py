"""Virtual tokens before the input: their encoders, and how they enter a model.

Embeddings stand before the input's; a prefix stands in the cache as keys and values. A causal
model of ours is entered through its contract (`backbone`, `new_cache`), so training, packing and
generation know nothing of virtual tokens; others by the arguments of their calls (`calls.py`).
Outputs are always those of the given tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.errors import CheckpointError, ConfigError
from topwork.nn.cache import KVCache
from topwork.peft import inject, methods
from topwork.peft.config import PeftConfig, at_least

Lengths = tuple[int, ...] | None
NAMES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "n_layers"),
    "token_dim": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_attention_heads": (
        "num_attention_heads",
        "n_head",
        "num_heads",
        "encoder_attention_heads",
        "n_heads",
    ),
}


@dataclass(kw_only=True)
class PromptLearningConfig(PeftConfig):
    """Settings of a method that puts virtual tokens before the input."""

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    """The width of a token (of a prefix: of the keys); None: the model's."""
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None
    """Modules that are trained whole and saved with the adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_virtual_tokens is not None:
            at_least("num_virtual_tokens", self.num_virtual_tokens, 1)

    @property
    def is_prompt_learning(self) -> bool:
        return True


class Prompt(nn.Module):
    """The virtual tokens of one adapter. A method overrides what it does differently."""

    is_prefix: ClassVar[bool] = False
    weighs: ClassVar[bool] = False
    """It has a `loss` of its own, over its virtual tokens too."""

    def __init__(self, config: Any, words: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(self.count(config), self.width(config))
        self.plain = False

    @staticmethod
    def count(config: Any) -> int:
        """Rows of the table: those of an encoder-decoder's two halves one after the other."""
        return (config.num_virtual_tokens or 0) * (config.num_transformer_submodules or 1)

    @staticmethod
    def width(config: Any) -> int:
        return config.token_dim

    @classmethod
    def settle(cls, config: Any, model: nn.Module) -> Any:
        """`config` with the sizes that it leaves open read from the model's configuration."""
        if config.num_virtual_tokens is None:
            raise ConfigError(f"{config.peft_type} needs num_virtual_tokens")
        given, halves = sizes_of(model), 2 if config.task_type == "SEQ_2_SEQ_LM" else 1
        found = {"num_transformer_submodules": config.num_transformer_submodules or halves}
        for field, names in NAMES.items():
            value = getattr(config, field) or next((given[n] for n in names if given.get(n)), None)
            if value is None:
                raise ConfigError(
                    f"{config.peft_type}: the model does not say its {field}; give it"
                )
            found[field] = value
        return replace(config, **found)

    def encoded(self, tokens: Tensor) -> Tensor:
        """Embeddings [n, width] made from the learned ones."""
        return tokens

    def forward(self, batch: int, task_ids: Tensor | None = None) -> Tensor:
        """[B, n, width]."""
        tokens = self.embedding.weight
        made = tokens if self.plain else self.encoded(tokens)
        return made.expand(batch, *made.shape)

    # -- files -----------------------------------------------------------------------------------

    def saved(self) -> dict[str, Tensor]:
        """The tensors that go to the file: the virtual tokens, not what made them."""
        with torch.no_grad():
            tokens = self.embedding.weight
            return {"prompt_embeddings": tokens if self.plain else self.encoded(tokens)}

    @torch.no_grad()
    def load(self, given: dict[str, Tensor], source: str) -> None:
        """Take the virtual tokens of a file; an encoder that made them is not in it, and so they
        are used, and trained, as they are."""
        tokens = self.taken(given, source)
        device = self.embedding.weight.device
        trained = self.embedding.weight.requires_grad
        rows, width = tokens.shape
        self.embedding = nn.Embedding(rows, width, device=device).requires_grad_(trained)
        self.embedding.weight.copy_(tokens)
        for name in [n for n, _ in self.named_children() if n != "embedding"]:
            delattr(self, name)
        self.plain = True

    def taken(self, given: dict[str, Tensor], source: str) -> Tensor:
        """The virtual tokens out of a file's tensors; CheckpointError where they do not fit."""
        tokens = given.pop("prompt_embeddings", None)
        wanted = self.saved()["prompt_embeddings"].shape
        if tokens is None or tokens.shape != wanted:
            found = "no" if tokens is None else str(list(tokens.shape))
            raise CheckpointError(
                f"{source}: prompt_embeddings {list(wanted)} expected, {found} found"
            )
        return tokens

    # -- the loss --------------------------------------------------------------------------------

    @property
    def own_targets(self) -> int:
        """How many labels the virtual tokens have themselves."""
        return 0

    def total(self, model: Any, context: Tensor) -> Tensor:
        """The summed loss of those; `context` [documents, n, C] are their states in `model`."""
        raise NotImplementedError

    def loss(
        self,
        context: Tensor,
        logits: Tensor,
        labels: Tensor,
        kinds: Tensor | None,
        lengths: Lengths,
    ) -> Tensor:
        """The loss, where it is not the model's own (`weighs`): see `methods/cpt.py`."""
        raise NotImplementedError


def made_for(model: Any, name: str, config: PromptLearningConfig) -> tuple[Any, Prompt]:
    """`config` with its sizes settled for `model`, and its virtual tokens."""
    kind = methods.method(config.peft_type).PROMPT
    config = kind.settle(config, model)
    inject.save_whole(model, config, name)
    words = model.get_input_embeddings()
    return config, kind(config, words).to(next(model.parameters()).device)


def sizes_of(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    values = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    return values.get("text_config") or values


class PromptCache(KVCache):
    """A cache that does not show the `virtual` tokens at its beginning."""

    def __init__(self, inner: KVCache, virtual: int) -> None:
        super().__init__(inner.stores)
        self.inner = inner
        self.virtual = virtual

    @property
    def length(self) -> int:
        return max(0, self.inner.length - self.virtual)

    def crop(self, length: int) -> None:
        self.inner.crop(length + self.virtual if length else 0)


def through_backbone(
    model: Any,
    prompt: Prompt,
    input_ids: Tensor | None,
    *,
    inputs_embeds: Tensor | None = None,
    positions: Tensor | None = None,
    lengths: ops.Lengths | None = None,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    task_ids: Tensor | None = None,
    aside: list[Tensor] | None = None,
) -> Tensor:
    """`model.backbone` with the virtual tokens before each document; hidden states [B, T, C] of
    the given tokens. Those of virtual embeddings, [documents, n, C], are put into `aside`."""
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is None:
        raise ConfigError("backbone needs input_ids or inputs_embeds")
    if positions is not None:
        raise ConfigError("positions cannot be given together with virtual tokens")
    batch, virtual = given.shape[0], prompt.config.num_virtual_tokens
    if cache is not None and not isinstance(cache, PromptCache):
        raise ConfigError("this cache does not hold virtual tokens; take the model's new_cache()")
    inner = None if cache is None else cache.inner
    if attention_mask is not None:
        ones = attention_mask.new_ones(batch, virtual)
        attention_mask = torch.cat([ones, attention_mask], 1)
    if inner is not None and inner.length:
        return model.backbone(
            input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, cache=inner
        )
    if prompt.is_prefix:
        if lengths is not None:
            plain = ops.unshared(lengths, given.device)
            rows = given[:, plain.take]
            hidden = _documents(model, prompt, rows, inputs_embeds is not None, plain.lengths)
            return hidden[:, plain.back]
        inner = model.new_cache() if inner is None else inner
        for layer, (k, v) in enumerate(keys_values(prompt, batch)):
            inner.update(layer, k.to(model.dtype), v.to(model.dtype))
        return model.backbone(
            input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, cache=inner
        )
    embeds = model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
    if lengths is None:
        made = prompt(batch, task_ids).to(embeds.dtype)
        hidden = model.backbone(
            inputs_embeds=torch.cat([made, embeds], 1), attention_mask=attention_mask, cache=inner
        )
        if aside is not None:
            aside.append(hidden[:, :virtual])
        return hidden[:, virtual:]
    return _packed(model, prompt, embeds[0], lengths, task_ids, aside)


def _packed(
    model: Any,
    prompt: Prompt,
    embeds: Tensor,
    lengths: ops.Lengths,
    task_ids: Tensor | None,
    aside: list[Tensor] | None,
) -> Tensor:
    """Packed documents' embeddings [T, C] behind virtual ones; a shared beginning has them once."""
    virtual = prompt.config.num_virtual_tokens
    made = prompt(len(lengths), task_ids).to(embeds.dtype)
    sizes = [sum(n) if isinstance(n, tuple) else n for n in lengths]
    parts = [part for pair in zip(made, embeds.split(sizes)) for part in pair]
    longer = tuple(
        (n[0] + virtual, *n[1:]) if isinstance(n, tuple) else n + virtual for n in lengths
    )
    hidden = model.backbone(inputs_embeds=torch.cat(parts)[None], lengths=longer)
    documents = hidden[0].split([size + virtual for size in sizes])
    if aside is not None:
        aside.append(torch.stack([part[:virtual] for part in documents]))
    return torch.cat([part[virtual:] for part in documents])[None]


def _documents(
    model: Any, prompt: Prompt, given: Tensor, embedded: bool, lengths: tuple[int, ...]
) -> Tensor:
    """Packed documents behind a prefix: a padded batch, for a cache is by row."""
    rows = nn.utils.rnn.pad_sequence(list(given[0].split(lengths)), batch_first=True)
    place = torch.arange(rows.shape[1], device=given.device)
    keep = place < torch.tensor(lengths, device=given.device)[:, None]
    hidden = through_backbone(
        model,
        prompt,
        None if embedded else rows,
        inputs_embeds=rows if embedded else None,
        attention_mask=keep.long(),
    )
    return hidden[keep][None]


def keys_values(prompt: Prompt, batch: int) -> list[tuple[Tensor, Tensor]]:
    """A prefix as keys and values [B, n, heads, head size] of each layer.

    Of an encoder-decoder, layer i has pair 2i (modulo the layers): so peft's files mean it.
    """
    config = prompt.config
    heads = config.num_attention_heads
    made = prompt(batch).view(batch, config.num_virtual_tokens, config.num_layers, 2, heads, -1)
    pairs = [(k, v) for k, v in (layer.unbind(2) for layer in made.unbind(2))]
    if config.num_transformer_submodules == 2:
        return [pairs[2 * i % len(pairs)] for i in range(len(pairs))]
    return pairs


def keys_values_of(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The keys and values [T, heads, head size] that each layer has for `ids` [1, T]."""
    if callable(getattr(model, "backbone", None)):
        cache = model.new_cache()
        model.backbone(ids, cache=cache)
        pairs: list[Any] = [getattr(store, "buffers", None) for store in cache.stores]
        if not all(pairs):
            raise ConfigError(f"{type(model).__name__} does not keep every key: no cartridge of it")
        return [(k[0, : ids.shape[1]], v[0, : ids.shape[1]]) for k, v in pairs]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    return [(k[0].transpose(0, 1), v[0].transpose(0, 1)) for k, v in pairs]
