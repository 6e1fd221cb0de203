"""What is said in a sound, with an encoder-decoder (Whisper) or with CTC."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from topwork.errors import ConfigError
from topwork.media import LogMel
from topwork.pipelines.sounds import Piece, SoundPipeline, own_stride, pieces_of
from topwork.pipelines.spoken import Said, Writer
from topwork.text.ctc import CtcTokenizer
from topwork.text.whisper import WhisperTokenizer


class AutomaticSpeechRecognitionPipeline(SoundPipeline):
    """`pipe(sound)` → {"text"}, and {"chunks": [{"text", "timestamp"}]} with times."""

    model_task = ("speech-seq2seq", "ctc")
    needs = ("tokenizer", "feature_extractor")
    tokenizer: Any

    def run(
        self,
        items: list[Any],
        return_timestamps: bool | str | None = None,
        chunk_length_s: float | None = None,
        stride_length_s: float | tuple[float, float] | None = None,
        return_language: bool = False,
        generate_kwargs: dict[str, Any] | None = None,
        **generation: Any,
    ) -> list[dict[str, Any]]:
        """`return_timestamps`: of Whisper True (parts) or "word", of CTC "char" or "word".

        `chunk_length_s`: long sounds in pieces of so many seconds, which overlap by
        `stride_length_s` (a sixth on each side) and are computed together. Without it Whisper
        reads long sounds window after window, CTC whole. `generation` (or `generate_kwargs`):
        language, task and the other options of Whisper's `generate`.
        """
        options = {**(generate_kwargs or {}), **generation}
        if self.by_ctc:
            self._check_ctc(return_timestamps, return_language, options)
        elif return_timestamps not in (None, False, True, "word"):
            raise ConfigError(
                f"return_timestamps={return_timestamps!r}: Whisper tells True (parts) or 'word'"
            )
        sounds = self.samples(items)
        pieces: list[Piece] = []
        for i, (item, samples) in enumerate(zip(items, sounds)):
            if chunk_length_s:
                pieces += pieces_of(
                    i, samples, self.rate, chunk_length_s, stride_length_s, self.align
                )
            else:
                stride = own_stride(item, samples, self.rate, f"input {i}")
                pieces.append(Piece(i, samples, stride))
        if self.by_ctc:
            return self._spell(len(items), pieces, return_timestamps)
        return self._write(len(items), pieces, return_timestamps, return_language, options)

    @property
    def by_ctc(self) -> bool:
        return self.base.task == "ctc"

    @property
    def align(self) -> int:
        """Samples in one frame of a CTC model; an encoder-decoder has no such thing."""
        if not self.by_ctc:
            return 1
        spec = self.base.ear.spec
        ratio = math.prod(spec.convs.strides)
        return (
            ratio if spec.shortener is None else ratio * spec.shortener.stride**spec.shortener.count
        )

    # -- CTC -------------------------------------------------------------------------------------

    def _check_ctc(self, times: Any, language: bool, options: dict[str, Any]) -> None:
        if not isinstance(self.tokenizer, CtcTokenizer):
            raise ConfigError("a CTC model needs its CtcTokenizer")
        if times not in (None, False, "char", "word"):
            raise ConfigError(f"return_timestamps={times!r}: CTC tells 'char' or 'word'")
        if language:
            raise ConfigError("return_language: a CTC model does not tell the language")
        if options:
            raise ConfigError(f"a CTC model does not generate: it has no {', '.join(options)}")

    def _spell(self, count: int, pieces: list[Piece], times: Any) -> list[dict[str, Any]]:
        said: list[list[int]] = [[] for _ in range(count)]
        frames = self._frames(pieces)
        for piece, ids in zip(pieces, frames):
            if piece.stride is not None:
                length, left, right = piece.stride
                whole = round(length / self.align)
                left, right = (round(n / length * whole) for n in (left, right))
                ids = ids[left : whole - right]
            said[piece.owner] += ids
        results = []
        for ids in said:
            found: dict[str, Any] = {"text": self.tokenizer.decode(ids)}
            if times:
                offsets = self.tokenizer.decode(
                    ids, output_char_offsets=True, output_word_offsets=True
                )
                found["chunks"] = [
                    {"text": at[times], "timestamp": (
                        at["start_offset"] * self.align / self.rate,
                        at["end_offset"] * self.align / self.rate,
                    )}
                    for at in offsets[f"{times}_offsets"]
                ]  # fmt: skip
            results.append(found)
        return results

    def _frames(self, pieces: list[Piece]) -> list[list[int]]:
        """The likeliest letter of each frame of each piece."""
        found: list[list[int]] = [[] for _ in pieces]
        for group in self.together([len(p.samples) for p in pieces]):
            out = self.model(**self.features([pieces[i].samples for i in group]))
            for i, size, row in zip(group, out.sizes, out.logits.argmax(-1).tolist()):
                found[i] = row[:size]
        return found

    # -- Whisper ---------------------------------------------------------------------------------

    def _write(
        self, count: int, pieces: list[Piece], times: Any, language: bool, options: dict[str, Any]
    ) -> list[dict[str, Any]]:
        features = self.feature_extractor
        if not isinstance(self.tokenizer, WhisperTokenizer) or not isinstance(features, LogMel):
            raise ConfigError("this model needs Whisper's tokenizer and feature extractor")
        times = times or self.base.generation_config.get("return_timestamps") or False
        said = self._said(pieces, times, language, options)
        step = features.chunk_length / self.base.spec.encoder.context
        writers = [Writer(self.tokenizer, step, bool(times), times == "word") for _ in range(count)]
        for piece, one in zip(pieces, said):
            writers[piece.owner].read(one)
        return [writer.finish(language) for writer in writers]

    def _said(
        self, pieces: list[Piece], times: Any, language: bool, options: dict[str, Any]
    ) -> list[Said]:
        window = self.feature_extractor.n_samples  # type: ignore[union-attr]
        found: list[Said] = [Said([])] * len(pieces)
        short = [i for i, p in enumerate(pieces) if len(p.samples) <= window]
        groups = [[short[k] for k in g] for g in self.together([1] * len(short))]
        groups += [[i] for i, p in enumerate(pieces) if len(p.samples) > window]
        given = {**options, "return_segments": True}
        if times:
            given["return_timestamps"] = True
        if times == "word":
            given["return_token_timestamps"] = True
        for group in groups:
            sounds = [pieces[i].samples for i in group]
            data = self.features(sounds) if len(sounds[0]) <= window else self._long(sounds[0])
            out = self.model.generate(**data, **given)
            for place, i in enumerate(group):
                found[i] = self._one(pieces[i], out, place, language)
        return found

    def _long(self, samples: np.ndarray) -> dict[str, torch.Tensor]:
        made = self.feature_extractor(
            samples, truncation=False, padding="longest", return_attention_mask=True,
            return_tensors="pt",
        )  # fmt: skip
        base = self.base
        return {
            "input_features": made["input_features"].to(base.device, base.dtype),
            "attention_mask": made["attention_mask"].to(base.device),
        }

    def _one(self, piece: Piece, out: Any, place: int, language: bool) -> Said:
        segments = out.segments[place]
        tokens = [t for part in segments for t in part.tokens]
        moments = None
        if segments and segments[0].token_timestamps is not None:
            moments = [m for part in segments for m in part.token_timestamps]
        stride = None
        if piece.stride is not None:
            length, left, right = (n / self.rate for n in piece.stride)
            stride = (length, left, right)
        if language:
            known = set((self.base.generation_config.get("lang_to_id") or {}).values())
            heard = [t for t in out.inits[place] if t in known]
            tokens = [*heard, *tokens]
            moments = None if moments is None else [*[0.0] * len(heard), *moments]
        return Said(tokens, moments, stride)
