"""What the generation tests share."""

import torch

IDS = torch.arange(3, 27).view(2, 12)
MASK = torch.ones_like(IDS)
PADDED = MASK.clone()
PADDED[1, :5] = 0


def prompts(count, seed=0, low=2, high=60):
    torch.manual_seed(seed)
    lengths = torch.randint(low, high, (count,)).tolist()
    return [torch.randint(0, 80, (n,)).tolist() for n in lengths]


def finish(engine):
    return list(engine.run())
