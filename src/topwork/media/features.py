"""From samples to what a model reads: a log-mel spectrogram (Whisper), or normed samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from topwork import hub
from topwork.errors import CheckpointError, ConfigError, DataError, nearest
from topwork.media.audio import read_audio
from topwork.text.encoding import Encoding

FILE = "preprocessor_config.json"
# What the files say beside the options: names, and what follows from the options.
SAID = ("feature_extractor_type", "processor_class", "n_samples", "nb_max_frames", "mel_filters",
        "return_tensors")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """What both kinds share: options as in preprocessor_config.json, one length for a batch."""

    feature_size: int = 1
    sampling_rate: int = 16000
    padding_value: float = 0.0
    padding_side: str = "right"
    return_attention_mask: bool = False
    do_normalize: bool = True

    kind: ClassVar[str] = ""
    name: ClassVar[str] = "input_values"

    def __post_init__(self) -> None:
        if self.padding_side != "right":
            raise ConfigError(f"padding_side={self.padding_side!r}: sound is padded on the right")
        if self.sampling_rate < 1:
            raise ConfigError(f"sampling_rate={self.sampling_rate} must be positive")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From the keys of a file; ConfigError for one that is not known."""
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known and key not in SAID:
                raise ConfigError(
                    f"{FILE} has {key}={values[key]!r}, which {cls.kind} does not act on"
                    f"{nearest(key, known)}"
                )
        return cls(**{k: v for k, v in values.items() if k in known and v is not None})

    def to_dict(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**own, "feature_extractor_type": self.kind}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (Path(folder) / FILE).write_text(text, encoding="utf-8")

    def sounds(self, raw: Any, sampling_rate: int | None) -> list[np.ndarray]:
        """One sound or several as samples at this rate."""
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ConfigError(
                f"sampling_rate={sampling_rate}, but the model wants {self.sampling_rate} hertz: "
                'pass {"raw": samples, "sampling_rate": hertz} and the sound is brought to it'
            )
        several = is_batch(raw)
        rows = list(raw) if several else [raw]
        if not rows:
            raise DataError("there is no sound: the list is empty")
        names = [f"sound {i}" for i in range(len(rows))] if several else ["the sound"]
        return [read_audio(row, self.sampling_rate, n) for row, n in zip(rows, names)]

    def level(
        self, rows: Sequence[np.ndarray], padding: bool | str, longest: int | None,
        truncation: bool, multiple: int | None,
    ) -> tuple[list[np.ndarray], list[int]]:  # fmt: skip
        """Rows cut and filled up along their last axis as asked, and how much of each is real."""
        kinds = (True, False, "longest", "max_length", "do_not_pad")
        if padding not in kinds:
            raise ConfigError(f"padding={padding!r}; one of {kinds}")
        if longest is None and (truncation or padding == "max_length"):
            raise ConfigError("truncation and padding='max_length' need max_length")
        if longest is not None and multiple:
            longest = -(-longest // multiple) * multiple
        if truncation:
            rows = [row[..., :longest] for row in rows]
        sizes = [row.shape[-1] for row in rows]
        if padding in (False, "do_not_pad"):
            return list(rows), sizes
        width = longest if padding == "max_length" and longest is not None else max(sizes)
        width = -(-width // multiple) * multiple if multiple else width
        filled = []
        for row, size in zip(rows, sizes):
            gap = [(0, 0)] * (row.ndim - 1) + [(0, max(0, width - size))]
            filled.append(np.pad(row, gap, constant_values=self.padding_value))
        return filled, sizes

    def pad(
        self,
        features: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> Encoding:
        """Bring features made one by one to one length: a list of them, or a mapping of lists."""
        if not isinstance(features, Mapping):
            features = {key: [row[key] for row in features] for key in features[0]}
        if self.name not in features:
            raise ConfigError(f"there are no {self.name} to pad, only {list(features)}")
        rows = [np.asarray(row, dtype=np.float32) for row in features[self.name]]
        filled, sizes = self.level(rows, padding, max_length, False, pad_to_multiple_of)
        found: dict[str, Any] = {self.name: filled}
        wanted = self.return_attention_mask if return_attention_mask is None else (
            return_attention_mask
        )  # fmt: skip
        if wanted:
            found["attention_mask"] = masks([row.shape[-1] for row in filled], sizes)
        return tensors(found, return_tensors)


@dataclass(frozen=True, kw_only=True)
class Waveform(Extractor):
    """Samples as they are, or with mean zero and variance one (wav2vec 2.0, HuBERT)."""

    kind: ClassVar[str] = "Wav2Vec2FeatureExtractor"

    def __call__(
        self,
        raw_speech: Any,
        *,
        sampling_rate: int | None = None,
        padding: bool | str = False,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> Encoding:
        """`input_values` of one sound or several (whatever `read_audio` takes).

        A batch that is padded without a mask is normed with its padding, as these models were
        trained; with a mask each sound by itself.
        """
        rows = self.sounds(raw_speech, sampling_rate)
        filled, sizes = self.level(rows, padding, max_length, truncation, pad_to_multiple_of)
        asked = return_attention_mask
        masked = self.return_attention_mask if asked is None else asked
        if self.do_normalize:
            alone = masked and padding not in (False, "do_not_pad")
            filled = [
                self._normed(row, size if alone else len(row)) for row, size in zip(filled, sizes)
            ]
        found: dict[str, Any] = {self.name: filled}
        if masked:
            found["attention_mask"] = masks([len(row) for row in filled], sizes)
        return tensors(found, return_tensors)

    def _normed(self, row: np.ndarray, size: int) -> np.ndarray:
        real = row[:size]
        normed = (row - real.mean()) / np.sqrt(real.var() + 1e-7)
        normed[size:] = self.padding_value
        return normed.astype(np.float32, copy=False)


@dataclass(frozen=True, kw_only=True)
class LogMel(Extractor):
    """A log-mel spectrogram of windows of `chunk_length` seconds (Whisper).

    `n_fft` and `hop_length` in samples; `dither`: noise of this size is added.
    """

    feature_size: int = 80
    hop_length: int = 160
    chunk_length: int = 30
    n_fft: int = 400
    dither: float = 0.0
    do_normalize: bool = False

    kind: ClassVar[str] = "WhisperFeatureExtractor"
    name: ClassVar[str] = "input_features"

    @property
    def n_samples(self) -> int:
        """Samples in a window."""
        return self.chunk_length * self.sampling_rate

    @property
    def mel_filters(self) -> np.ndarray:
        """[1 + n_fft / 2, feature_size], fp64."""
        return mel_filters(self.feature_size, self.n_fft, self.sampling_rate)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        made = super().of(values)
        listed = values.get("mel_filters")
        if listed is not None:
            there, ours = np.asarray(listed), made.mel_filters
            there = there.T if there.shape == ours.T.shape != ours.shape else there
            if there.shape != ours.shape or not np.allclose(there, ours, atol=1e-5):
                raise ConfigError(f"{FILE} lists other mel_filters than its options make")
        return made

    def __call__(
        self,
        raw_speech: Any,
        *,
        sampling_rate: int | None = None,
        padding: bool | str = "max_length",
        max_length: int | None = None,
        truncation: bool = True,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        do_normalize: bool | None = None,
        return_tensors: str | None = None,
    ) -> Encoding:
        """`input_features` [feature_size, frames] of one sound or several, as `read_audio` takes
        them; filled up or cut to one window unless asked otherwise."""
        rows = self.sounds(raw_speech, sampling_rate)
        longest = max_length or self.n_samples
        filled, sizes = self.level(rows, padding, longest, truncation, pad_to_multiple_of)
        if self.do_normalize if do_normalize is None else do_normalize:
            normed = []
            for row, size in zip(filled, sizes):
                real = row[:size]
                whole = (row - real.mean()) / np.sqrt(real.var() + 1e-7)
                whole[size:] = self.padding_value
                normed.append(whole)
            filled = normed
        short = next((i for i, row in enumerate(filled) if len(row) <= self.n_fft // 2), None)
        if short is not None:
            raise DataError(
                f"sound {short} has {len(filled[short])} samples, too few for a spectrogram of "
                f"windows of {self.n_fft}: pad it"
            )
        spectra: Any
        if len({len(row) for row in filled}) == 1:
            spectra = self._spectra(np.stack(filled))
        else:
            spectra = [self._spectra(row[None])[0] for row in filled]
        found: dict[str, Any] = {self.name: spectra}
        asked = return_attention_mask
        if self.return_attention_mask if asked is None else asked:
            by_sample = masks([len(row) for row in filled], sizes)
            found["attention_mask"] = [
                mask[:: self.hop_length][: len(mask) // self.hop_length] for mask in by_sample
            ]
        return tensors(found, return_tensors)

    def _spectra(self, samples: np.ndarray) -> np.ndarray:
        """Samples [B, N] → [B, feature_size, N / hop]: log10 of the mel power, the quiet end cut
        at 80 dB below the loudest, brought to about -1 to 1."""
        import torch

        wave = torch.from_numpy(samples)
        if self.dither:
            wave = wave + self.dither * torch.randn(wave.shape)
        window = torch.hann_window(self.n_fft)
        waves = torch.stft(wave, self.n_fft, self.hop_length, window=window, return_complex=True)
        power = (waves[..., :-1].abs() ** 2).contiguous()
        filters = torch.from_numpy(self.mel_filters).float()
        mel = (filters.T @ power).clamp_min(1e-10).log10()
        mel = torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 8.0)
        return ((mel + 4.0) / 4.0).numpy()


@lru_cache(maxsize=8)
def mel_filters(count: int, n_fft: int, rate: int, top: float = 8000.0) -> np.ndarray:
    """Triangles [1 + n_fft / 2, count] of equal area, evenly spaced in mel from 0 to `top` hertz.

    Slaney's mel: linear up to 1000 hertz (3 per 200), then 27 for each factor of 6.4.
    """
    step, knee = 200 / 3, 1000.0
    highest = top / step if top < knee else knee / step + np.log(top / knee) * 27 / np.log(6.4)
    mels = np.linspace(0, highest, count + 2)
    above = knee * np.exp((mels - knee / step) * np.log(6.4) / 27)
    corners = np.where(mels < knee / step, mels * step, above)
    places = np.linspace(0, rate // 2, 1 + n_fft // 2)
    slopes = corners[None] - places[:, None]  # [places, count + 2]
    widths = np.diff(corners)
    rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return triangles * (2 / (corners[2:] - corners[:-2]))


def is_batch(raw: Any) -> bool:
    """Whether `raw` is several sounds: a list of them, or an array [batch, samples]."""
    if isinstance(raw, (list, tuple)):
        return not (raw and isinstance(raw[0], (int, float, np.number)))
    return getattr(raw, "ndim", 1) > 1


def masks(widths: Sequence[int], sizes: Sequence[int]) -> list[np.ndarray]:
    """1 where a row is real, then 0."""
    return [(np.arange(w) < n).astype(np.int32) for w, n in zip(widths, sizes)]


def tensors(found: dict[str, Any], kind: str | None) -> Encoding:
    """The columns as lists of arrays, or as one tensor each ("pt", "np")."""
    if kind is None:
        return Encoding(found)
    if kind not in ("pt", "np"):
        raise ConfigError(f"return_tensors={kind!r}; 'pt' or 'np'")
    if len({row.shape for row in next(iter(found.values()))}) > 1:
        raise ConfigError("sounds of different lengths are no tensor; pass padding=True")
    arrays = {key: np.stack(list(rows)) for key, rows in found.items()}
    if kind == "np":
        return Encoding(arrays)
    import torch

    return Encoding({key: torch.from_numpy(array) for key, array in arrays.items()})


KINDS: dict[str, type[LogMel] | type[Waveform]] = {k.kind: k for k in (LogMel, Waveform)}


def read_options(name_or_path: str | Path, **where: Any) -> dict[str, Any]:
    """What the files of a checkpoint say of its features: a file of its own, or the processor's."""
    files = hub.resolve(name_or_path, want=("processor",), **where)
    values: dict[str, Any] = {}
    if "processor_config.json" in files.files:
        values = files.json("processor_config.json").get("feature_extractor") or {}
    if not values and FILE in files.files:
        values = files.json(FILE)
    if not values:
        raise CheckpointError(f"{name_or_path}: there is no {FILE}")
    return values


class AutoFeatureExtractor:
    """`AutoFeatureExtractor.from_pretrained(name)` gives a `LogMel` or a `Waveform`."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options: Any) -> LogMel | Waveform:
        """Read preprocessor_config.json of a folder or Hub id; `options` replace what it says, or
        are those of `hub.resolve` (revision, token …)."""
        known = {f.name for kind in KINDS.values() for f in fields(kind)}
        own = {k: v for k, v in options.items() if k in known}
        values = read_options(name_or_path, **{k: v for k, v in options.items() if k not in known})
        kind = values.get("feature_extractor_type")
        if kind is None and "image_processor_type" in values:
            raise ConfigError(f"{name_or_path}: {FILE} is of images, not of sound")
        if kind not in KINDS:
            raise ConfigError(
                f"{name_or_path}: feature_extractor_type={kind!r} is not known"
                f"{nearest(str(kind), KINDS)}; known: {', '.join(KINDS)}"
            )
        made = KINDS[kind].of(values)
        return replace(made, **own) if own else made
