"""Reading and writing a module's tensors: safetensors (streamed) and, when allowed, legacy .bin.

Format: a little header of JSON and raw tensors per file; several files share an index that maps
each name to its file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from topwork.errors import CheckpointError
from topwork.hub import Checkpoint
from topwork.weights.coded import decoded
from topwork.weights.gguf import GgufFile
from topwork.weights.table import PLAIN, Pack, Place, Stored, Table, cut

SHOWN = 20  # names listed in an error before "and N more"


@dataclass(frozen=True)
class LoadReport:
    """What a load did.

    `loaded`: tensors filled; `ignored`: file keys left out on purpose; `fresh`: tensors that the
    file lacks and the table lets it lack, still as they were; `untied`: aliases that the file holds
    with values of their own.
    """

    loaded: tuple[str, ...]
    ignored: tuple[str, ...]
    fresh: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()


def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    table: Table = PLAIN,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    tied: Mapping[str, str] | None = None,
    coding: Mapping[str, Any] | None = None,
    lenient: bool = False,
) -> LoadReport:
    """Fill `module` (it may stand on the meta device) from the checkpoint, one tensor at a time.

    `table` says how the file's names and layouts become the module's. `dtype` None keeps the
    file's. `tied` maps an alias to its owner: either name may be absent from the file. `coding`:
    the `quantization_config` of a file whose weights are to be decoded. `lenient`: tensors that a
    file may lack may have another shape there, too. Raises CheckpointError that lists every
    missing, unexpected or wrong-shaped tensor.
    """
    intake = _Intake(module, table, dtype, device, dict(tied or {}))
    tensors = _tensors(checkpoint)
    for key, read in tensors if coding is None else decoded(tensors, coding):
        intake.take(key, read)
    return intake.report(checkpoint.name, lenient)


class _Intake:
    """Takes a file's tensors one by one into a module, and keeps account of them."""

    def __init__(
        self,
        module: nn.Module,
        table: Table,
        dtype: torch.dtype | None,
        device: str | torch.device,
        tied: dict[str, str],
    ) -> None:
        self.module, self.table, self.dtype, self.device = module, table, dtype, device
        self.wanted = dict(module.named_parameters(remove_duplicate=False))
        self.wanted |= dict(_persistent_buffers(module))
        # Layers that take their tensors themselves (quantised ones): name → the layer, its part.
        self.takers: dict[str, tuple[Any, str]] = {}
        for path, layer in _takers(module):
            self.takers |= {f"{path}.{part}": (layer, part) for part in layer.wanted()}
            shape = torch.empty(layer.shape, device="meta")
            self.wanted |= {f"{path}.{part}": shape for part in layer.wanted()}
        self.owners = {alias: owner for alias, owner in tied.items() if alias in self.wanted}
        self.loaded: dict[str, str] = {}  # name in the module → the name it came under
        self.packed: dict[str, tuple[Tensor, set[tuple[int, int]]]] = {}
        self.ignored: list[str] = []
        self.unexpected: list[str] = []
        self.wrong: dict[str, str] = {}
        self.untied: list[str] = []

    def take(self, key: str, read: Callable[[], Tensor]) -> None:
        places = self.table.places(key, self.wanted)
        if not places:
            (self.ignored if self.table.may_drop(key) else self.unexpected).append(key)
            return
        tensor = read()
        for place in places:
            if place.pack is not None:
                self._fill(key, place, place.pack, tensor)
            elif place.unpack is not None:
                parts = cut(tensor, place.unpack)
                if place.part < len(parts):
                    self._put(key, place.name, parts[place.part])
            else:
                self._put(key, place.name, tensor)

    def _cast(self, tensor: Tensor) -> torch.dtype:
        floating = tensor.is_floating_point() and self.dtype is not None
        return self.dtype if floating and self.dtype is not None else tensor.dtype

    def _misfit(self, key: str, name: str, found: Tensor, wanted: Tensor) -> bool:
        if found.shape != wanted.shape:
            where = key if key == name else f"{name} (from {key})"
            self.wrong[name] = f"{where} {list(found.shape)} in the file, {list(wanted.shape)} here"
            return True
        return False

    def _fill(self, key: str, place: Place, pack: Pack, tensor: Tensor) -> None:
        name, slot = place.name, (place.index, place.part)
        if name not in self.packed:
            whole = torch.empty(
                self.wanted[name].shape, dtype=self._cast(tensor), device=self.device
            )
            self.packed[name] = (whole, set())
        whole, filled = self.packed[name]
        if pack.numbered and place.index >= whole.shape[0]:
            self.unexpected.append(key)
            return
        view = cut(whole[place.index] if pack.numbered else whole, pack)[place.part]
        if self._misfit(key, name, tensor, view):
            return
        view.copy_(tensor)
        filled.add(slot)
        if len(filled) == (whole.shape[0] if pack.numbered else 1) * len(pack.disk):
            del self.packed[name]
            whole = self.table.loaded(name, whole).contiguous()
            if name in self.takers:
                self._hand_over(name, name, whole)
                return
            _assign(self.module, name, whole)
            self.loaded[name] = name

    def _hand_over(self, key: str, name: str, tensor: Tensor) -> None:
        layer, part = self.takers[name]
        if layer.coded:
            try:
                layer.take(part, tensor.to(self.device, copy=True))
            except CheckpointError as error:
                self.wrong[name] = f"{key}: {error}"
                return
        elif self._misfit(key, name, tensor, self.wanted[name]):
            return
        else:
            layer.take(part, tensor.to(self.device, self._cast(tensor)))
        self.loaded[name] = name

    def _put(self, key: str, name: str, tensor: Tensor) -> None:
        tensor = self.table.loaded(name, tensor)
        if name in self.takers:
            self._hand_over(key, name, tensor)
            return
        if self._misfit(key, name, tensor, self.wanted[name]):
            return
        owner = self.owners.get(name, name)
        value = tensor.contiguous().to(self.device, self._cast(tensor), copy=True)
        if owner not in self.loaded:
            _assign(self.module, owner, value)
            self.loaded[owner] = name
            return
        self.ignored.append(key)
        held = self.module.get_parameter(owner)
        if self.loaded[owner] != name and not torch.equal(held, value):
            # Both are in the file and differ: they are not tied, whatever the configuration says.
            alias = name if name != owner else self.loaded[owner]
            _assign(self.module, alias, value if alias == name else held.detach())
            if alias != name:
                _assign(self.module, owner, value)
            self.untied.append(alias)
            self.loaded[alias] = alias

    def report(self, source: str, lenient: bool) -> LoadReport:
        if lenient:
            self.wrong = {n: w for n, w in self.wrong.items() if not self.table.may_lack(n)}
        aliases = set(self.owners) - set(self.untied)
        absent = set(self.wanted) - set(self.loaded) - aliases - set(self.wrong)
        fresh = sorted(n for n in absent if self.table.may_lack(n) and n not in self.packed)
        missing = [
            key
            for name in sorted(absent - set(fresh))
            for key in self.table.missing_keys(
                name, self.wanted[name].shape, self.packed.get(name, (None, set()))[1]
            )
        ]
        problems = [
            f"{what}: {_listed(names)}"
            for what, names in (
                ("missing", missing),
                ("unexpected", self.unexpected),
                ("wrong shape", list(self.wrong.values())),
            )
            if names
        ]
        if problems:
            raise CheckpointError(
                f"{source}: the weights do not fit {type(self.module).__name__}: "
                + "; ".join(problems)
            )
        return LoadReport(
            tuple(sorted(self.loaded)), tuple(self.ignored), tuple(fresh), tuple(self.untied)
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _takers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((path, layer) for path, layer in module.named_modules() if hasattr(layer, "take"))


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
            yield from pickled(path)
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


def pickled(path: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The tensors of a legacy file, read as weights alone: nothing in it is run."""
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
    table: Table = PLAIN,
    tied: Mapping[str, str] | None = None,
    max_shard_size: str | int = "5GB",
) -> list[Path]:
    """Write the module's tensors into `folder` as `table` lays them out; tied aliases are left out.

    Each file is formed and written beside its place, one after the other, and moved there when it
    is whole. Returns the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aliases = set(tied or {})
    state = {k: v.detach() for k, v in module.state_dict().items() if k not in aliases}
    shards = _shards(table.stored(state), _bytes(max_shard_size))
    if len(shards) == 1:
        return [write_tensors(folder / "model.safetensors", {t.name: t.make() for t in shards[0]})]
    count = len(shards)
    paths, index = [], {}
    for i, shard in enumerate(shards, 1):
        path = folder / f"model-{i:05d}-of-{count:05d}.safetensors"
        paths.append(write_tensors(path, {t.name: t.make() for t in shard}))
        index |= {tensor.name: path.name for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    staged = folder / ".model.safetensors.index.json.part"
    staged.write_text(text + "\n", encoding="utf-8")
    staged.replace(folder / "model.safetensors.index.json")
    return paths


def _shards(tensors: Iterable[Stored], limit: int) -> list[list[Stored]]:
    """The tensors in order, in files of at most `limit` bytes (a larger one alone)."""
    shards: list[list[Stored]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A safetensors file that appears whole or not at all, with the usual permissions."""
    staged = path.with_name(f".{path.name}.part")
    staged.touch()
    mode = staged.stat().st_mode  # safetensors' own files are closed to other users
    save_file(dict(tensors), staged, metadata={"format": "pt"})
    staged.chmod(mode)
    staged.replace(path)
    return path


def _bytes(size: str | int) -> int:
    if isinstance(size, int):
        return size
    unit = size[-2:].upper()
    if unit not in _UNITS or not size[:-2].strip().isdigit():
        raise CheckpointError(f"max_shard_size={size!r}: write it as '5GB', '200MB' or in bytes")
    return int(size[:-2]) * _UNITS[unit]
