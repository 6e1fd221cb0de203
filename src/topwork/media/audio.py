"""Sounds from files, bytes and arrays as samples at the rate that a model wants."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from topwork.errors import ConfigError, DataError

Samples = np.ndarray  # [N] float32, about -1 to 1

LONGEST = 6 * 3600.0  # seconds; a header may claim anything
RATES = (100, 768_000)
FULL = {"int16": 32768.0, "int32": 2147483648.0}  # as sound files scale them


def read_audio(source: Any, rate: int, name: str = "the sound") -> Samples:
    """`source` as samples [N] at `rate` hertz, channels mixed to one.

    A path, the bytes of a file (wav, flac, ogg, mp3) or an open file; an array of samples at `rate`
    already; or a mapping with "raw" or "array" and its "sampling_rate", or with "bytes" or "path",
    as the rows of `datasets` have it. Raw arrays are [N] or [channels, N], of floats or of 16 or 32
    bits. DataError, with `name`, for what is no sound, empty, damaged or longer than six hours.
    """
    if isinstance(source, Mapping):
        return _of_mapping(source, rate, name)
    if isinstance(source, (str, Path)):
        if str(source).startswith(("http://", "https://")):
            raise DataError(f"{name}: {source} is an address; download it first and pass the file")
        return _of_file(source, rate, f"{name} ({source})")
    if isinstance(source, (bytes, bytearray)):
        return _of_file(io.BytesIO(source), rate, name)
    if hasattr(source, "read"):
        return _of_file(source, rate, name)
    return _checked(_mono(source, name), rate, name)


def _of_mapping(source: Mapping[str, Any], rate: int, name: str) -> Samples:
    raw = next((source[key] for key in ("raw", "array") if source.get(key) is not None), None)
    if raw is None:
        file = next((source[key] for key in ("bytes", "path") if source.get(key) is not None), None)
        if file is None:
            raise DataError(
                f'{name}: expected {{"raw": samples, "sampling_rate": hertz}}, got the keys '
                f"{', '.join(map(str, source)) or 'none'}"
            )
        return read_audio(file, rate, name)
    own = source.get("sampling_rate")
    if own is None:
        raise DataError(f"{name}: samples in a mapping need their sampling_rate")
    return resample(_checked(_mono(raw, name), _known_rate(own, name), name), own, rate)


def _of_file(file: Any, rate: int, name: str) -> Samples:
    soundfile = _library("soundfile", "reading sound files")
    try:
        with soundfile.SoundFile(str(file) if isinstance(file, Path) else file) as opened:
            own = _known_rate(opened.samplerate, name)
            if opened.frames > LONGEST * own:
                raise DataError(
                    f"{name} is {opened.frames / own / 3600:.1f} hours long, more than "
                    f"{LONGEST / 3600:.0f}: cut it first"
                )
            samples = opened.read(dtype="float32", always_2d=True)
    except FileNotFoundError as error:
        raise DataError(f"{name}: there is no such file") from error
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        path = Path(file) if isinstance(file, (str, Path)) else None
        if path is not None and not path.is_file():
            raise DataError(f"{name}: there is no such file") from error
        raise DataError(f"{name} is no sound file that can be read: {error}") from error
    return resample(_checked(samples.mean(1), own, name), own, rate)


def _mono(raw: Any, name: str) -> Samples:
    if hasattr(raw, "detach"):
        raw = raw.detach().cpu()
        raw = raw.float() if raw.is_floating_point() else raw
    try:
        samples = np.asarray(raw)
    except ValueError as error:
        raise DataError(f"{name} is no array of samples: {error}") from error
    kind = samples.dtype
    if kind.name in FULL:
        samples = samples.astype(np.float32) / np.float32(FULL[kind.name])
    elif kind.kind != "f":
        raise DataError(
            f"{name} has samples of {kind}; expected floats of about -1 to 1, int16 or int32"
        )
    if samples.ndim == 2:
        if samples.shape[0] > 2:
            raise DataError(
                f"{name} has the shape {list(samples.shape)}, read as [channels, samples]: "
                f"{samples.shape[0]} channels. Transpose it, or mix it to one channel first"
            )
        samples = samples.mean(0)
    if samples.ndim != 1:
        raise DataError(
            f"{name} has {samples.ndim} axes; expected [samples] or [channels, samples]"
        )
    return samples.astype(np.float32, copy=False)


def _checked(samples: Samples, rate: int, name: str) -> Samples:
    if not len(samples):
        raise DataError(f"{name} is empty: it has no samples")
    if len(samples) > LONGEST * rate:
        raise DataError(
            f"{name} has {len(samples)} samples, more than {LONGEST / 3600:.0f} hours of sound"
        )
    if not np.isfinite(samples).all():
        raise DataError(f"{name} has samples that are no numbers")
    return samples


def _known_rate(rate: Any, name: str) -> int:
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.integer, np.floating)):
        raise DataError(f"{name}: sampling_rate={rate!r} is no number of hertz")
    if not RATES[0] <= rate <= RATES[1] or int(rate) != rate:
        raise DataError(
            f"{name}: sampling_rate={rate} must be a whole number of {RATES[0]} to {RATES[1]} hertz"
        )
    return int(rate)


def resample(samples: Samples, rate: int, wanted: int) -> Samples:
    """Samples [N] at `rate` hertz as samples at `wanted` hertz, without what lies too high."""
    if rate == wanted:
        return samples
    soxr = _library("soxr", f"sound at {rate} hertz for a model of {wanted}")
    return soxr.resample(samples, rate, wanted).astype(np.float32, copy=False)


def _library(name: str, purpose: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f'{purpose} needs {name}: pip install "topwork[audio]"') from error
