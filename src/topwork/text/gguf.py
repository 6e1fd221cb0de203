"""The tokenizer inside a .gguf file: llama.cpp's metadata `tokenizer.ggml.*` → `tokenizers`.

`model` "gpt2" is byte-level BPE, split as `pre` says; "llama" is SentencePiece's BPE, whose merges
follow from the scores of its pieces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as Core

from topwork.errors import CheckpointError, nearest
from topwork.text.merges import merges_of
from topwork.weights.gguf_metadata import read_metadata

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # of `token_type`
ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",  # as the format spells it
    "mask_token": "mask",
}

_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _END
_QWEN2 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _END
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_CASED_END = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}" + _CASED_END
_GPT4O = rf"{_CASED[0]}{_SHORT}?|{_CASED[1]}{_SHORT}?|\p{{N}}{{1,3}}" + _CASED_END
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
_BLOOM = (r" ?[^(\s|.,!?…。，、।۔،)]+",)

# By llama.cpp's names. These add the first token unless told otherwise, and a word that is in the
# vocabulary as a whole is not merged from its parts.
LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
          "jina-v5-nano")  # fmt: skip
BEGINS = frozenset({*LLAMA3, "tekken"})
COMPOSED = frozenset({"qwen2"})  # text in Unicode's composed form, as these models' own files say

# For each `pre`, the patterns that cut the text, one after the other.
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LLAMA3, (_LLAMA3,)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("default", "gpt-2", "mpt", "olmo", "jais", "phi-2", "trillion"), (_GPT2,)),
    **dict.fromkeys(("jina-es", "jina-de", "jina-v2-es", "jina-v2-de"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        (r"\p{N}", _GPT2),
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), (_QWEN2,)),
    **dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,)),
    "tekken": (_TEKKEN,),
    "deepseek-v3": _DEEPSEEK3,
    "falcon": _FALCON,
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), _BLOOM),
}


def tokenizer_of_gguf(path: Path) -> tuple[Core, dict[str, Any]]:
    """The tokenizer of a .gguf file, and what its tokenizer_config.json would say.

    Raises CheckpointError when the file holds none, or one of an unknown kind: a guess would
    give other ids without a word.
    """
    metadata = read_metadata(path)

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.{key}", default)

    kind = get("ggml.model")
    tokens = get("ggml.tokens")
    if kind is None or tokens is None:
        raise CheckpointError(f"{path}: holds no tokenizer (tokenizer.ggml.model, .tokens)")
    types = get("ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"{path}: {len(tokens)} tokens, but {len(types)} token types")
    if len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{path}: some of its {len(tokens)} tokens are there twice")
    config: dict[str, Any] = {}
    for name, key in ROLES.items():
        at = get(f"ggml.{key}_token_id")
        if at is not None and at < len(tokens):
            config[name] = tokens[at]
    add_bos, add_eos = get("ggml.add_bos_token"), get("ggml.add_eos_token", False)
    if kind == "gpt2":
        pre = get("ggml.pre", "default")
        core = _byte_level(path, tokens, types, get("ggml.merges"), pre)
        add_bos = pre in BEGINS if add_bos is None else add_bos
    elif kind == "llama":
        prefix = get("ggml.add_space_prefix", True)
        core = _sentencepiece(path, tokens, types, get("ggml.scores"), get("ggml.merges"), prefix)
        add_bos = True if add_bos is None else add_bos
    else:
        raise CheckpointError(f"{path}: tokenizer model {kind!r} is not supported: gpt2 or llama")
    named = set(config.values())
    core.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, type_ in zip(tokens, types)
            if type_ == CONTROL or (token in named and type_ in (UNKNOWN, USER_DEFINED))
        ]
    )
    core.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token, type_ in zip(tokens, types)
            if type_ == USER_DEFINED and token not in named
        ]
    )
    _frame(core, config, add_bos, add_eos)
    config |= {"add_bos_token": bool(add_bos), "add_eos_token": bool(add_eos)}
    if (template := get("chat_template")) is not None:
        config["chat_template"] = template
    return core, config


def _byte_level(
    path: Path, tokens: list[str], types: list[int], merges: list[str] | None, pre: str
) -> Core:
    if pre not in SPLITS:
        known = ", ".join(sorted(SPLITS))
        raise CheckpointError(
            f"{path}: its text is split in an unknown way, tokenizer.ggml.pre={pre!r}"
            f"{nearest(pre, SPLITS)}; known: {known}"
        )
    if merges is None:
        raise CheckpointError(f"{path}: the metadata lacks 'tokenizer.ggml.merges'")
    spelled = byte_spelling()
    alphabet = set(spelled)
    vocab = {
        token
        if type_ in (CONTROL, USER_DEFINED) or alphabet.issuperset(token)
        else "".join(spelled[byte] for byte in token.encode()): index
        for index, (token, type_) in enumerate(zip(tokens, types))
    }
    core = Core(
        models.BPE(
            vocab=vocab,
            merges=_pairs(path, merges),
            fuse_unk=False,
            ignore_merges=pre in BEGINS,
        )
    )
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last])
    if pre in COMPOSED:
        core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    return core


def _sentencepiece(
    path: Path,
    tokens: list[str],
    types: list[int],
    scores: list[float] | None,
    merges: list[str] | None,
    prefix: bool,
) -> Core:
    vocab = {token: index for index, token in enumerate(tokens)}
    if merges is not None:
        pairs = _pairs(path, merges)
    elif scores is not None and len(scores) == len(tokens):
        pairs = merges_of({t: s for t, s, type_ in zip(tokens, scores, types) if type_ == 1}, vocab)
    else:
        raise CheckpointError(f"{path}: has neither merges nor a score for each token")
    unknown = next((t for t, type_ in zip(tokens, types) if type_ == UNKNOWN), None)
    core = Core(
        models.BPE(vocab=vocab, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    blank = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank]) if prefix else blank
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    core.decoder = decoders.Sequence(parts)
    return core


def _pairs(path: Path, merges: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        left, gap, right = merge.partition(" ")
        if not (left and gap and right):
            raise CheckpointError(f"{path}: {merge!r} is no merge of two tokens")
        pairs.append((left, right))
    return pairs


def _frame(core: Core, config: dict[str, Any], add_bos: bool, add_eos: bool) -> None:
    """What stands around a text, as a post-processor."""
    bos = config.get("bos_token") if add_bos else None
    eos = config.get("eos_token") if add_eos else None
    if bos is None and eos is None:
        return
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    core.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(t, core.token_to_id(t)) for t in dict.fromkeys((bos, eos)) if t],
    )


def byte_spelling() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]
