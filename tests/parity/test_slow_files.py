"""vocab.txt, vocab.json + merges.txt and SentencePiece files, where there is no tokenizer.json."""

from __future__ import annotations

import json

import pytest
import sentencepiece
import transformers
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Core

from corpus import TEXTS
from topwork import AutoTokenizer
from topwork.errors import CheckpointError
from topwork.text.languages import LANGUAGES, MBART, MBART50

PAIRS = TEXTS[::-1]
PLAIN = [text for text in TEXTS if "\0" not in text]


def lists(encoded):
    return {key: list(value) for key, value in dict(encoded).items()}


def write_config(folder, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("lower", [True, False])
def test_vocab_txt_equals_the_peer(tmp_path, lower):
    core = Core(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=lower)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, show_progress=False,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    )  # fmt: skip
    core.train_from_iterator(TEXTS, trainer)
    vocab = sorted(core.get_vocab(), key=core.get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n")
    write_config(tmp_path, tokenizer_class="BertTokenizer", do_lower_case=lower)
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    for second in (None, PAIRS):
        assert lists(ours(TEXTS, second)) == lists(theirs(TEXTS, second))
    assert ours.encode("a [MASK] b[SEP]") == theirs.encode("a [MASK] b[SEP]")
    ids = ours.encode(TEXTS[4])
    assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.mask_token_id, ours.pad_token_id) == (theirs.mask_token_id, theirs.pad_token_id)


@pytest.mark.parametrize("kind", ["GPT2", "Roberta", "Bart"])
def test_vocab_json_and_merges_equal_the_peer(tmp_path, kind):
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<|endoftext|>"] if kind == "GPT2" else ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False, special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(TEXTS * 3, trainer)
    core.model.save(str(tmp_path))
    write_config(tmp_path, tokenizer_class=f"{kind}Tokenizer")
    theirs = getattr(transformers, f"{kind}Tokenizer").from_pretrained(tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    for second in (None, PAIRS):
        wanted, found = theirs(TEXTS, second), ours(TEXTS, second)
        assert found["input_ids"] == wanted["input_ids"]
    text = f"a {specials[-1]} b{specials[0]}"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(TEXTS[8]), True) == TEXTS[8]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def pieces(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "corpus.txt").write_text("\n".join(t for t in TEXTS * 3 if "\0" not in t))
    made = {}
    for rule, strips in (("identity", False), ("nmt_nfkc", True)):
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "corpus.txt"), model_prefix=str(folder / rule),
            model_type=request.param, vocab_size=700, byte_fallback=True, minloglevel=2,
            normalization_rule_name=rule, remove_extra_whitespaces=strips,
            character_coverage=0.98, user_defined_symbols=["<sep>"], hard_vocab_limit=False,
        )  # fmt: skip
        path = tmp_path_factory.mktemp(rule) / "tokenizer.model"
        path.write_bytes((folder / f"{rule}.model").read_bytes())
        made[rule] = (sentencepiece.SentencePieceProcessor(model_file=str(path)), path.parent)
    return made


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_sentencepiece_files_give_what_sentencepiece_gives(pieces, rule):
    model, folder = pieces[rule]
    write_config(folder, tokenizer_class="LlamaTokenizer")
    ours = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        if "\0" not in text:
            assert ours.encode(text) == [1, *model.encode(text)], text
    assert ours.encode("a", add_special_tokens=False) == model.encode("a")
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")
    write_config(folder, tokenizer_class="T5Tokenizer", extra_ids=3)
    ours = AutoTokenizer.from_pretrained(folder)
    assert ours.encode("a") == [*model.encode("a"), 2]
    size = model.get_piece_size()
    assert ours.convert_tokens_to_ids(["<extra_id_2>", "<extra_id_0>"]) == [size, size + 2]


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_xlm_robertas_order_is_fairseqs(pieces, rule):
    model, folder = pieces[rule]
    if type(AutoTokenizer.from_pretrained(folder).core.model).__name__ != "Unigram":
        return
    write_config(folder, tokenizer_class="XLMRobertaTokenizer")
    ours = AutoTokenizer.from_pretrained(folder)
    size = model.get_piece_size()

    def ids(text):
        return [3 if i == model.unk_id() else i + 1 for i in model.encode(text)]

    for text in TEXTS:
        if "\0" not in text:
            assert ours.encode(text) == [0, *ids(text), 2], text
    assert ours.encode("a", "b") == [0, *ids("a"), 2, 2, *ids("b"), 2]
    assert ours.mask_token_id == size + 1
    assert (ours.pad_token_id, ours.unk_token_id) == (1, 3)
    (folder / "tokenizer_config.json").unlink()


def test_debertas_pieces_give_what_sentencepiece_gives(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(t for t in TEXTS * 3 if "\0" not in t))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spm"), vocab_size=600,
        normalization_rule_name="nmt_nfkc", hard_vocab_limit=False, minloglevel=2,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]",
        eos_piece="[SEP]", unk_piece="[UNK]",
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    write_config(tmp_path, tokenizer_class="DebertaV2Tokenizer")
    ours = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        found, wanted = ours.encode(text), [1, *model.encode(text), 2]
        if text.startswith("aaaa"):  # several ways to cut it are equally likely
            assert sorted(found) == sorted(wanted)
        elif "\0" not in text:
            assert found == wanted, text
    assert ours.encode("a", "b") == [1, *model.encode("a"), 2, *model.encode("b"), 2]
    assert ours.mask_token_id == model.get_piece_size()
    write_config(tmp_path, tokenizer_class="DebertaV2Tokenizer", split_by_punct=True)
    with pytest.raises(CheckpointError, match="split_by_punct=true"):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("lower", [True, False])
def test_mpnets_vocab_txt_equals_the_peer(tmp_path, lower):
    core = Core(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=lower)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, show_progress=False,
        special_tokens=["<s>", "<pad>", "</s>", "[UNK]", "<mask>"],
    )  # fmt: skip
    core.train_from_iterator(TEXTS, trainer)
    vocab = sorted(core.get_vocab(), key=core.get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n")
    write_config(tmp_path, tokenizer_class="MPNetTokenizer", do_lower_case=lower)
    theirs = transformers.MPNetTokenizer.from_pretrained(tmp_path, do_lower_case=lower)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    for second in (None, PAIRS):
        assert ours(TEXTS, second)["input_ids"] == theirs(TEXTS, second)["input_ids"]
    assert ours.encode("a <mask> b") == theirs.encode("a <mask> b")


def test_added_tokens_keep_their_numbers(pieces):
    model, folder = pieces["identity"]
    size = model.get_piece_size()
    added = {str(size): {"content": "<|im_end|>", "special": True, "normalized": False}}
    write_config(folder, added_tokens_decoder=added, eos_token="<|im_end|>")
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": size + 1}))
    ours = AutoTokenizer.from_pretrained(folder)
    assert ours.eos_token_id == size
    assert ours.encode("a<tool>")[-1] == size + 1
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": size + 7}))
    with pytest.raises(CheckpointError, match=f"'<tool>' is not number {size + 7}"):
        AutoTokenizer.from_pretrained(folder)
    (folder / "added_tokens.json").unlink()


def test_what_cannot_be_built_with_certainty_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xff")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: no SentencePiece model"):
        AutoTokenizer.from_pretrained(tmp_path)
    write_config(tmp_path, tokenizer_class="CamembertTokenizer")
    with pytest.raises(CheckpointError, match="CamembertTokenizer cannot be built"):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def translators(tmp_path_factory):
    """SentencePiece models as mBART's and T5's are: folder of each, by the file's name."""
    folder = tmp_path_factory.mktemp("translators")
    (folder / "corpus.txt").write_text("\n".join(PLAIN * 3))
    kinds = {
        "sentencepiece.bpe.model": {},
        "spiece.model": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    }
    for name, options in kinds.items():
        (folder / name[:5]).mkdir()
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "corpus.txt"), model_prefix=str(folder / "made"), minloglevel=2,
            vocab_size=700, hard_vocab_limit=False, character_coverage=0.98,
            normalization_rule_name="nmt_nfkc", **options,
        )  # fmt: skip
        (folder / "made.model").rename(folder / name[:5] / name)
    return {name: folder / name[:5] for name in kinds}


def disagreeing(ours, theirs, texts):
    return [t for t in texts if ours.encode(t) != theirs.encode(t)]


@pytest.mark.parametrize(("kind", "languages"), [("MBart", MBART), ("MBart50", MBART50)])
def test_mbarts_pieces_stand_in_fairseqs_order_with_languages_behind(translators, kind, languages):
    folder = translators["sentencepiece.bpe.model"]
    model = sentencepiece.SentencePieceProcessor(str(folder / "sentencepiece.bpe.model"))
    write_config(folder, tokenizer_class=f"{kind}Tokenizer", src_lang="ro_RO")
    theirs = getattr(transformers, f"{kind}Tokenizer").from_pretrained(folder)
    ours = AutoTokenizer.from_pretrained(folder)
    size = model.get_piece_size() + 1
    assert ours.convert_tokens_to_ids(languages) == list(range(size, size + len(languages)))
    assert ours.get_vocab() == theirs.get_vocab()
    romanian = size + languages.index("ro_RO")

    def framed(*texts):
        ids = [3 if i == model.unk_id() else i + 1 for text in texts for i in model.encode(text)]
        return [*ids, 2, romanian] if kind == "MBart" else [romanian, *ids, 2]

    assert [ours.encode(text) for text in PLAIN] == [framed(text) for text in PLAIN]
    assert ours.encode("a", "b") == framed("a", "b") == theirs.encode("a", "b")
    assert ours.encode("a <mask> b") == theirs.encode("a <mask> b")
    # The peer leaves mBART's normaliser out, and a blank at the end before mBART-50's end.
    changed = [t for t in PLAIN if model.normalize(t) != " ".join(t.split())]
    ending = [t for t in PLAIN if t.strip() != t]
    odd = disagreeing(ours, theirs, PLAIN)
    assert set(odd) <= set(changed if kind == "MBart" else ending)
    assert len(odd) < 7
    write_config(folder, tokenizer_class=f"{kind}Tokenizer", src_lang="xx_XX")
    with pytest.raises(CheckpointError, match="lacks \\['xx_XX'\\]"):
        AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("extra", [100, 0, 7])
def test_t5s_pieces_and_extra_ids_equal_the_peer(translators, extra):
    folder = translators["spiece.model"]  # mT5's files say extra_ids=0
    write_config(folder, tokenizer_class="T5Tokenizer", extra_ids=extra)
    theirs = transformers.T5Tokenizer.from_pretrained(folder)
    ours = AutoTokenizer.from_pretrained(folder)
    assert ours.get_vocab() == theirs.get_vocab()
    texts = [*PLAIN, "a <extra_id_0> b", "a<extra_id_6>b <extra_id_99></s>"]
    odd = disagreeing(ours, theirs, texts)
    assert odd == [t for t in TEXTS if "\u0085" in t and "\0" not in t]
    for second in (None, PAIRS):
        wanted, found = theirs(TEXTS, second), ours(TEXTS, second)
        same = [a == b for a, b in zip(found["input_ids"], wanted["input_ids"])]
        assert same.count(False) <= 2
    assert ours.decode(ours.encode(TEXTS[4]), True) == theirs.decode(theirs.encode(TEXTS[4]), True)
    assert (ours.pad_token_id, ours.eos_token_id, ours.unk_token_id) == (0, 1, 2)
    model = sentencepiece.SentencePieceProcessor(str(folder / "spiece.model"))
    assert [ours.encode(t) for t in TEXTS] == [[*model.encode(t), 1] for t in TEXTS]


def test_clips_words_equal_the_peer(tmp_path):
    core = Core(models.BPE(end_of_word_suffix="</w>"))
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False)])
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(TEXTS * 3, trainer)
    core.model.save(str(tmp_path))
    write_config(tmp_path, tokenizer_class="CLIPTokenizer")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    for second in (None, PAIRS):
        assert lists(ours(TEXTS, second)) == lists(theirs(TEXTS, second))
    assert ours.encode("A <|endoftext|> b") == theirs.encode("A <|endoftext|> b")
    assert ours.special_tokens_map == theirs.special_tokens_map
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    saved = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("theirs", "ours")]
    for text in TEXTS:
        ids = theirs.encode(text)
        for skip in (True, False):
            wanted = theirs.decode(ids, skip_special_tokens=skip)
            assert [t.decode(ids, skip) for t in (ours, *saved)] == [wanted] * 3
        assert [t.encode(text) for t in saved] == [ids] * 2


@pytest.mark.parametrize("legacy", [True, False])
def test_whispers_vocab_json_and_merges_equal_the_peer(tmp_path, legacy):
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, initial_alphabet=alphabet)
    core.train_from_iterator(TEXTS * 3, trainer)
    core.model.save(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    vocab["<|endoftext|>"] = end = len(vocab)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    tasks = ["translate", "transcribe", "startoflm", "startofprev", "nocaptions", "notimestamps"]
    names = [f"<|{name}|>" for name in ("startoftranscript", *LANGUAGES, *tasks)]
    numbers = {name: end + 1 + i for i, name in enumerate(names)}
    config = {"tokenizer_class": "WhisperTokenizer", "model_max_length": 448}
    if legacy:
        (tmp_path / "added_tokens.json").write_text(json.dumps(numbers))
        config["additional_special_tokens"] = names
    else:
        config["added_tokens_decoder"] = {
            str(i): {"content": name, "special": True, "normalized": False}
            for name, i in numbers.items()
        }
    write_config(tmp_path, **config)
    theirs = transformers.WhisperTokenizer.from_pretrained(tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    assert len(ours) == len(theirs)
    for language in (None, "german"):
        if language:
            ours.set_prefix_tokens(language, "transcribe")
            theirs.set_prefix_tokens(language, "transcribe")
        for second in (None, PAIRS):
            assert ours(TEXTS, second)["input_ids"] == theirs(TEXTS, second)["input_ids"]
    ids = ours.encode("hi <|de|> there")
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(ids, True) == "hi  there"
    assert ours.all_special_ids == list(range(end, end + 1 + len(names)))
