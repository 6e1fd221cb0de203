"""Pipelines of images: read, processed as the model's files say, computed in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from topwork.media import ImageProcessor, load_image
from topwork.media.images import is_array, is_pillow
from topwork.pipelines.base import Pipeline

BATCH = 16  # images in one pass, where no batch size is given


class ImagePipeline(Pipeline):
    """Images come as paths, bytes, data: addresses, Pillow's images or arrays (`load_image`)."""

    needs = ("image_processor",)
    takes: ClassVar[str] = "images"
    image_processor: ImageProcessor

    def is_single(self, inputs: Any) -> bool:
        if is_array(inputs):
            return len(inputs.shape) < 4
        kinds = (str, Path, bytes, bytearray, Mapping)
        return isinstance(inputs, kinds) or is_pillow(inputs) or hasattr(inputs, "read")

    def pixels(self, items: Sequence[Any], **options: Any) -> list[Tensor]:
        """Each image as the model reads it [channels, H, W]; `options` of the image processor."""
        found = []
        for i, item in enumerate(items):
            image = item if is_array(item) else load_image(item, f"input {i}")
            mean = self.image_processor.image_mean
            if is_pillow(image) and isinstance(mean, Sequence) and len(mean) == 1:
                image = image.convert("L")
            (row,) = self.image_processor(image, return_tensors="pt", **options).pixel_values
            found.append(row.to(self.base.device, self.base.dtype))
        return found

    def batches(self, rows: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
        """Indices and pixels [B, channels, H, W] of images of one size that go together."""
        by_size: dict[torch.Size, list[int]] = {}
        for i, row in enumerate(rows):
            by_size.setdefault(row.shape, []).append(i)
        count = self.batch_size or BATCH
        for group in by_size.values():
            for at in range(0, len(group), count):
                chosen = group[at : at + count]
                yield chosen, torch.stack([rows[i] for i in chosen])
