"""Texts with images in them: a tower's features stand in place of the image tokens' embeddings.

x = embed(ids);   x[ids = image token] = project(tower(images))
logits = decoder(x)

Which tower, how its features become the decoder's, where an image's tokens stand in space and
whether they look ahead, is the spec's to say.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError, nearest
from topwork.models.base import CausalLMOutput, backbone
from topwork.models.config import Config
from topwork.models.decoder import CausalDecoder, DecoderSpec
from topwork.nn.cache import KVCache
from topwork.weights import Table


class Sight(Protocol):
    """How images become features."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of what it takes, `pixel_values` first."""
        ...

    def place(self, home: nn.Module) -> None:
        """Put its parts into the model."""

    @property
    def features(self) -> Callable[..., Tensor]:
        """(model, **inputs) → one row for each image token, [N, C], image after image."""
        ...

    def checkpoint(self, home: nn.Module, on: bool) -> None:
        """Compute the tower's blocks again in the backward pass, or not."""


class Ahead(Protocol):
    """Which tokens look ahead."""

    def blocks(self, ids: Tensor, image: int, types: Tensor | None) -> ops.Blocks | None:
        """For `ids` [B, T] with their `token_type_ids`; None: no token does."""
        ...


@dataclass(frozen=True)
class Prefix:
    """Tokens of type 0 are the prompt, whose tokens all see each other (PaliGemma)."""

    def blocks(self, ids: Tensor, image: int, types: Tensor | None) -> ops.Blocks | None:
        return None if types is None else ops.Blocks(torch.where(types == 0, 0, -1))


@dataclass(frozen=True)
class Images:
    """The tokens of one image see each other (Gemma 3)."""

    def blocks(self, ids: Tensor, image: int, types: Tensor | None) -> ops.Blocks | None:
        inside = ids == image
        if not bool(inside.any()):
            return None
        begins = inside & ~torch.nn.functional.pad(inside, (1, 0))[:, :-1]
        return ops.Blocks(torch.where(inside, begins.cumsum(1) - 1, -1), windowed=True)


@dataclass(frozen=True)
class GridPlaces:
    """Positions [T, 3] of time, height and width (M-RoPE): an image's tokens stand on its grid,
    and the text goes on behind the longest side. `merge`: patches along a token's side."""

    merge: int
    grids: str = "image_grid_thw"

    def places(self, ids: Tensor, image: int, grids: list[list[int]]) -> tuple[Tensor, int]:
        """Positions [T, 3] of one text's `ids` [T], and how far ahead of their count they end.

        Uses up the first of `grids`, one for each image.
        """
        pieces, at, start = [], 0, 0
        found = (ids == image).nonzero().flatten().tolist()
        while found:
            first = found[0]
            text = torch.arange(start, start + first - at)
            pieces.append(text[:, None].expand(-1, 3))
            start += first - at
            if not grids:
                raise ConfigError(f"the image token at {first} has no row in {self.grids}")
            frames, high, wide = grids.pop(0)
            high, wide = high // self.merge, wide // self.merge
            count = frames * high * wide
            if found[min(count, len(found)) - 1] != first + count - 1:
                raise ConfigError(
                    f"the image of {frames} x {high} x {wide} tokens at {first} is cut: its "
                    f"{count} image tokens must follow each other"
                )
            sides = [torch.arange(n) for n in (frames, high, wide)]
            pieces.append(
                torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).view(-1, 3) + start
            )
            at, start = first + count, start + max(high, wide)
            found = found[count:]
        text = torch.arange(start, start + len(ids) - at)
        pieces.append(text[:, None].expand(-1, 3))
        return torch.cat(pieces).to(ids.device), start - at


@dataclass(frozen=True)
class ImageTextSpec:
    """A decoder that reads images. `trunk` and `head`: the paths of the decoder and its head.

    `adapters`: how adapters' files name its modules, where not as here.
    """

    decoder: DecoderSpec
    images: Sight
    image_token: int
    trunk: str
    head: str
    table: Table
    ahead: Ahead | None = None
    places: GridPlaces | None = None
    adapters: Table | None = None


@dataclass(frozen=True)
class Prompt:
    """Texts with their images, ready for the decoder: embeddings [B, T, C], positions [B, T, 3]
    (None: counted), which tokens look ahead, and how far ahead positions go on [B]."""

    embeds: Tensor
    positions: Tensor | None = None
    blocks: ops.Blocks | None = None
    ahead: Tensor | None = None

    def part(self, start: int, stop: int, copies: int) -> Prompt:
        """Tokens `start` to `stop`, each row so many times; blocks from the beginning on."""

        def rows(value: Tensor | None, first: int) -> Tensor | None:
            return None if value is None else value.repeat_interleave(copies, 0)[:, first:stop]

        blocks = self.blocks
        if blocks is not None:
            blocks = ops.Blocks(blocks.ids.repeat_interleave(copies, 0)[:, :stop], blocks.windowed)
        ahead = None if self.ahead is None else self.ahead.repeat_interleave(copies)
        embeds = self.embeds.repeat_interleave(copies, 0)[:, start:stop]
        return Prompt(embeds, rows(self.positions, start), blocks, ahead)


class ImageTextModel(CausalDecoder):
    """A language model whose texts have images in them."""

    task = "image-text-to-text"

    def __init__(self, config: Config, spec: ImageTextSpec) -> None:
        self.trunk_path, self.head_path = spec.trunk, spec.head
        super().__init__(config, spec.decoder)
        self.spec, self.table, self.adapter_table = spec, spec.table, spec.adapters
        spec.images.place(self)

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        super().gradient_checkpointing_enable()
        self.spec.images.checkpoint(self, True)

    def gradient_checkpointing_disable(self) -> None:
        super().gradient_checkpointing_disable()
        self.spec.images.checkpoint(self, False)

    # -- images ----------------------------------------------------------------------------------

    def get_image_features(self, pixel_values: Tensor, **inputs: Any) -> Tensor:
        """The features of all images [N, C], one row for each image token."""
        return self.spec.images.features(self, pixel_values=pixel_values, **inputs)

    def embed(self, input_ids: Tensor, images: dict[str, Any], need: bool = True) -> Tensor:
        """`input_ids` [B, T] as embeddings [B, T, C], the image tokens' made of the images.

        ConfigError where tokens and images do not agree; with `need` False tokens may stay
        without images.
        """
        inside = input_ids == self.spec.image_token
        count = int(inside.sum())
        words = self.get_input_embeddings()
        given = {name: value for name, value in images.items() if value is not None}
        if "pixel_values" not in given:
            if count and need:
                raise ConfigError(
                    f"the text has {count} image tokens (id {self.spec.image_token}), but no "
                    "pixel_values were given"
                )
            return words(input_ids)
        x = words(input_ids.masked_fill(inside, 0))
        features = self.get_image_features(**given)
        if len(features) != count:
            shape = list(given["pixel_values"].shape)
            raise ConfigError(
                f"the images (pixel_values {shape}) give {len(features)} features, but the text "
                f"has {count} image tokens (id {self.spec.image_token}): "
                + ("an image too many" if len(features) > count else "an image is missing")
                + ", or its placeholder was not written for its size, or was cut"
            )
        return x.masked_scatter(inside[..., None], features.to(x.dtype))

    def prompt(
        self,
        input_ids: Tensor,
        images: dict[str, Any],
        *,
        types: Tensor | None = None,
        attention_mask: Tensor | None = None,
        lengths: ops.Lengths | None = None,
        need: bool = True,
    ) -> Prompt:
        """The decoder's input for texts and their images; `need` False: behind such a text."""
        known = self.spec.images.inputs
        for name in images:
            if name not in known:
                raise ConfigError(
                    f"{self.config.model_type} has no input {name!r}{nearest(name, known)}; it "
                    f"takes input_ids, {', '.join(known)}"
                )
        embeds, spec = self.embed(input_ids, images, need), self.spec
        blocks = positions = ahead = None
        if spec.ahead is not None and need:
            blocks = spec.ahead.blocks(input_ids, spec.image_token, types)
        if spec.places is not None and images.get(spec.places.grids) is not None:
            grids = images[spec.places.grids].tolist()
            positions, ahead = self._places(input_ids, grids, attention_mask, lengths)
        return Prompt(embeds, positions, blocks, ahead)

    def _places(
        self,
        ids: Tensor,
        grids: list[list[int]],
        attention_mask: Tensor | None,
        lengths: ops.Lengths | None,
    ) -> tuple[Tensor, Tensor]:
        assert self.spec.places is not None
        places, image = self.spec.places, self.spec.image_token
        if lengths is not None:
            made, at = [], 0
            for entry in lengths:
                first, *branches = entry if isinstance(entry, tuple) else (entry,)
                found, beyond = places.places(ids[0, at : at + first], image, grids)
                made.append(found)
                at += first
                for size in branches:  # each goes on where the beginning ends
                    found, _ = places.places(ids[0, at : at + size], image, grids)
                    made.append(found + first + beyond)
                    at += size
            return torch.cat(made)[None], ids.new_zeros(1)
        positions, ahead = ids.new_zeros(*ids.shape, 3), []
        for i, row in enumerate(ids):
            keep = slice(None) if attention_mask is None else attention_mask[i].bool()
            positions[i, keep], beyond = places.places(row[keep], image, grids)
            ahead.append(beyond)
        return positions, ids.new_tensor(ahead)

    # -- the contract ----------------------------------------------------------------------------

    def backbone(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        lengths: ops.Lengths | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        token_type_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **images: Any,
    ) -> Tensor:
        """Hidden states [B, T, C]; see `base.backbone`.

        `images`: `pixel_values` and what else the family's processor gives. The images of packed
        documents stand in the order of their tokens.
        """
        given: dict[str, Any] = {"positions": positions}
        if input_ids is None or inputs_embeds is not None:
            if any(value is not None for value in images.values()):
                raise ConfigError("images are placed by input_ids: leave inputs_embeds out")
            given |= {"inputs_embeds": inputs_embeds}
        else:
            prompt = self.prompt(
                input_ids, images, types=token_type_ids, lengths=lengths,
                attention_mask=attention_mask, need=cache is None or not cache.length,
            )  # fmt: skip
            given = {
                "inputs_embeds": prompt.embeds,
                "positions": prompt.positions if positions is None else positions,
                "blocks": prompt.blocks,
            }
            if cache is not None and prompt.ahead is not None:
                cache.ahead = prompt.ahead
        return backbone(self, lengths=lengths, attention_mask=attention_mask, cache=cache, **given)

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutput:
        """The familiar call, with the images' inputs as keywords."""
        return super().forward(*args, **kwargs)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Any:
        """Continue texts with images: the processor's output and the options of
        `topwork.generation.generate`."""
        names = (*self.spec.images.inputs, "token_type_ids", "mm_token_type_ids")
        images = {name: options.pop(name) for name in names if name in options}
        images.pop("mm_token_type_ids", None)
        types = images.pop("token_type_ids", None)
        inside = input_ids == self.spec.image_token
        if not bool(inside.any()) and not any(v is not None for v in images.values()):
            nothing = Prompt(self.get_input_embeddings()(input_ids[:, :0]))
            generation = importlib.import_module("topwork.generation")
            return generation.generate(
                PromptView(self, nothing), input_ids, attention_mask, **options
            )
        if options.get("guidance_scale") not in (None, 1) or options.get("assistant_model"):
            raise ConfigError("guidance_scale and assistant_model do not go with images")
        if isinstance(self.spec.ahead, Prefix) and types is None:
            types = torch.zeros_like(input_ids)
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                prompt = self.prompt(input_ids, images, types=types, attention_mask=attention_mask)
            view = PromptView(self, prompt)
            # An image token may lie outside the vocabulary, which the loops write scores for.
            outside = input_ids >= self.spec.decoder.vocab
            ids = input_ids.masked_fill(outside, 0)
            generation = importlib.import_module("topwork.generation")
            out = generation.generate(view, ids, attention_mask, **options)
        finally:
            self.train(was_training)
        if bool(outside.any()):
            self._put_back(out if isinstance(out, Tensor) else out.sequences, input_ids)
        return out

    @torch.inference_mode()
    def _put_back(self, made: Tensor, prompt: Tensor) -> None:
        """The image tokens of `prompt` [B, T] into `made` [B · copies, T + new]."""
        begun = prompt.repeat_interleave(len(made) // len(prompt), 0)
        made[:, : begun.shape[1]] = begun


class PromptView:
    """The model behind a prompt with images, as the decoding loops see a causal model."""

    trunk = None

    def __init__(self, model: ImageTextModel, prompt: Prompt) -> None:
        self.model, self.prompt = model, prompt
        text = model.config.get("text_config") or {}
        sizes = {"vocab_size": model.spec.decoder.vocab}
        sizes["max_position_embeddings"] = model.spec.decoder.context
        own = {k: v for k, v in model.config.to_dict().items() if v is not None}
        self.config = Config(**{**text, **own, **sizes})
        self.generation_config = model.generation_config
        self.layer_count, self.windows = model.layer_count, model.windows
        self.turning_point = model.turning_point
        self.head = model.head
        self.training = False

    def new_cache(self, batch_size: int | None = None) -> KVCache:
        return self.model.new_cache(batch_size)

    def backbone(
        self, ids: Tensor, *, attention_mask: Tensor | None = None, cache: KVCache
    ) -> Tensor:
        """Hidden states of `ids` [B, T]: those of the prompt from its embeddings."""
        size, at, new = self.prompt.embeds.shape[1], cache.length, ids.shape[1]
        read = max(0, min(new, size - at))
        pieces = []
        if read:
            copies = len(ids) // len(self.prompt.embeds)
            piece = self.prompt.part(at, at + read, copies)
            if piece.blocks is not None and at + read < size:
                raise ConfigError(
                    "prefill_chunk_size would cut a prompt whose tokens look ahead: leave it out"
                )
            cache.ahead = None
            mask = None if attention_mask is None else attention_mask[:, : at + read]
            pieces.append(
                backbone(
                    self.model, inputs_embeds=piece.embeds, positions=piece.positions,
                    attention_mask=mask, cache=cache, blocks=piece.blocks,
                )
            )  # fmt: skip
            cache.ahead = piece.ahead
        if read < new:
            pieces.append(
                self.model.backbone(ids[:, read:], attention_mask=attention_mask, cache=cache)
            )
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def eval(self) -> PromptView:
        return self

    def train(self, mode: bool = True) -> PromptView:
        return self
