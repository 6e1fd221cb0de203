"""How LoRA's matrices start."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError, TopworkWarning, nearest
from topwork.peft import sites
from topwork.peft.methods import _lora_data
from topwork.peft.methods._lora_options import LoftQConfig

if TYPE_CHECKING:
    from topwork.peft.methods.lora import Lora, LoraConfig

NAMED = ("gaussian", "pissa", "olora", "orthogonal", "mica", "eva", "corda", "lora_ga", "loftq")


def check(config: LoraConfig) -> None:
    """Refuse an `init_lora_weights` that is not known or does not go with the rest."""
    if isinstance(config.init_lora_weights, str):
        config.init_lora_weights = config.init_lora_weights.lower()
    init = config.init_lora_weights
    if isinstance(init, bool) or init in NAMED or re.fullmatch(r"pissa_niter_\d+", str(init)):
        if init == "orthogonal" and config.r % 2:
            raise ConfigError(f"init_lora_weights='orthogonal' needs an even r, not {config.r}")
        _check_options(config)
        return
    raise ConfigError(
        f"init_lora_weights={init!r} is not known{nearest(str(init), NAMED)}; True, False, "
        f"{', '.join(repr(n) for n in NAMED)} or 'pissa_niter_N'"
    )


def _check_options(config: LoraConfig) -> None:
    """Options of a start go with it alone; a loaded adapter has started already."""
    for start, name in config.STARTS.items():
        if config.init_lora_weights == start:
            default = {"loftq": dict}.get(start) or config.PARTS[name]
            setattr(config, name, getattr(config, name) or default())
        elif getattr(config, name):
            if not config.inference_mode:
                raise ConfigError(f"{name} has no effect without init_lora_weights={start!r}")
            setattr(config, name, {} if start == "loftq" else None)
    if isinstance(config.loftq_config, LoftQConfig):
        config.loftq_config = asdict(config.loftq_config)
    unknown = set(config.loftq_config) - {f.name for f in fields(LoftQConfig)}
    if unknown:
        raise ConfigError(f"loftq_config has no option {', '.join(sorted(unknown))}")


@torch.no_grad()
def matrices(graft: Lora) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], both fp32; a convolution's kernel counts as inputs."""
    init, site, r = graft.config.init_lora_weights, graft.site, graft.r
    inputs = site.inputs * math.prod(site.kernel)
    a, b = graft.empty(r, inputs), graft.empty(site.outputs, r).zero_()
    if isinstance(init, str) and init not in ("gaussian", "eva"):
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
    if init == "mica":
        u, _, _ = torch.linalg.svd(weight, full_matrices=False)
        if r > u.shape[1]:
            raise ConfigError(f"init_lora_weights='mica': r={r} is more than {graft.path} has")
        return weight.new_zeros(r, site.inputs), u[:, -r:].contiguous()
    if init == "loftq":
        kept, a, b = _lora_data.from_rounding(graft, weight)
        sites.write_weight(graft.base, kept)
        return a, b
    made = _taken_out(graft, init, weight)
    if made is None:
        a, b = graft.empty(r, site.inputs), graft.empty(site.outputs, r)
        start(a, b, True, r)
        return a, b
    a, b = made
    sites.write_weight(graft.base, weight - graft.scale * b @ a)
    return a, b


def _taken_out(graft: Lora, init: str, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """A and B of the starts whose product is taken out of the weight; None where what they need
    was not gathered, as when an adapter is loaded."""
    r = graft.r
    if init == "olora":
        q, rest = torch.linalg.qr(weight)
        return rest[:r].contiguous(), q[:, :r].contiguous()
    if init not in ("corda", "lora_ga"):
        return _principal(weight, r, init, graft.scale)
    covariance = init == "corda"
    made = (
        _lora_data.from_covariance(graft) if covariance else _lora_data.from_gradient(graft, weight)
    )
    if made is None and not graft.config.inference_mode:
        warnings.warn(
            f"{graft.path} starts as plain LoRA: init_lora_weights={init!r} needs preprocess_"
            f"{'corda' if covariance else 'loraga'} on this model first",
            TopworkWarning,
            stacklevel=2,
        )
    return made


def _principal(weight: Tensor, r: int, init: str, scale: float) -> tuple[Tensor, Tensor]:
    """PiSSA: the r largest singular directions, half of each value on either side."""
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=int(init.rpartition("_")[2]))
        vh = v.t()
    root = (s[:r] / scale).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root
