"""Sounds from every kind of source, and what is no sound."""

from __future__ import annotations

import io
import struct
import sys

import numpy as np
import pytest
import soundfile
import torch

from topwork.errors import ConfigError, DataError
from topwork.media import read_audio, resample


def tone(rate=16000, seconds=0.5, hertz=440.0):
    return np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate).astype(np.float32) / 2


def written(samples, rate=16000, kind="wav", **options):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "near"), [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.05),
                                            ("mp3", 0.05)])  # fmt: skip
def test_files_are_read_by_path_by_bytes_and_open(kind, near, tmp_path):
    data = written(tone(), kind=kind)
    path = tmp_path / f"tone.{kind}"
    path.write_bytes(data)
    found = read_audio(path, 16000)
    assert found.dtype == np.float32
    assert np.sqrt(np.mean((found[:8000] - tone()) ** 2)) < near
    for source in (str(path), data, io.BytesIO(data), {"bytes": data, "path": None},
                   {"path": str(path)}):  # fmt: skip
        np.testing.assert_array_equal(read_audio(source, 16000), found)


def test_arrays_are_taken_as_they_are_mixed_and_scaled():
    wave = tone()
    for source in (wave, wave.astype(np.float64), wave.tolist(), torch.from_numpy(wave),
                   {"raw": wave, "sampling_rate": 16000},
                   {"array": wave, "sampling_rate": 16000, "path": "x.wav"}):  # fmt: skip
        np.testing.assert_allclose(read_audio(source, 16000), wave, atol=1e-7)
    both = np.stack([wave, -wave / 2])
    np.testing.assert_allclose(read_audio(both, 16000), wave / 4, atol=1e-6)
    np.testing.assert_allclose(read_audio(written(both.T), 16000), wave / 4, atol=1e-4)
    whole = (wave * 32767).astype(np.int16)
    np.testing.assert_allclose(read_audio(whole, 16000), wave, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_sound_is_brought_to_the_rate_of_the_model(rate):
    """A tone stays the tone; what lies above half the rate goes instead of folding back."""
    found = read_audio({"raw": tone(rate, 1.0), "sampling_rate": rate}, 16000)
    assert abs(len(found) - 16000) <= 1
    np.testing.assert_allclose(found[2000:14000], tone(16000, 1.0)[2000:14000], atol=2e-3)
    if rate > 20000:
        high = resample(tone(rate, 1.0, 9500.0), rate, 16000)
        assert np.abs(high[1000:-1000]).max() < 2e-3


def header(frames, rate=16000):
    """A wav header that claims `frames` samples, and none of them."""
    size = frames * 2
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, rate,
                       rate * 2, 2, 16, b"data", size)  # fmt: skip


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"this is no sound at all" * 9, "clip 3 is no sound file"),
        (b"", "clip 3 is no sound file"),
        (written(tone())[:60][:20], "clip 3 is no sound file"),
        (written(tone()[:0]), "clip 3 is empty"),
        (np.zeros(0, np.float32), "clip 3 is empty"),
        (np.array([0.0, np.nan], np.float32), "clip 3 has samples that are no numbers"),
        (np.zeros((5, 5), np.float32), "5 channels. Transpose"),
        (np.zeros((1, 2, 3), np.float32), "3 axes"),
        (np.arange(9), "samples of int64"),
        ("no/such/file.wav", "there is no such file"),
        ("https://example.org/a.wav", "download it first"),
        ({"raw": tone()}, "need their sampling_rate"),
        ({"raw": tone(), "sampling_rate": 0}, "sampling_rate=0 must be"),
        ({"raw": tone(), "sampling_rate": "16k"}, "sampling_rate='16k'"),
        ({"raw": tone(), "sampling_rate": 10**9}, "sampling_rate=1000000000 must be"),
        ({"sound": tone()}, "got the keys sound"),
        (["a", "b"], "samples of <U1"),
    ],
)
def test_what_is_no_sound_is_refused_by_name(source, words):
    with pytest.raises(DataError, match=words):
        read_audio(source, 16000, "clip 3")


def test_a_sound_that_is_absurdly_long_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("topwork.media.audio.LONGEST", 1.0)
    with pytest.raises(DataError, match="hours long, more than"):
        read_audio(written(tone(seconds=1.5)), 16000)
    with pytest.raises(DataError, match="24000 samples, more than"):
        read_audio(tone(seconds=1.5), 16000)


def test_a_header_that_claims_more_than_there_is_costs_nothing():
    with pytest.raises(DataError):
        read_audio(header(10**9), 16000)


def test_a_missing_library_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(ConfigError, match=r'8000 hertz.*needs soxr: pip install "topwork\[audio\]'):
        read_audio({"raw": tone(8000), "sampling_rate": 8000}, 16000)
    assert len(read_audio(tone(), 16000)) == 8000
