"""How LoRA's matrices start."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError, nearest
from topwork.peft import sites

if TYPE_CHECKING:
    from topwork.peft.methods.lora import Lora, LoraConfig

NAMED = ("gaussian", "pissa", "olora", "orthogonal")
# These take their product out of the base's weight.
TAKE_OUT = ("pissa", "olora")


def check(config: LoraConfig) -> None:
    """Refuse an `init_lora_weights` that is not known or does not go with the rest."""
    init = config.init_lora_weights
    if isinstance(init, bool) or init in NAMED or re.fullmatch(r"pissa_niter_\d+", str(init)):
        if init == "orthogonal" and config.r % 2:
            raise ConfigError(f"init_lora_weights='orthogonal' needs an even r, not {config.r}")
        return
    raise ConfigError(
        f"init_lora_weights={init!r} is not known{nearest(str(init), NAMED)}; True, False, "
        f"{', '.join(repr(n) for n in NAMED)} or 'pissa_niter_N'"
    )


@torch.no_grad()
def matrices(graft: Lora) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], both fp32; a convolution's kernel counts as inputs."""
    init, site, r = graft.config.init_lora_weights, graft.site, graft.r
    inputs = site.inputs * math.prod(site.kernel)
    a, b = graft.empty(r, inputs), graft.empty(site.outputs, r).zero_()
    if isinstance(init, str) and init != "gaussian":
        if site.kind != "linear":
            raise ConfigError(f"init_lora_weights={init!r} goes to linears, not to {graft.path}")
        return _from_weight(graft, init)
    if site.kind == "embedding":
        # As in peft: A starts at zero and B is random.
        return (a.normal_() if init is False else a.zero_()), b.normal_()
    start(a, b, init, r)
    return a, b


def start(a: Tensor, b: Tensor, init: bool | str, r: int) -> None:
    """Fill A and B; their product is zero unless `init` is False."""
    b.zero_()
    if init == "gaussian":
        a.normal_(std=1 / r)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    if init is False:
        nn.init.kaiming_uniform_(b, a=math.sqrt(5))


def _from_weight(graft: Lora, init: str) -> tuple[Tensor, Tensor]:
    r, site = graft.r, graft.site
    if init == "orthogonal":
        q, _ = torch.linalg.qr(torch.randn(r, r))
        a = (torch.randn(site.inputs, r // 2) @ q[0::2]).t() / 10
        b = torch.randn(site.outputs, r // 2) @ q[1::2] / 10
        return a.contiguous().to(graft.layer.device), b.to(graft.layer.device)
    weight = sites.read_weight(graft.base).float()
    if init == "olora":
        q, rest = torch.linalg.qr(weight)
        a, b = rest[:r].contiguous(), q[:, :r].contiguous()
    else:
        a, b = _principal(weight, r, init, graft.scale)
    sites.write_weight(graft.base, weight - graft.scale * b @ a)
    return a, b


def _principal(weight: Tensor, r: int, init: str, scale: float) -> tuple[Tensor, Tensor]:
    """PiSSA: the r largest singular directions, half of each value on either side."""
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=int(init.rpartition("_")[2]))
        vh = v.t()
    root = (s[:r] / scale).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root
