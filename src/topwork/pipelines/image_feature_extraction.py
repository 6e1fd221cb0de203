"""Hidden states of an image's patches, and one vector per image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from topwork.errors import ConfigError
from topwork.pipelines.images import ImagePipeline


class ImageFeatureExtractionPipeline(ImagePipeline):
    """`pipe(image)` → [1][tokens][C]; with `pool` one vector [1][C]; `embed` gives a tensor."""

    model_task = "base"

    def run(
        self,
        items: list[Any],
        pool: bool = False,
        return_tensors: bool = False,
        image_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """`pool`: the model's own vector of an image; of a model of images and texts, the one in
        the space that they share. `image_processor_kwargs`: options of the image processor."""
        found: list[Tensor] = [torch.empty(0)] * len(items)
        rows = self.pixels(items, **(image_processor_kwargs or {}))
        shared = getattr(self.base, "get_image_features", None)
        for group, pixels in self.batches(rows):
            if pool and shared is not None:
                made = shared(pixels)
            else:
                output = self.base.trunk(pixels)
                made = output.pooler_output if pool else output.last_hidden_state
                if made is None:
                    raise ConfigError(
                        f"{self.config.model_type} has no vector of a whole image: leave pool out"
                    )
            for i, row in zip(group, made.float().cpu()):
                found[i] = row[None]
        return found if return_tensors else [row.tolist() for row in found]

    def embed(self, images: Any, normalize: bool = True) -> Tensor:
        """One vector per image [N, C], of unit length (their products are cosines)."""
        items = [images] if self.is_single(images) else list(images)
        rows = self.results(items, {"pool": True, "return_tensors": True})
        if not rows:
            return torch.empty(0)
        whole = torch.cat(rows)
        return torch.nn.functional.normalize(whole, dim=-1) if normalize else whole
