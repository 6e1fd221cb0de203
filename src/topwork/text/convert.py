"""Tokenizers from the files that came before tokenizer.json.

vocab.txt is BERT's WordPiece, vocab.json with merges.txt GPT-2's byte-level BPE, and the `.model`
files are SentencePiece's Unigram or BPE. What a class of the files' time did beyond its files is
known for the classes named here; others are refused by name, for a guess would give other ids.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Core

from topwork.errors import CheckpointError
from topwork.text.ctc import core_of
from topwork.text.languages import MBART, MBART50
from topwork.text.merges import merges_of

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model")
BERT_ROLES = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]",
              "cls_token": "[CLS]", "mask_token": "[MASK]"}  # fmt: skip
ROBERTA_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>",
                 "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}  # fmt: skip
MPNET_ROLES = {**ROBERTA_ROLES, "unk_token": "[UNK]"}
GPT2_ROLES: dict[str, str] = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
CLIP_ROLES = {**GPT2_ROLES, "bos_token": "<|startoftext|>", "pad_token": "<|endoftext|>"}
ROBERTA = ("Roberta", "Bart", "Longformer", "LED")
WORDPIECE = ("", "Bert", "DistilBert", "Electra", "MobileBert", "ConvBert", "LayoutLM",
             "DPRContextEncoder", "DPRQuestionEncoder", "SqueezeBert", "Lxmert",
             "MPNet")  # fmt: skip
PIECES: dict[str, tuple[str, ...]] = {  # what stands around a text; () as the flags say
    "": (), "Llama": (), "Gemma": (), "T5": ("$A", "eos_token"),
    "Albert": ("cls_token", "$A", "sep_token"), "XLMRoberta": ("cls_token", "$A", "sep_token"),
    "DebertaV2": ("cls_token", "$A", "sep_token"),
    "MBart": ("$A", "eos_token", "src_lang"), "MBart50": ("src_lang", "$A", "eos_token"),
}  # fmt: skip
FAIRSEQ: dict[str, Sequence[str]] = {
    "XLMRoberta": (),
    "MBart": MBART,
    "MBart50": MBART50,
}  # their languages
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def convert(files: Mapping[str, Path], config: dict[str, Any]) -> tuple[Core, dict[str, Any]]:
    """The tokenizer of `files`, and `config` with the roles that its class has by default."""
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")
    kind = "" if kind == "PreTrained" else kind
    model = next((files[name] for name in SENTENCEPIECE if name in files), None)
    if model is not None:
        core, config = _sentencepiece(model, kind, config)
    elif "vocab.json" in files and "merges.txt" in files:
        core, config = _byte_level(files["vocab.json"], files["merges.txt"], kind, config)
    elif "vocab.json" in files and kind == "Wav2Vec2CTC":
        vocab = json.loads(files["vocab.json"].read_text(encoding="utf-8"))
        return core_of(vocab, config)
    elif "vocab.txt" in files:
        core, config = _wordpiece(files["vocab.txt"], kind, config)
    else:
        there = ", ".join(files) or "no tokenizer file"
        raise CheckpointError(f"there is no tokenizer.json, only {there}")
    _add_tokens(core, files, config)
    if kind == "Whisper":
        from topwork.text.whisper import WhisperTokenizer

        WhisperTokenizer(core, config).set_prefix_tokens()  # its parts are added tokens
    return core, config


def _add_tokens(core: Core, files: Mapping[str, Path], config: dict[str, Any]) -> None:
    """What was added to the vocabulary later, and the roles, as whole tokens."""
    roles = {_text(config.get(role)) for role in (*ROBERTA_ROLES, *BERT_ROLES)} - {None}
    special_ones = {_text(t) for name in ("additional_special_tokens", "extra_special_tokens")
                    for t in config.get(name) or ()} | roles  # fmt: skip
    added = {int(i): token for i, token in (config.get("added_tokens_decoder") or {}).items()}
    if "added_tokens.json" in files:
        listed = json.loads(files["added_tokens.json"].read_text(encoding="utf-8"))
        for token, index in listed.items():
            added.setdefault(index, {"content": token, "special": token in special_ones})
    for index in sorted(added):
        token: dict[str, Any] = {k: v for k, v in added[index].items() if k != "__type"}
        special = token.pop("special", False) or token["content"] in special_ones
        token.setdefault("normalized", False)
        core.add_tokens([AddedToken(**token, special=special)])
        if core.token_to_id(str(token["content"])) != index:
            raise CheckpointError(f"the added token {token['content']!r} is not number {index}")
    have = {token["content"] for token in added.values()}
    known = [r for r in roles if r is not None and r not in have]
    core.add_special_tokens([AddedToken(token, normalized=False) for token in sorted(known)])


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _known(path: Path, kind: str, known: tuple[str, ...]) -> None:
    if kind not in known:
        names = ", ".join(k + "Tokenizer" for k in known if k)
        raise CheckpointError(
            f"{path}: there is no tokenizer.json, and {kind}Tokenizer cannot be built from this "
            f"file; known: {names}"
        )


# -- WordPiece -----------------------------------------------------------------------------------


def _wordpiece(path: Path, kind: str, config: dict[str, Any]) -> tuple[Core, dict[str, Any]]:
    _known(path, kind, WORDPIECE)
    roles = MPNET_ROLES if kind == "MPNet" else BERT_ROLES
    config = {"tokenizer_class": "BertTokenizer", **roles, **config}
    tokens = path.read_text(encoding="utf-8").split("\n")
    tokens = [token.rstrip("\r") for token in (tokens[:-1] if tokens[-1] == "" else tokens)]
    vocab = {token: index for index, token in enumerate(tokens)}
    core = Core(models.WordPiece(vocab, unk_token=str(_text(config["unk_token"]))))
    core.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")
    begin, end = str(_text(config["cls_token"])), str(_text(config["sep_token"]))
    between = (end, end) if kind == "MPNet" else (end,)
    _frame(path, core, (begin, "$A", end), (begin, "$A", *between, "$B:1", f"{end}:1"))
    if kind == "MPNet":
        core.add_special_tokens([AddedToken(str(_text(config["mask_token"])), lstrip=True)])
    return core, config


def _frame(path: Path, core: Core, single: tuple[str, ...], pair: tuple[str, ...]) -> None:
    names = [part for part in dict.fromkeys(single) if part != "$A"]
    missing = [name for name in names if core.token_to_id(name) is None]
    if missing:
        raise CheckpointError(f"{path}: its vocabulary lacks {missing}, which stand around a text")
    core.post_processor = processors.TemplateProcessing(
        single=list(single), pair=list(pair),
        special_tokens=[(name, core.token_to_id(name)) for name in names],
    )  # fmt: skip


# -- byte-level BPE ------------------------------------------------------------------------------


def _byte_level(
    vocab_file: Path, merges_file: Path, kind: str, config: dict[str, Any]
) -> tuple[Core, dict[str, Any]]:
    _known(vocab_file, kind, ("", "GPT2", "CodeGen", "Qwen2", "CLIP", "Whisper", *ROBERTA))
    roles: dict[str, str] = ROBERTA_ROLES if kind in ROBERTA else GPT2_ROLES
    config = {**{"Qwen2": {}, "CLIP": CLIP_ROLES}.get(kind, roles), **config}
    vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
    lines = merges_file.read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.rstrip("\r").split(" ")) for line in lines if not line.startswith("#v")]
    merges = [(m[0], m[1]) for m in merges if len(m) == 2]
    own: dict[str, Any] = {}
    if kind == "CLIP":
        own = {"end_of_word_suffix": "</w>", "unk_token": str(_text(config["unk_token"]))}
    core = Core(models.BPE(vocab=vocab, merges=merges, **own))
    prefix = bool(config.get("add_prefix_space", False))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    core.decoder = decoders.ByteLevel()
    if kind == "Qwen2":
        from topwork.text.gguf import SPLITS

        core.normalizer = normalizers.NFC()
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLITS["qwen2"][0]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
            ]
        )
    elif kind in ROBERTA:
        begin, end = str(_text(config["cls_token"])), str(_text(config["sep_token"]))
        core.add_special_tokens([AddedToken(str(_text(config["mask_token"])), lstrip=True)])
        _frame(vocab_file, core, (begin, "$A", end), (begin, "$A", end, end, "$B", end))
    elif kind == "CLIP":
        core.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        words = pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True)
        core.pre_tokenizer = pre_tokenizers.Sequence([words, core.pre_tokenizer])
        begin, end = str(_text(config["bos_token"])), str(_text(config["eos_token"]))
        _frame(vocab_file, core, (begin, "$A", end), (begin, "$A", end, end, "$B", end))
    elif config.get("add_bos_token"):
        bos = str(_text(config["bos_token"]))
        _frame(vocab_file, core, (bos, "$A"), (bos, "$A", f"{bos}:1", "$B:1"))
    return core, config


# -- SentencePiece -------------------------------------------------------------------------------


def _sentencepiece(path: Path, kind: str, config: dict[str, Any]) -> tuple[Core, dict[str, Any]]:
    _known(path, kind, tuple(PIECES))
    model = _Model(path)
    if kind in FAIRSEQ:
        model.as_fairseq(FAIRSEQ[kind])
        config = {**ROBERTA_ROLES, **config}
        if FAIRSEQ[kind]:
            config["src_lang"] = config.get("src_lang") or "en_XX"
    if kind == "DebertaV2":
        config = {**BERT_ROLES, **config}
        for option in ("do_lower_case", "split_by_punct"):
            if config.get(option):
                raise CheckpointError(f"{path}: {option}=true of {kind}Tokenizer is not supported")
    core, unknown = _core_of(model), model.names[model.unknown]
    control = [n for n, k in zip(model.names, model.kinds) if k in (2, 3)]
    core.add_special_tokens(
        [AddedToken(name, normalized=False, lstrip=name == "<mask>") for name in control]
    )
    core.add_tokens(
        [AddedToken(n, normalized=False) for n, k in zip(model.names, model.kinds) if k == 4]
    )
    names = {
        "bos_token": ("<s>", "<bos>"), "eos_token": ("</s>", "<eos>"), "pad_token": ("<pad>",),
        "cls_token": ("[CLS]",), "sep_token": ("[SEP]",), "mask_token": ("[MASK]",),
    }  # fmt: skip
    roles = {"unk_token": unknown}
    for role, usual in names.items():
        roles.update((role, name) for name in usual if name in control)
    config = {**roles, **config}
    if kind == "T5":
        count = int(config.get("extra_ids", 100))
        extra = [f"<extra_id_{i}>" for i in reversed(range(count))]
        core.add_special_tokens([AddedToken(name, normalized=False) for name in extra])
    frame = list(PIECES[kind])
    if not frame:
        begins = config.get("add_bos_token", kind in ("Llama", "Gemma"))
        frame = [*(["bos_token"] if begins else []), "$A"]
        frame += ["eos_token"] if config.get("add_eos_token") else []
    single = tuple(p if p == "$A" else str(_text(config.get(p))) for p in frame)
    if len(single) > 1:
        at = single.index("$A")
        pair = (*single, "$B:1", *(f"{p}:1" for p in single[at + 1 :]))
        if kind == "XLMRoberta":
            pair = (*single, "</s>", "$B", "</s>")
        elif kind in FAIRSEQ:
            pair = (*single[: at + 1], "$B", *single[at + 1 :])
        elif kind in ("Llama", "Gemma", ""):
            pair = (*single, *(f"{p}:1" for p in single[:at]), *pair[len(single) :])
        _frame(path, core, single, pair)
    return core, config


def _core_of(model: _Model) -> Core:
    """The pieces of a model, and how texts are cut into them."""
    unknown = model.names[model.unknown]
    if model.is_unigram:
        scored = list(zip(model.names, model.scores))
        core = Core(models.Unigram(scored, model.unknown, byte_fallback=model.byte_fallback))
    else:
        vocab = {name: index for index, name in enumerate(model.names)}
        plain = {n: s for n, s, k in zip(model.names, model.scores, model.kinds) if k == 1}
        core = Core(
            models.BPE(vocab=vocab, merges=merges_of(plain, vocab), unk_token=unknown,
                       fuse_unk=True, byte_fallback=model.byte_fallback)
        )  # fmt: skip
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.strips:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.prefix:
        steps.append(normalizers.Prepend("▁"))
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] * model.prefix)])
    return core


class _Model:
    """A SentencePiece model: the few fields of its protocol buffer that matter for encoding."""

    def __init__(self, path: Path) -> None:
        self.names: list[str] = []
        self.scores: list[float] = []
        self.kinds: list[int] = []
        trainer: dict[int, Any] = {}
        shape: dict[int, Any] = {}
        try:
            for number, value in _fields(path.read_bytes()):
                if number == 1:
                    piece = dict(_fields(value))
                    self.names.append(piece[1].decode("utf-8"))
                    self.scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                    self.kinds.append(piece.get(3, 1))
                elif number == 2:
                    trainer = dict(_fields(value))
                elif number == 3:
                    shape = dict(_fields(value))
        except (ValueError, KeyError, IndexError, AttributeError, TypeError, struct.error) as error:
            raise CheckpointError(f"{path}: no SentencePiece model, or damaged: {error}") from error
        if 2 not in self.kinds:
            raise CheckpointError(f"{path}: no SentencePiece model: it has no unknown piece")
        method = trainer.get(3, 1)
        if method not in (1, 2):
            raise CheckpointError(f"{path}: only Unigram and BPE models are supported")
        self.is_unigram = method == 1
        self.byte_fallback = bool(trainer.get(35, 0))
        self.unknown = self.kinds.index(2)
        self.charsmap: bytes = shape.get(2, b"")
        self.prefix = bool(shape.get(3, 1))
        self.strips = bool(shape.get(4, 1))

    def as_fairseq(self, languages: Sequence[str]) -> None:
        """In fairseq's order, which has four special pieces before the others, and languages and a
        mask behind them: the file's first three (unknown, begin, end) count no more."""
        behind = [*languages, "<mask>"]
        self.names = ["<s>", "<pad>", "</s>", "<unk>", *self.names[3:], *behind]
        self.scores = [0.0] * 4 + self.scores[3:] + [0.0] * len(behind)
        self.kinds = [3, 3, 3, 2, *self.kinds[3:], *[3] * len(behind)]
        self.unknown = 3


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer's message: an int, or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number goes on and on")

    while at < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"unknown wire type {wire}")
        size = varint() if wire == 2 else 8 if wire == 1 else 4
        if at + size > len(data):
            raise ValueError("it is cut off")
        yield number, data[at : at + size]
        at += size
