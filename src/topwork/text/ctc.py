"""The tokenizer of CTC models: letters, a mark between words, a blank between equal letters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core

from topwork.errors import CheckpointError, ConfigError, nearest
from topwork.text.encoding import Encoding, plain
from topwork.text.tokenizer import Tokenizer, clean_up

ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


class CtcTokenizer(Tokenizer):
    """Spells texts, and reads what a model said frame by frame.

    The blank is the padding token. A vocabulary of several languages (MMS) is one dictionary for
    each; `target_lang` of its configuration chooses.
    """

    def __init__(self, core: Core, config: dict[str, Any] | None = None) -> None:
        config = {**ROLES, **(config or {})}
        super().__init__(core, config)
        self.word_delimiter_token: str = _text(config.get("word_delimiter_token", "|"))
        self.replace_word_delimiter_char = config.get("replace_word_delimiter_char", " ")
        self.do_lower_case = bool(config.get("do_lower_case", False))

    @classmethod
    def of_vocabulary(cls, vocab: Mapping[str, Any], **config: Any) -> CtcTokenizer:
        """From letters and their ids; `config` as in tokenizer_config.json."""
        return cls(*core_of(dict(vocab), config))

    def save_pretrained(self, folder: str | Path) -> tuple[str, ...]:
        """Write vocab.json and tokenizer_config.json into `folder`."""
        folder = Path(folder)
        super().save_pretrained(folder)
        (folder / "tokenizer.json").unlink()
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        vocab = config.pop("vocabulary")
        config["tokenizer_class"] = "Wav2Vec2CTCTokenizer"
        for name, value in (("vocab.json", vocab), ("tokenizer_config.json", config)):
            text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
        return str(folder / "vocab.json"), str(path)

    @property
    def word_delimiter_token_id(self) -> int | None:
        return self.core.token_to_id(self.word_delimiter_token)

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        *,
        group_tokens: bool = True,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
    ) -> Any:
        """The text of one row of ids, or of each row of a batch.

        Equal neighbours are one letter (not without `group_tokens`, for labels) and blanks vanish.
        With offsets a mapping comes back: `text`, `char_offsets` and `word_offsets`, each a list of
        {"char" or "word", "start_offset", "end_offset"} counted in frames.
        """
        ids = plain(token_ids)
        options = {
            "group_tokens": group_tokens, "output_char_offsets": output_char_offsets,
            "output_word_offsets": output_word_offsets,
        }  # fmt: skip
        if ids and not isinstance(ids[0], int):
            rows = [
                self.decode(row, skip_special_tokens, clean_up_tokenization_spaces, **options)
                for row in ids
            ]
            if output_char_offsets or output_word_offsets:
                return Encoding({key: [row[key] for row in rows] for key in rows[0]})
            return rows
        tokens = [self.core.id_to_token(i) or self.unk_token or "" for i in ids]
        if skip_special_tokens:
            names = {getattr(self, role) for role in ROLES}
            tokens = [t for t in tokens if t not in names]
        letters = self._letters(tokens, group_tokens)
        text = "".join(letter["char"] for letter in letters).strip()
        text = text.lower() if self.do_lower_case else text
        clean = clean_up_tokenization_spaces
        if clean is None:
            clean = self.config.get("clean_up_tokenization_spaces", False)
        text = clean_up(text) if clean else text
        if not output_char_offsets and not output_word_offsets:
            return text
        found = Encoding({"text": text})
        if output_char_offsets:
            found["char_offsets"] = letters
        if output_word_offsets:
            found["word_offsets"] = words_of(letters, self.replace_word_delimiter_char)
        return found

    def batch_decode(  # type: ignore[override]
        self, rows: Any, skip_special_tokens: bool = False, **options: Any
    ) -> Any:
        """The text of each row; with offsets a mapping of lists."""
        return self.decode([plain(row) for row in rows], skip_special_tokens, **options)

    def _letters(self, tokens: list[str], group: bool) -> list[dict[str, Any]]:
        """What was said, with the frames it was said in."""
        runs = [(t, len(list(same))) for t, same in groupby(tokens)] if group else (
            [(t, 1) for t in tokens]
        )  # fmt: skip
        letters, at = [], 0
        for token, count in runs:
            if token != self.pad_token:
                delimiter = token == self.word_delimiter_token
                char = self.replace_word_delimiter_char if delimiter else token
                letters.append({"char": char, "start_offset": at, "end_offset": at + count})
            at += count
        return letters


def words_of(letters: list[dict[str, Any]], blank: str) -> list[dict[str, Any]]:
    """Letters between blanks, joined, with the frames of the first and of the last."""
    words = []
    for is_blank, run in groupby(letters, lambda letter: letter["char"] == blank):
        if not is_blank:
            said = list(run)
            words.append(
                {
                    "word": "".join(letter["char"] for letter in said),
                    "start_offset": said[0]["start_offset"],
                    "end_offset": said[-1]["end_offset"],
                }
            )
    return words


def core_of(vocab: dict[str, Any], config: dict[str, Any]) -> tuple[Core, dict[str, Any]]:
    """The tokenizer of a vocabulary, and `config` with the usual roles and the vocabulary."""
    config = {"tokenizer_class": "Wav2Vec2CTCTokenizer", **ROLES, **config, "vocabulary": vocab}
    language = config.get("target_lang")
    letters = vocab
    if any(isinstance(value, dict) for value in vocab.values()):
        if language not in vocab:
            raise ConfigError(
                f"target_lang={language!r}: this vocabulary is of {len(vocab)} languages"
                f"{nearest(str(language), vocab)}"
            )
        letters = vocab[language]
    if not all(isinstance(index, int) for index in letters.values()):
        raise CheckpointError("vocab.json is not a mapping of letters to ids")
    core = Core(models.WordLevel(dict(letters), unk_token=str(_text(config["unk_token"]))))
    steps: list[Any] = []
    if config.get("do_lower_case"):
        cased = [c for c in letters if len(c) == 1 and c.lower() != c]
        steps = [normalizers.Replace(c.lower(), c) for c in cased]
    delimiter = _text(config.get("word_delimiter_token", "|"))
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", delimiter)])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.CTC(str(_text(config["pad_token"])), delimiter, cleanup=False)
    roles = {_text(config[role]) for role in ROLES}
    for token in letters:
        if len(token) > 1:
            made = AddedToken(token, lstrip=True, rstrip=True, normalized=False)
            core.add_special_tokens([made]) if token in roles else core.add_tokens([made])
    return core, config


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
