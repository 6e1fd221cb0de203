"""LoRA's starts that look at more than a draw: gradients (LoRA-GA), the inputs' covariance
(CorDA), what rounding loses (LoftQ)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from topwork import hub
from topwork.errors import CheckpointError, ConfigError
from topwork.peft import inject, sites
from topwork.peft.methods._lora_options import LoftQConfig, LoraGAConfig
from topwork.peft.targets import by_pattern, target_names
from topwork.quant import Blocks
from topwork.weights import write_tensors

if TYPE_CHECKING:
    from topwork.peft.methods.lora import Lora, LoraConfig

Pair = tuple[Tensor, Tensor]
_GRADIENTS: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
_DIRECTIONS: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor, Tensor]] = WeakKeyDictionary()


def linears(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The linears that `config` targets, by path."""
    from topwork.peft.methods.lora import Lora

    if config.target_modules is None:
        config.target_modules = Lora.settle(replace(config), model).target_modules
    return {path: model.get_submodule(path) for path in target_names(model, config, ("linear",))}


@contextmanager
def hooks(made: list[Any]) -> Iterator[None]:
    """Within it the hooks `made` stand."""
    try:
        yield
    finally:
        for hook in made:
            hook.remove()


# -- LoRA-GA -------------------------------------------------------------------------------------


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], Any],
    cache_file: str | Path | None = None,
) -> None:
    """Gather the mean gradient of each targeted weight while `train_step` runs forward and
    backward, for `get_peft_model` with `init_lora_weights="lora_ga"` (arXiv:2407.05000).

    `cache_file`: a .safetensors file, read if it is there and else written.
    """
    if lora_config.init_lora_weights != "lora_ga":
        raise ConfigError("preprocess_loraga needs init_lora_weights='lora_ga'")
    found = linears(model, lora_config)
    for path, linear in found.items():
        if not isinstance(getattr(linear, "weight", None), nn.Parameter):
            raise ConfigError(f"LoRA-GA needs gradients, which the weight of {path} does not have")
    cached = _read(cache_file, found)
    _GRADIENTS.update(cached or _gradients(model, found, train_step))
    if cache_file is not None and cached is None:
        named = {path: _GRADIENTS[linear] for path, linear in found.items()}
        write_tensors(Path(cache_file), named)


def _read(file: str | Path | None, found: dict[str, nn.Module]) -> dict[nn.Module, Tensor] | None:
    if file is None or not Path(file).exists():
        return None
    held = load_file(file)
    missing = sorted(found.keys() - held.keys())
    if missing:
        raise CheckpointError(f"{file}: nothing for {', '.join(missing[:20])}")
    return {linear: held[path] for path, linear in found.items()}


def _gradients(
    model: nn.Module, found: dict[str, nn.Module], train_step: Callable[[], Any]
) -> dict[nn.Module, Tensor]:
    wanted = {id(linear.weight): [linear, 0] for linear in found.values()}
    before, training = [(p, p.requires_grad) for p in model.parameters()], model.training

    def count(parameter: Tensor) -> None:
        wanted[id(parameter)][1] += 1

    model.train().requires_grad_(False)
    weights: list[Any] = [linear.weight for linear in found.values()]
    made = [w.requires_grad_(True).register_post_accumulate_grad_hook(count) for w in weights]
    with hooks(made), torch.enable_grad():
        train_step()
    gathered: dict[nn.Module, Tensor] = {}
    for path, linear in found.items():
        weight: Any = linear.weight
        times = wanted[id(weight)][1]
        if not times:
            raise ConfigError(
                f"LoRA-GA: train_step gave {path} no gradient; does it call backward?"
            )
        gradient = weight.grad / times
        gathered[linear] = gradient.t() if sites.site_of(linear).transposed else gradient
        weight.grad = None
    model.train(training)
    for parameter, trained in before:
        parameter.requires_grad_(trained)
    return {linear: g.contiguous() for linear, g in gathered.items()}


def from_gradient(graft: Lora, weight: Tensor) -> Pair | None:
    """LoRA-GA's A and B; None where no gradient was gathered."""
    gradient = _GRADIENTS.pop(graft.base, None)
    if gradient is None:
        return None
    options, r = graft.config.lora_ga_config or LoraGAConfig(), graft.r
    u, s, vh = leading(gradient.float(), 2 * r)
    if len(s) < 2 * r:
        raise ConfigError(f"LoRA-GA needs 2r={2 * r} directions; {graft.path} has {len(s)}")
    first, second = torch.arange(r), torch.arange(r, 2 * r)
    mixed = torch.randperm(2 * r)[:r]
    at_a, at_b = {
        "ArBr": (2 * first + 1, 2 * first),
        "A2rBr": (second, first),
        "ArB2r": (first, second),
        "random": (mixed, mixed),
    }[options.direction]
    a, b = vh[at_a], u[:, at_b] * s[at_b]
    if options.scale == "stable":
        b = b * len(b) ** 0.25 / options.stable_gamma**0.5
    elif options.scale == "weight_svd":
        b = b * (leading(weight, 1)[1][0] / s[at_b[0]].clamp(min=1e-12))
    elif options.scale == "gd_scale":
        a, b = a / graft.scale, b / graft.scale
    return a.contiguous(), b.contiguous()


def leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` leading singular triplets (u, s, vh); of large matrices by random projection."""
    if min(matrix.shape) <= 4 * count:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(matrix, 2 * count, niter=4)
        vh = v.t()
    return u[:, :count], s[:count], vh[:count]


# -- CorDA ---------------------------------------------------------------------------------------


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Gather the covariance of each targeted linear's inputs while `run_model` runs, and from it
    the directions for `get_peft_model` with `init_lora_weights="corda"` (arXiv:2406.05223).

    `hooked_model`: the model that `run_model` runs, where it is another one than `model`.
    """
    options = lora_config.corda_config
    if options is None or lora_config.init_lora_weights != "corda":
        raise ConfigError("preprocess_corda needs init_lora_weights='corda'")
    found = linears(model, lora_config)
    file = options.cache_file
    if file is not None and Path(file).exists():
        held = load_file(file)
        for path, linear in found.items():
            _DIRECTIONS[linear] = tuple(held[f"{path}.{part}"] for part in "usv")  # type: ignore[assignment]
        return
    covariances = _read(options.covariance_file, found)
    if covariances is None:
        if run_model is None:
            raise ConfigError("preprocess_corda needs run_model where no covariance_file is there")
        run = hooked_model or model
        half = options.use_float16_for_covariance
        covariances = _covariances(run.eval(), found, run_model, half)
        if options.covariance_file is not None:
            named = {path: covariances[linear] for path, linear in found.items()}
            write_tensors(Path(options.covariance_file), named)
    for path, linear in found.items():
        r = by_pattern(lora_config.rank_pattern, path, lora_config.r)
        u, s, v = _seen_directions(sites.read_weight(linear).float(), covariances[linear].float())
        part = slice(0, r) if options.corda_method == "ipm" else slice(len(s) - r, len(s))
        _DIRECTIONS[linear] = u[:, part].clone(), s[part].clone(), v[:, part].clone()
    if file is not None:
        named = {
            f"{path}.{part}": tensor.contiguous()
            for path, linear in found.items()
            for part, tensor in zip("usv", _DIRECTIONS[linear])
        }
        write_tensors(Path(file), named)


def _covariances(
    run: nn.Module, found: dict[str, nn.Module], run_model: Callable[[], Any], half: bool
) -> dict[nn.Module, Tensor]:
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(found, 0)

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().flatten(0, -2)
            x = x if half else x.float()
            x = x / x.max().abs()
            if not bool(x.isfinite().all()):
                raise ConfigError(f"CorDA: the inputs of {path} are not finite or nowhere positive")
            sums[path] = sums.get(path, 0) + x.t() @ x
            counts[path] += 1

        return run.get_submodule(path).register_forward_pre_hook(hook)

    with hooks([watch(path) for path in found]):
        run_model()
    unseen = [path for path, count in counts.items() if not count]
    if unseen:
        raise ConfigError(f"CorDA: run_model did not reach {', '.join(unseen[:20])}")
    return {linear: sums[path] / counts[path] for path, linear in found.items()}


def _seen_directions(weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u [out, n], s [n], v [in, n] with u diag(s) vᵀ = W, by the singular values of W C."""
    damp, eye = 0.01, torch.eye(len(covariance), device=covariance.device)
    while True:
        damped = covariance + eye * covariance.diagonal().mean() * damp
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < 0.05:
            break
        damp *= 2
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    return u, s, (vh @ inverse).t()


def from_covariance(graft: Lora) -> Pair | None:
    """CorDA's A and B; None where no covariance was gathered."""
    held = _DIRECTIONS.pop(graft.base, None)
    if held is None:
        return None
    u, s, v = held
    if len(s) != graft.r:
        raise ConfigError(f"CorDA: {len(s)} directions were gathered for {graft.path}, r={graft.r}")
    root = (s / graft.scale).sqrt()
    return root[:, None] * v.t(), u * root


# -- LoftQ ---------------------------------------------------------------------------------------


def rounded(weight: Tensor, bits: int) -> Tensor:
    """`weight` [out, in] as NF4 in blocks of 64, or int8 by row, would give it back."""
    if bits == 4:
        form = Blocks("nf4")
        return form.decode(form.encode(weight), torch.empty_like(weight))
    step = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / step).round() * step


def from_rounding(graft: Lora, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rounded weight, and A and B that take up what it lost, by turns."""
    if hasattr(graft.base, "dequantised_weight"):
        raise ConfigError(
            f"{graft.path} is quantised already, and what that lost is not known: start plainly, "
            "then call replace_lora_weights_loftq"
        )
    options = graft.config.loftq_config
    options = options if isinstance(options, LoftQConfig) else LoftQConfig(**options)
    kept = rounded(weight, options.loftq_bits)
    a, b = _lost(weight - kept, graft.r, graft.scale)
    for _ in range(options.loftq_iter - 1):
        kept = rounded(weight - graft.scale * b @ a, options.loftq_bits)
        a, b = _lost(weight - kept, graft.r, graft.scale)
    return kept, a, b


def _lost(change: Tensor, r: int, scale: float) -> Pair:
    """A and B with scale · B A nearest to `change`."""
    u, s, vh = leading(change, r)
    root = (s / scale).sqrt()
    return root[:, None] * vh, u * root


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Set A and B on quantised linears so that they take up what rounding lost (LoftQ's first
    turn), from the checkpoint `model_path` of the weights as they were.

    `callback(model, path)`: called after each layer; False puts the layer's A and B back.
    """
    from topwork.peft.methods.lora import Lora

    source = model_path or getattr(peft_model.config, "_name_or_path", None)
    if source is None:
        raise ConfigError("replace_lora_weights_loftq needs model_path, the unrounded checkpoint")
    folder = hub.resolve(source, want=("weights",)).folder
    grafts: list[Any] = [
        g
        for g in inject.grafts_of(peft_model, adapter_name)
        if isinstance(g, Lora) and hasattr(g.base, "dequantised_weight")
    ]
    if not grafts:
        raise ConfigError("no quantised linear carries LoRA here")
    homes = _homes(folder)
    for graft in grafts:
        was = [m.clone() for m in graft.matrices()]
        weight = _original(folder, homes, graft.path)
        change = weight.float() - sites.read_weight(graft.base).float()
        made = _lost(change.to(graft.layer.device), graft.r, graft.scale)
        for own, new in zip(graft.matrices(), made):
            own.copy_(new)
        if callback is not None and not callback(peft_model, graft.path):
            for own, old in zip(graft.matrices(), was):
                own.copy_(old)


def _homes(folder: Path) -> dict[str, str]:
    """Tensor → file of a checkpoint."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def _original(folder: Path, homes: dict[str, str], path: str) -> Tensor:
    names = [f"{path}.weight", f"{path.partition('.')[2]}.weight"]
    name = next((n for n in names if n in homes), None)
    if name is None:
        raise CheckpointError(f"{folder} has no {names[0]}")
    with safe_open(folder / homes[name], framework="pt") as file:
        return file.get_tensor(name)
