"""Settings of a run from a YAML file and the command line, checked name by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from topwork.errors import ConfigError


def read_settings(path: Path | None, extra: Sequence[str]) -> dict[str, Any]:
    """The file's settings, overridden by `--field value` pairs (`--lora.r 8` for a section)."""
    settings: dict[str, Any] = {}
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        try:
            settings = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: no valid YAML: {error}") from error
        if not isinstance(settings, dict):
            raise ConfigError(f"{path}: expected `name: value` lines")
    for name, value in _pairs(extra):
        section, _, field = name.rpartition(".")
        if section:
            inner = settings.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--{name}: {section} is not a section of fields")
            inner[field] = value
        else:
            settings[name] = value
    return settings


def _pairs(extra: Sequence[str]) -> list[tuple[str, Any]]:
    pairs, at = [], 0
    while at < len(extra):
        word = extra[at]
        if not word.startswith("--"):
            raise ConfigError(f"{word!r}: expected --field value")
        name, equals, value = word[2:].partition("=")
        at += 1
        if not equals:
            if at >= len(extra) or extra[at].startswith("--"):
                value = "true"  # a bare flag
            else:
                value = extra[at]
                at += 1
        pairs.append((name.replace("-", "_"), parse(value)))
    return pairs


def parse(text: str) -> Any:
    """A value as YAML reads it; also 2e-4, which YAML takes for a text."""
    value = yaml.safe_load(text)
    return _number(value) if isinstance(value, str) else value


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


KINDS: dict[str, tuple[type, ...]] = {"float": (float, int), "int": (int,), "bool": (bool,)}


def typed(settings: dict[str, Any], cls: type) -> dict[str, Any]:
    """The settings with numbers where `cls` wants them. ConfigError for what is none."""
    result = dict(settings)
    for field in fields(cls):
        names = [part.strip() for part in str(field.type).split("|")]
        if "str" in names and "bool" not in names and isinstance(result.get(field.name), bool):
            result[field.name] = "yes" if result[field.name] else "no"  # as YAML takes these words
        kinds = tuple(kind for name in names for kind in KINDS.get(name, ()))
        if field.name not in result or not kinds or set(names) - set(KINDS) - {"None"}:
            continue
        value = result[field.name]
        value = _number(value) if isinstance(value, str) and float in kinds else value
        wrong = isinstance(value, bool) and bool not in kinds
        if wrong or not (isinstance(value, kinds) or (value is None and "None" in names)):
            raise ConfigError(f"{field.name}={value!r} must be {' or '.join(names)}")
        result[field.name] = value
    return result
