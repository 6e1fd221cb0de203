"""Reading and writing a module's tensors: safetensors (streamed) and, when allowed, legacy .bin.

Format: a little header of JSON and raw tensors per file; several files share an index that maps
each name to its file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from topwork.errors import CheckpointError
from topwork.hub import Checkpoint
from topwork.weights.gguf import GgufFile

SHOWN = 20  # names listed in an error before "and N more"


@dataclass(frozen=True)
class LoadReport:
    """What a load did: tensors taken, and file keys that were left out on purpose."""

    loaded: tuple[str, ...]
    ignored: tuple[str, ...]


def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    tied: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    prefix: str = "",
) -> LoadReport:
    """Fill `module` (it may stand on the meta device) from the checkpoint, one tensor at a time.

    `dtype` None keeps the file's. `tied` maps an alias to its owner: either name may be absent
    from the file. `ignore` holds patterns of file keys to leave out. A key that the module lacks
    is tried again behind `prefix`. Raises CheckpointError that lists every missing, unexpected
    or wrong-shaped tensor.
    """
    tied = dict(tied or {})
    wanted = dict(module.named_parameters(remove_duplicate=False))
    wanted |= dict(_persistent_buffers(module))
    owners = {alias: owner for alias, owner in tied.items() if alias in wanted}
    loaded: set[str] = set()
    ignored, unexpected, wrong = [], [], []
    for key, read in _tensors(checkpoint):
        name = key if key in wanted else prefix + key
        if name not in wanted:
            skip = any(re.search(pattern, key) for pattern in ignore)
            (ignored if skip else unexpected).append(key)
            continue
        name = owners.get(name, name)
        if name in loaded:
            ignored.append(key)
            continue
        tensor = read()
        if tensor.shape != wanted[name].shape:
            wrong.append(
                f"{name} {list(tensor.shape)} in the file, {list(wanted[name].shape)} here"
            )
            continue
        floating = tensor.is_floating_point() and dtype is not None
        _assign(module, name, tensor.to(device, dtype if floating else tensor.dtype, copy=True))
        loaded.add(name)
    misfits = {text.split(" ", 1)[0] for text in wrong}
    missing = sorted(set(wanted) - loaded - set(owners) - misfits)
    problems = [
        f"{what}: {_listed(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", wrong),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.name}: the weights do not fit {type(module).__name__}: "
            + "; ".join(problems)
        )
    return LoadReport(tuple(sorted(loaded)), tuple(ignored))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    state = module.state_dict(keep_vars=True)
    return ((name, value) for name, value in state.items() if not isinstance(value, nn.Parameter))


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        old = owner._parameters[leaf]
        frozen = old is not None and not old.requires_grad
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=not frozen)
    else:
        owner._buffers[leaf] = tensor


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    for path in checkpoint.weight_files:
        if checkpoint.format == "gguf":
            yield from GgufFile(path).tensors()
            continue
        if checkpoint.format == "bin":
            yield from _pickled(path)
            continue
        shard = _Shard(path)
        for key in shard.keys:
            yield key, partial(shard.read, key)


REOPEN = 16 << 20  # bytes read before the file's mapped pages are given back


class _Shard:
    """One safetensors file, read tensor by tensor; its mapped pages do not pile up in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()
        self.keys = list(self._file.keys())

    def _open(self) -> None:
        try:
            self._file = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: damaged or truncated: {error}") from error
        self._read = 0

    def read(self, key: str) -> Tensor:
        if self._read > REOPEN:
            self._open()
        try:
            tensor = self._file.get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: cannot read {key}: {error}") from error
        self._read += tensor.numel() * tensor.element_size()
        return tensor


def _pickled(path: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged archive
        raise CheckpointError(f"{path}: not a plain file of weights: {error}") from error
    for key in list(state):
        yield key, partial(state.pop, key)


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def save_weights(
    module: nn.Module,
    folder: str | Path,
    *,
    tied: Mapping[str, str] | None = None,
    max_shard_size: str | int = "5GB",
) -> list[Path]:
    """Write the module's tensors into `folder`; tied aliases are left to their owner.

    Each file is written beside its place and moved there when it is whole. Returns the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    limit = _bytes(max_shard_size)
    aliases = set(tied or {})
    state = {k: v.detach() for k, v in module.state_dict().items() if k not in aliases}
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor.contiguous()
        filled += size
    if len(shards) == 1:
        return [_write(folder / "model.safetensors", shards[0])]
    count = len(shards)
    paths, index = [], {}
    for i, shard in enumerate(shards, 1):
        path = folder / f"model-{i:05d}-of-{count:05d}.safetensors"
        paths.append(_write(path, shard))
        index |= dict.fromkeys(shard, path.name)
    total = sum(t.numel() * t.element_size() for t in state.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    staged = folder / ".model.safetensors.index.json.part"
    staged.write_text(text + "\n", encoding="utf-8")
    staged.replace(folder / "model.safetensors.index.json")
    return paths


def _write(path: Path, tensors: dict[str, Tensor]) -> Path:
    staged = path.with_name(f".{path.name}.part")
    save_file(tensors, staged, metadata={"format": "pt"})
    staged.replace(path)
    return path


def _bytes(size: str | int) -> int:
    if isinstance(size, int):
        return size
    unit = size[-2:].upper()
    if unit not in _UNITS or not size[:-2].strip().isdigit():
        raise CheckpointError(f"max_shard_size={size!r}: write it as '5GB', '200MB' or in bytes")
    return int(size[:-2]) * _UNITS[unit]
