"""From a name to the files of a checkpoint: a folder on disk or a repository of the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from topwork.errors import CheckpointError, ConfigError, nearest

SMALL_FILES = {
    "config": ("config.json", "generation_config.json", "adapter_config.json"),
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "tokenizer": (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
    ),
    "processor": ("preprocessor_config.json", "processor_config.json", "chat_template.json"),
    # Asked for only where there is no tokenizer.json.
    "sentencepiece": ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model"),
}
# The options of `resolve` that say where files are.
PLACES = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder",
          "allow_bin")  # fmt: skip
# Options of other libraries: no code is executed, and there is one kind of reader.
IDLE = frozenset({"trust_remote_code", "use_fast", "resume_download"})
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Where the files of one checkpoint lie. `weight_files` is empty unless weights were asked."""

    name: str
    folder: Path
    format: Literal["safetensors", "bin", "gguf", "none"]
    weight_files: tuple[Path, ...] = ()
    files: dict[str, Path] = field(default_factory=dict)
    revision: str | None = None

    def json(self, file: str) -> dict[str, Any]:
        """The object in `file`; CheckpointError when it is missing or is no JSON object."""
        if file not in self.files:
            raise CheckpointError(f"{self.name}: there is no {file}")
        return read_json(self.files[file])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`, or CheckpointError naming it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def resolve(
    name_or_path: str | Path,
    *,
    want: Collection[str] = ("config", "tokenizer", "weights"),
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str = "",
    allow_bin: bool = False,
    **other: Any,
) -> Checkpoint:
    """The files of `name_or_path`, downloaded into the Hub's cache when it is no folder.

    `want` limits what is fetched. Weights in the legacy pickle format are found only with
    `allow_bin=True`. Raises CheckpointError when nothing is there, saying what was looked for, and
    ConfigError for an option that is not known.
    """
    for option in other.keys() - IDLE:
        raise ConfigError(f"from_pretrained has no option {option!r}{nearest(option, PLACES)}")
    name = str(name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        root = folder / subfolder
        return _collect(
            name, root, want, allow_bin, lambda f: root / f if (root / f).is_file() else None
        )
    if folder.is_file() and folder.suffix == ".gguf":
        return Checkpoint(name, folder.parent, "gguf", (folder,))
    if folder.exists() or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name}: no such folder or .gguf file")
    options = {
        "subfolder": subfolder or None,
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    return _from_hub(name, want, allow_bin, options)


def _from_hub(
    name: str, want: Collection[str], allow_bin: bool, options: dict[str, Any]
) -> Checkpoint:
    from huggingface_hub import errors as hub_errors

    reached: list[Path] = []

    def fetch(file: str) -> Path | None:
        try:
            path = _download(name, file, options)
        except hub_errors.LocalEntryNotFoundError:
            path = None  # offline, and not cached: judged once everything has been looked for
        if path is not None:
            reached.append(path)
        return path

    try:
        found = _collect(name, None, want, allow_bin, fetch)
    except CheckpointError as error:
        if reached or not _is_offline(options):
            raise
        raise CheckpointError(
            f"{name}: not in the local cache, and offline (local_files_only or HF_HUB_OFFLINE)"
        ) from error
    parts = found.folder.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else None
    return replace(found, revision=commit)


def _is_offline(options: dict[str, Any]) -> bool:
    from huggingface_hub import constants

    return bool(options["local_files_only"]) or constants.is_offline_mode()


def _download(name: str, file: str, options: dict[str, Any]) -> Path | None:
    """One file of a repository, or None when it has no such file."""
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import hf_hub_download

    try:
        # The endpoint is read at call time: huggingface_hub itself reads it once, at import.
        return Path(hf_hub_download(name, file, endpoint=os.environ.get("HF_ENDPOINT"), **options))
    except hub_errors.LocalEntryNotFoundError as error:
        if not _is_offline(options):
            raise CheckpointError(
                f"{name}: not in the cache, and the Hub was not reached"
            ) from error
        raise
    except hub_errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name}: access is gated; accept its terms on the Hub and pass token="
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: there is no revision {options['revision']!r}") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: neither a folder here nor a model on the Hub (a private one needs token=)"
        ) from error
    except hub_errors.HFValidationError as error:
        raise CheckpointError(f"{name}: no folder, and no valid name on the Hub") from error
    except hub_errors.EntryNotFoundError:
        return None


def _collect(
    name: str,
    root: Path | None,
    want: Collection[str],
    allow_bin: bool,
    fetch: Callable[[str], Path | None],
) -> Checkpoint:
    files: dict[str, Path] = {}
    for kind in SMALL_FILES:
        if kind in want:
            for file in SMALL_FILES[kind]:
                path = fetch(file)
                if path is not None:
                    files[file] = path
    if "adapter" in want and "adapter_model.safetensors" not in files:
        for file in ("adapter.safetensors", *(("pytorch_adapter.bin",) if allow_bin else ())):
            path = fetch(file)
            files |= {} if path is None else {file: path}
    form: Literal["safetensors", "bin", "none"] = "none"
    shards: tuple[Path, ...] = ()
    if "weights" in want and "adapter_config.json" not in files:
        form, shards = _weight_files(name, allow_bin, fetch)
    known = [*files.values(), *shards]
    if root is None:
        if not known:
            raise CheckpointError(f"{name}: holds none of the files looked for")
        root = known[0].parent
    return Checkpoint(name, root, form, shards, files)


def _weight_files(
    name: str, allow_bin: bool, fetch: Callable[[str], Path | None]
) -> tuple[Literal["safetensors", "bin"], tuple[Path, ...]]:
    forms: list[tuple[Literal["safetensors", "bin"], str, str]] = [
        ("safetensors", WHOLE, INDEX),
        ("bin", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    ]
    for form, whole, index in forms:
        if form == "bin" and not allow_bin:
            continue
        single = fetch(whole)
        if single is not None:
            return form, (single,)
        table = fetch(index)
        if table is not None:
            return form, _shards(name, table, fetch)
    hint = "" if allow_bin else (
        " (legacy pytorch_model.bin files are read only with allow_bin=True)"
    )  # fmt: skip
    raise CheckpointError(f"{name}: no {WHOLE} and no {INDEX}{hint}")


def _shards(name: str, index: Path, fetch: Callable[[str], Path | None]) -> tuple[Path, ...]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index}: no weight_map")
    shards = []
    for file in sorted(set(table.values())):
        if not _is_plain(file):
            raise CheckpointError(f"{index}: refuses the shard name {file!r}: it leaves the folder")
        path = fetch(file)
        if path is None:
            raise CheckpointError(f"{name}: the index names {file}, which is not there")
        shards.append(path)
    return tuple(shards)


def _is_plain(file: object) -> bool:
    return (
        isinstance(file, str)
        and PurePosixPath(file).name == file
        and PureWindowsPath(file).name == file
        and file not in (".", "..")
    )
