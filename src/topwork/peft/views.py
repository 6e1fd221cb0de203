"""Attributes of a layer's adapters, as dictionaries by the adapters' names."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from operator import attrgetter
from typing import Any

from topwork.errors import ConfigError


class ByAdapter(MutableMapping[str, Any]):
    """One attribute of grafts, by their names; what is set is set in the graft. Those of its
    configuration ("config.use_dora") are only read."""

    def __init__(self, grafts: dict[str, Any], attribute: str) -> None:
        self._grafts = grafts
        self._attribute = attribute

    def __getitem__(self, name: str) -> Any:
        return attrgetter(self._attribute)(self._grafts[name])

    def __setitem__(self, name: str, value: Any) -> None:
        self._refuse_unless("." not in self._attribute)
        setattr(self._grafts[name], self._attribute, value)

    def __delitem__(self, name: str) -> None:
        self._refuse_unless(False)

    def _refuse_unless(self, possible: bool) -> None:
        if not possible:
            raise ConfigError(f"{self._attribute} follows from the adapter's configuration")

    def __iter__(self) -> Iterator[str]:
        return iter(self._grafts)

    def __len__(self) -> int:
        return len(self._grafts)

    def __repr__(self) -> str:
        return repr(dict(self))
