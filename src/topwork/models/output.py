"""What models return: fields by attribute, and by name or place those that are there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any


class Output:
    """Base of the outputs, all of them dataclasses: `out.logits`, `out["logits"]`, `out[0]`.

    As a mapping or a tuple it has the fields that are not None.
    """

    def items(self) -> list[tuple[str, Any]]:
        named = ((f.name, getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        return [(name, value) for name, value in named if value is not None]

    def keys(self) -> list[str]:
        return [name for name, _ in self.items()]

    def values(self) -> list[Any]:
        return [value for _, value in self.items()]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def get(self, name: str, default: Any = None) -> Any:
        return dict(self.items()).get(name, default)

    def __getitem__(self, place: Any) -> Any:
        return dict(self.items())[place] if isinstance(place, str) else self.to_tuple()[place]

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.items())
