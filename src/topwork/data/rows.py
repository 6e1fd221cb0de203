"""Reading rows: lists, iterables, JSON, JSONL, CSV and parquet files, `datasets.Dataset`."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from topwork.errors import DataError, nearest

Row = Mapping[str, Any]
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


def read_rows(source: Any) -> list[Row]:
    """All rows of `source`: a file, several files (with weights: [{path, weight}, …]), a list, an
    iterable, or a `datasets.Dataset`.

    Raises DataError naming the file and the line of what cannot be read, and for no row at all.
    """
    if _is_mixture(source):
        rows = mixed([(part["path"], part.get("weight", 1.0)) for part in source])
    elif isinstance(source, (str, Path)):
        rows = _read_file(Path(source).expanduser())
    elif isinstance(source, Mapping):
        rows = _from_columns(source)
    elif isinstance(source, Sequence) and source and all(_is_file(s) for s in source):
        rows = [row for file in source for row in read_rows(file)]
    elif isinstance(source, Iterable):
        rows = list(undecoded(source))
    else:
        raise DataError(
            f"rows come from a file, a list of dicts or a datasets.Dataset, not from "
            f"{type(source).__name__}"
        )
    if not rows:
        raise DataError(f"there is no row in {_name(source)}")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(
                f"{_name(source)}: row {number} is {type(row).__name__}, not a mapping of columns"
            )
    return rows


class LazyRows:
    """The rows of a source, read anew at each iteration and never held together.

    A .jsonl, .csv or .parquet file, several of them, or any iterable of mappings.
    """

    def __init__(self, source: Any) -> None:
        if _is_mixture(source):
            raise DataError("sources with weights are not streamed; leave streaming out")
        files = [source] if _is_file(source) else source
        self._source, self._files = source, list[Path]()
        if isinstance(files, Sequence) and files and all(_is_file(f) for f in files):
            self._files = [Path(file).expanduser() for file in files]
            for path in self._files:
                _found(path)
        elif not isinstance(source, Iterable):
            raise DataError(f"rows are not streamed from a {type(source).__name__}")

    def __iter__(self) -> Iterator[Row]:
        for path in self._files:
            yield from _lazy_file(path)
        if not self._files:
            yield from undecoded(self._source)


def undecoded(source: Any) -> Iterable[Any]:
    """`source` itself; a `datasets.Dataset` with its images as they lie in its files, which are
    decoded when a batch needs them."""
    features: Any = getattr(source, "features", None)
    for name, feature in features.items() if isinstance(features, Mapping) else ():
        plain = _undecoded(feature)
        if plain is not feature:
            source = source.cast_column(name, plain)
    return source


def _undecoded(feature: Any) -> Any:
    """A column's kind, or the one that leaves its images undecoded."""
    if type(feature).__name__ == "Image" and getattr(feature, "decode", False):
        return type(feature)(decode=False)
    if isinstance(feature, list) and len(feature) == 1:
        inner = _undecoded(feature[0])
        return feature if inner is feature[0] else [inner]
    inside: Any = getattr(feature, "feature", None)
    inner = None if inside is None else _undecoded(inside)
    listed: Any = feature
    return feature if inner is inside else replace(listed, feature=inner)


def _is_mixture(source: Any) -> bool:
    """Whether `source` is [{path: …, weight: …}, …]."""
    return (
        isinstance(source, Sequence)
        and len(source) > 0
        and all(isinstance(part, Mapping) for part in source)
        and all("path" in part and set(part) <= {"path", "weight"} for part in source)
    )


def mixed(parts: Sequence[tuple[Any, float]], seed: int = 0) -> list[Row]:
    """The rows of several sources, each row of a source occurring `weight` times: 2 twice, 0.3 for
    three rows of ten, drawn by `seed`. Raises DataError for a weight that is not above 0."""
    rows: list[Row] = []
    for source, weight in parts:
        if not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise DataError(f"{_name(source)}: weight={weight!r} must be a number above 0")
        found = read_rows(source)
        rows += found * int(weight)
        rest = round((weight - int(weight)) * len(found))
        drawn = random.Random(seed).sample(range(len(found)), rest)
        rows += [found[i] for i in sorted(drawn)]
    return rows


def _is_file(value: Any) -> bool:
    return isinstance(value, (str, Path))


def _name(source: Any) -> str:
    return str(source) if _is_file(source) else f"the given {type(source).__name__}"


def _from_columns(columns: Mapping[str, Any]) -> list[Row]:
    """Rows from {"column": [values …]}; a single row is such a mapping too, but of no lists."""
    sizes = {name: len(v) if isinstance(v, Sequence) else -1 for name, v in columns.items()}
    if len(set(sizes.values())) != 1 or any(isinstance(v, str) for v in columns.values()):
        raise DataError(
            f"a mapping must hold columns of one length, these are {sizes}; for one row pass [row]"
        )
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def _found(path: Path) -> None:
    if not path.is_file():
        hint = "" if path.suffix else "; a dataset of the Hub: pass datasets.load_dataset(…)"
        near = nearest(path.name, (p.name for p in path.parent.glob("*")))
        raise DataError(f"{path}: no such file{near}{hint}")


def _read_file(path: Path) -> list[Row]:
    _found(path)
    return _json(path) if path.suffix.lower() == ".json" else list(_lazy_file(path))


def _lazy_file(path: Path) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(path)
    if suffix == ".json":
        return iter(_json(path))
    if suffix in (".csv", ".tsv"):
        return _csv(path, "\t" if suffix == ".tsv" else ",")
    if suffix == ".parquet":
        return _parquet(path)
    raise DataError(f"{path}: cannot read {suffix or 'a file without suffix'}; one of {SUFFIXES}")


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}:{number}: no JSON: {error}") from error
                yield row


def _json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text)
    except ValueError as error:
        if "Extra data" in str(error):
            return list(_json_lines(path))  # one object a line under the name .json
        raise DataError(f"{path}: no JSON: {error}") from error
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        return lists[0] if len(lists) == 1 else _from_columns(value)
    raise DataError(f"{path}: expected a list of objects, found {type(value).__name__}")


def _csv(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, restkey="", strict=True)
        try:
            for row in reader:
                if "" in row or None in row.values():
                    raise DataError(
                        f"{path}:{reader.line_num}: does not have the "
                        f"{len(reader.fieldnames or [])} columns of the header"
                    )
                yield row
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}") from error


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()
