"""The prompts that the generation tests share."""

import torch

IDS = torch.arange(3, 27).view(2, 12)
MASK = torch.ones_like(IDS)
PADDED = MASK.clone()
PADDED[1, :5] = 0
