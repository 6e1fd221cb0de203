"""`AutoProcessor`: what prepares sounds, images and texts for one model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topwork import hub
from topwork.errors import ConfigError
from topwork.media.features import AutoFeatureExtractor, LogMel, Waveform
from topwork.media.image_text import ImageTextProcessor
from topwork.text import Tokenizer
from topwork.text.encoding import Encoding

CLASSES = {LogMel: "WhisperProcessor", Waveform: "Wav2Vec2Processor"}


@dataclass
class SpeechProcessor:
    """Features of sounds, ids of what is said in them."""

    feature_extractor: LogMel | Waveform
    tokenizer: Tokenizer

    def __call__(self, audio: Any = None, text: Any = None, **options: Any) -> Encoding:
        """The features of `audio`, the ids of `text`, or both: then the ids are `labels`.

        Options are those of the feature extractor where there is audio, else of the tokenizer.
        """
        if audio is None:
            if text is None:
                raise ConfigError("a processor needs audio or text")
            return self.tokenizer(text, **options)
        found = self.feature_extractor(audio, **options)
        if text is not None:
            found["labels"] = self.tokenizer(text)["input_ids"]
        return found

    def pad(self, features: Any = None, labels: Any = None, **options: Any) -> Encoding:
        """Bring features, labels (as {"input_ids"} each) or both to one length."""
        if features is None and labels is None:
            raise ConfigError("a processor needs features or labels to pad")
        ids = None if labels is None else self.tokenizer.pad(labels, **options)
        if features is None:
            return ids or Encoding()
        found = self.feature_extractor.pad(features, **options)
        if ids is not None:
            found["labels"] = ids["input_ids"]
        return found

    def decode(self, ids: Any, **options: Any) -> Any:
        """The text of ids; see the tokenizer."""
        return self.tokenizer.decode(ids, **options)

    def batch_decode(self, rows: Any, **options: Any) -> Any:
        return self.tokenizer.batch_decode(rows, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files of both into `folder`."""
        self.tokenizer.save_pretrained(folder)
        self.feature_extractor.save_pretrained(folder)
        path = Path(folder) / "preprocessor_config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values["processor_class"] = CLASSES[type(self.feature_extractor)]
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class AutoProcessor:
    """`AutoProcessor.from_pretrained(name)` gives what prepares inputs for the model."""

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, **where: Any
    ) -> SpeechProcessor | ImageTextProcessor:
        """The processor of a folder or Hub id; `where` as in `hub.resolve`."""
        files = hub.resolve(name_or_path, want=("config", "processor"), **where)
        found = ImageTextProcessor.from_checkpoint(files, name_or_path, **where)
        if found is not None:
            return found
        features = AutoFeatureExtractor.from_pretrained(name_or_path, **where)
        return SpeechProcessor(features, Tokenizer.from_pretrained(name_or_path, **where))
