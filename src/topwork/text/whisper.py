"""Whisper's tokenizer: what stands before a text, and times between its parts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Core
from tokenizers import processors

from topwork.errors import ConfigError, nearest
from topwork.text.encoding import Encoding, as_tensors, plain
from topwork.text.languages import language_code
from topwork.text.tokenizer import Tokenizer

STEP = 0.02  # seconds between two time tokens
WINDOW = 1500  # time tokens in one window of sound
TASKS = ("transcribe", "translate")
START, PREVIOUS, SILENT = "<|startoftranscript|>", "<|startofprev|>", "<|notimestamps|>"


class WhisperTokenizer(Tokenizer):
    """Texts with what Whisper expects before them: start, language, task, times or not.

    A time token says seconds since the window's beginning; it may stand above the vocabulary.
    """

    language: str | None
    task: str | None

    def __init__(self, core: Core, config: dict[str, Any] | None = None) -> None:
        super().__init__(core, config)
        self.language = self.config.get("language")
        self.task = self.config.get("task")
        self.predict_timestamps = bool(self.config.get("predict_timestamps", False))
        self._asked = False

    def save_pretrained(self, folder: str | Path) -> tuple[str, ...]:
        """Write tokenizer.json and tokenizer_config.json into `folder`."""
        written = super().save_pretrained(folder)
        path = Path(folder) / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["tokenizer_class"] = "WhisperTokenizer"
        config |= {"language": self.language, "task": self.task}
        config["predict_timestamps"] = self.predict_timestamps
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
        return written

    def number(self, token: str) -> int:
        """The id of a special token; ConfigError where there is none."""
        found = self.core.token_to_id(token)
        if found is None:
            raise ConfigError(f"this tokenizer has no token {token}")
        return found

    @property
    def first_time(self) -> int:
        """The id of `<|0.00|>`; those above it are later."""
        return self.number(SILENT) + 1

    # -- what stands before a text ---------------------------------------------------------------

    @property
    def prefix_tokens(self) -> list[int]:
        """The ids that a call puts before a text."""
        names = [START]
        if self.language is not None:
            names.append(f"<|{language_code(self.language)}|>")
        if self.task is not None:
            if self.task not in TASKS:
                raise ConfigError(f"task={self.task!r}{nearest(self.task, TASKS)}; one of {TASKS}")
            names.append(f"<|{self.task}|>")
        if not self.predict_timestamps:
            names.append(SILENT)
        return [self.number(name) for name in names]

    def set_prefix_tokens(
        self,
        language: str | None = None,
        task: str | None = None,
        predict_timestamps: bool | None = None,
    ) -> None:
        """Choose what calls put before a text from now on; None leaves a choice as it is."""
        before = self.language, self.task, self.predict_timestamps
        self.language = self.language if language is None else language
        self.task = self.task if task is None else task
        if predict_timestamps is not None:
            self.predict_timestamps = predict_timestamps
        try:
            ids = self.prefix_tokens
        except ConfigError:
            self.language, self.task, self.predict_timestamps = before
            raise
        names = [self.core.id_to_token(i) for i in ids]
        end = str(self.eos_token)
        self.core.post_processor = processors.TemplateProcessing(
            single=[*names, "$A", end], pair=[*names, "$A", "$B:1", f"{end}:1"],
            special_tokens=[*zip(names, ids), (end, self.number(end))],
        )  # fmt: skip

    def get_decoder_prompt_ids(
        self, task: str | None = None, language: str | None = None, no_timestamps: bool = True
    ) -> list[tuple[int, int]]:
        """What follows the start token, as (place, id)."""
        self.set_prefix_tokens(language, task, not no_timestamps)
        return list(enumerate(self.prefix_tokens))[1:]

    def get_prompt_ids(self, text: str, return_tensors: str | None = None) -> Any:
        """Ids of a text that is said to have come before, for `generate(prompt_ids=…)`."""
        words = self.core.encode(" " + text.strip(), add_special_tokens=False).ids
        marks = [i for i in words if i in self.all_special_ids or i >= self.first_time]
        if marks:
            raise ConfigError(
                f"the prompt holds the special token {self.core.id_to_token(marks[0])}"
            )
        ids = [self.number(PREVIOUS), *words]
        if return_tensors is None:
            return ids
        return as_tensors({"input_ids": [ids]}, return_tensors)["input_ids"][0]

    # -- ids to text -----------------------------------------------------------------------------

    def without_prompt(self, ids: list[int]) -> list[int]:
        """`ids` from the start token on, where they begin with a text that came before."""
        if not ids or ids[0] != self.core.token_to_id(PREVIOUS):
            return ids
        start = self.number(START)
        return ids[ids.index(start) :] if start in ids else []

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        *,
        decode_with_timestamps: bool = False,
        output_offsets: bool = False,
        time_precision: float = STEP,
    ) -> Any:
        """The text of one row of ids, or of each row of a batch.

        Times are left out, or, with `decode_with_timestamps`, written as `<|1.08|>`, counted on
        through the windows. `output_offsets` gives {"text", "offsets": [{"text", "timestamp"}]}.
        """
        ids = plain(token_ids)
        options = {
            "decode_with_timestamps": decode_with_timestamps, "output_offsets": output_offsets,
            "time_precision": time_precision,
        }  # fmt: skip
        clean = clean_up_tokenization_spaces
        if ids and not isinstance(ids[0], int):
            return [self.decode(row, skip_special_tokens, clean, **options) for row in ids]
        kept = self.without_prompt(ids) if skip_special_tokens else ids
        if decode_with_timestamps:
            text = self._with_times(kept, skip_special_tokens, time_precision)
        else:
            text = self._words(kept, skip_special_tokens, clean)
        if not output_offsets:
            return text
        return Encoding({"text": text, "offsets": self.offsets(ids, time_precision)})

    def batch_decode(  # type: ignore[override]
        self, rows: Any, skip_special_tokens: bool = False, **options: Any
    ) -> list[Any]:
        """The text of each row."""
        return [self.decode(row, skip_special_tokens, **options) for row in rows]

    def _words(
        self, ids: Sequence[int], skip: bool, clean: bool | None = None, times: bool = False
    ) -> str:
        text = super().decode(list(ids), skip, clean)
        return text if times else re.sub(r"<\|\d+\.\d+\|>", "", text)

    def _with_times(self, ids: list[int], skip: bool, step: float) -> str:
        """Each time is written where it stands; one that goes back begins the next window."""
        first, parts = self.first_time, [""]
        words: list[int] = []
        now = past = before = 0.0
        for i, token in enumerate(ids):
            if token < first:
                words.append(token)
                continue
            time = (token - first) * step
            parts[-1] = self._words(words, skip, times=True)
            if time < now:
                if i >= 2 and not (ids[i - 1] >= first and ids[i - 2] >= first):
                    past += step * WINDOW
                else:  # the last part was not finished: it is said again
                    now, past = before, past + before
                    parts = parts[:-2]
            before, now, words = now, time, []
            parts += [f"<|{time + past:.2f}|>", ""]
        parts[-1:] = [self._words(words, skip, times=True)]
        return "".join(parts)

    def offsets(self, ids: Sequence[int], step: float = STEP) -> list[dict[str, Any]]:
        """The parts of a text between its times: {"text", "timestamp": (from, to)} in seconds."""
        first, ids = self.first_time, list(ids)
        is_time = [i >= first for i in ids]
        places = [i for i, t in enumerate(is_time) if t]
        cuts = [i for i in range(1, len(ids)) if is_time[i] and is_time[i - 1]]
        if not cuts and len(places) <= 1:
            return []
        if places[-1] + 1 not in cuts:
            cuts.append(places[-1] + 1)
        found, begin, latest, past = [], places[0], 0, 0
        for cut in cuts:
            piece = ids[begin:cut]
            if len(piece) > 1:
                start, stop = piece[0] - first, piece[-1] - first
                if start < latest:
                    single = begin >= 2 and not (is_time[begin - 2] and is_time[begin - 1])
                    past += WINDOW if single else latest
                latest = stop
                times = (start * step + past * step, stop * step + past * step)
                found.append({"text": self._words(piece, False), "timestamp": times})
            begin = cut
        return found
