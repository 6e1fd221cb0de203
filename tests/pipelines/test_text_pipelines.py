"""Text pipelines against transformers' where it still has them, else against the formula."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from topwork import LoraConfig, get_peft_model, pipeline
from topwork.errors import ConfigError, DataError
from topwork.pipelines.factory import TASKS
from topwork.pipelines.question_answering import best
from topwork.text import Tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Paris is the capital of France, and Berlin that of Germany.",
    "Hugging machines learn unbelievably quickly!",
    "Rain.",
    "Ada Lovelace wrote the first program in London; Alan Turing, later, thought of machines.",
]
CONTEXT = " ".join(SENTENCES * 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A wordpiece tokenizer of these sentences."""
    home = tmp_path_factory.mktemp("tokenizer")
    core = Core(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)
    )
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]",
             "sep_token": "[SEP]", "mask_token": "[MASK]"}  # fmt: skip
    Tokenizer(core, {**names, "model_max_length": 64}).save_pretrained(home)
    return home


def make(folder, home, kind, maker, **options):
    """A tiny random model with the tokenizer beside it."""
    sizes = {
        "bert": {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "max_position_embeddings": 64},
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4,
               "decoder_start_token_id": 0, "eos_token_id": 3},
        "llama": {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 2,
                  "eos_token_id": 3},
    }[kind]  # fmt: skip
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=120, pad_token_id=0, **sizes, **options
    )
    model = getattr(transformers, maker).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.2))
    model.save_pretrained(home)
    Tokenizer.from_pretrained(folder).save_pretrained(home)
    return model


def theirs(task, home, **options):
    names = ["input_ids", "attention_mask"]
    if "classification" in task:
        names.append("token_type_ids")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(home, model_input_names=names)
    kind = {"text-classification": "AutoModelForSequenceClassification",
            "zero-shot-classification": "AutoModelForSequenceClassification",
            "token-classification": "AutoModelForTokenClassification",
            "fill-mask": "AutoModelForMaskedLM", "feature-extraction": "AutoModel",
            "text-generation": "AutoModelForCausalLM"}[task]  # fmt: skip
    model = getattr(transformers, kind).from_pretrained(home)
    return transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu", **options)


def same(found, wanted):
    """Equal, numbers to 1e-5."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            same(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for pair in zip(found, wanted):
            same(*pair)
    elif isinstance(wanted, (float, np.floating)):
        assert math.isclose(found, wanted, rel_tol=1e-4, abs_tol=1e-5)
    else:
        assert found == wanted


def without_blanks(results):
    """The peer decodes new tokens alone and loses what joins them to the prompt; ours keeps it."""
    if isinstance(results, list):
        return [without_blanks(r) for r in results]
    if isinstance(results, dict):
        return {k: without_blanks(v) for k, v in results.items()}
    return results.replace(" ", "").replace("##", "")


LABELS = {
    "id2label": {0: "bad", 1: "fair", 2: "good"},
    "label2id": {"bad": 0, "fair": 1, "good": 2},
}


@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
def test_text_classification_equals_the_peer(folder, tmp_path, problem):
    make(
        folder,
        tmp_path,
        "bert",
        "AutoModelForSequenceClassification",
        problem_type=problem,
        **LABELS,
    )
    ours, peers = pipeline("sentiment-analysis", tmp_path), theirs("text-classification", tmp_path)
    same(ours(SENTENCES[0]), peers(SENTENCES[0]))
    same(ours(SENTENCES), peers(SENTENCES))
    for options in ({"top_k": None}, {"top_k": 2}, {"top_k": 1}, {"function_to_apply": "sigmoid"}):
        same(ours(SENTENCES, **options), peers(SENTENCES, **options))
    pair = {"text": SENTENCES[0], "text_pair": SENTENCES[1]}
    same(ours(pair), peers(pair))
    same(ours([pair, pair]), peers([pair, pair]))


def test_zero_shot_equals_the_peer(folder, tmp_path):
    names = {"id2label": {0: "contradiction", 1: "neutral", 2: "entailment"},
             "label2id": {"contradiction": 0, "neutral": 1, "entailment": 2}}  # fmt: skip
    make(folder, tmp_path, "bert", "AutoModelForSequenceClassification", **names)
    ours, peers = (f("zero-shot-classification", tmp_path) for f in (pipeline, theirs))
    same(ours(SENTENCES[0], ["fox", "rain"]), peers(SENTENCES[0], ["fox", "rain"]))
    for options in ({"multi_label": True}, {"hypothesis_template": "of {}!"}, {}):
        wanted = peers(SENTENCES, candidate_labels="fox, rain, capital", **options)
        same(ours(SENTENCES, candidate_labels="fox, rain, capital", **options), wanted)


KINDS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
NER = {"id2label": dict(enumerate(KINDS)), "label2id": {n: i for i, n in enumerate(KINDS)}}


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_token_classification_equals_the_peer(folder, tmp_path, strategy):
    make(folder, tmp_path, "bert", "AutoModelForTokenClassification", **NER)
    ours, peers = pipeline("ner", tmp_path), theirs("token-classification", tmp_path)
    for labels in (["O"], ["PER", "B-PER"]):
        options = {"aggregation_strategy": strategy, "ignore_labels": labels}
        found, wanted = ours(SENTENCES, **options), peers(SENTENCES, **options)
        same(found, wanted)
        same(ours(SENTENCES[1], **options), wanted[1])


def test_long_texts_are_read_in_parts_as_the_peer_does(folder, tmp_path):
    make(folder, tmp_path, "bert", "AutoModelForTokenClassification", **NER)
    ours = pipeline("ner", tmp_path)
    for strategy in ("simple", "average"):
        peers = theirs("token-classification", tmp_path, stride=10, aggregation_strategy=strategy)
        same(ours(CONTEXT, stride=10, aggregation_strategy=strategy), peers(CONTEXT))


def test_fill_mask_equals_the_peer(folder, tmp_path):
    make(folder, tmp_path, "bert", "AutoModelForMaskedLM")
    ours, peers = pipeline("fill-mask", tmp_path), theirs("fill-mask", tmp_path)
    texts = ["The quick [MASK] fox.", "Paris is the capital of [MASK]."]
    same(ours(texts[0]), peers(texts[0]))
    same(ours(texts, top_k=3), peers(texts, top_k=3))
    same(ours(texts[0], targets=["fox", "dog"]), peers(texts[0], targets=["fox", "dog"]))
    same(ours("[MASK] and [MASK]", top_k=2), peers("[MASK] and [MASK]", top_k=2))


def test_features_equal_the_peer_and_embeddings_their_formula(folder, tmp_path):
    make(folder, tmp_path, "bert", "AutoModel")
    ours, peers = pipeline("feature-extraction", tmp_path), theirs("feature-extraction", tmp_path)
    same(ours(SENTENCES[0]), peers(SENTENCES[0]))
    same(ours(SENTENCES), peers(SENTENCES))
    rows = [np.array(peers(s)[0]) for s in SENTENCES]
    unit = [r.mean(0) / np.linalg.norm(r.mean(0)) for r in rows]
    same(ours.embed(SENTENCES).tolist(), [r.tolist() for r in unit])
    same(ours(SENTENCES, pooling="cls"), [r[0].tolist() for r in rows])


def test_text_generation_equals_the_peer(folder, tmp_path):
    make(folder, tmp_path, "llama", "AutoModelForCausalLM")
    ours, peers = (f("text-generation", tmp_path) for f in (pipeline, theirs))
    texts = [s.lower().rstrip(".") for s in SENTENCES[:3]]
    options = {"do_sample": False, "max_new_tokens": 6}
    same(without_blanks(ours(texts[0], **options)), without_blanks(peers(texts[0], **options)))
    same(without_blanks(ours(texts, **options)), without_blanks(peers(texts, **options)))
    shorter = {**options, "return_full_text": False, "num_beams": 3, "num_return_sequences": 2}
    same(without_blanks(ours(texts[1], **shorter)), without_blanks(peers(texts[1], **shorter)))
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    for pipe in (ours, peers):
        pipe.tokenizer.chat_template = template
    chat = [{"role": "user", "content": "the quick fox"}]
    same(without_blanks(ours(chat, **options)), without_blanks(peers(chat, **options)))
    same(
        without_blanks(ours([chat, chat], **options)),
        without_blanks(peers([chat, chat], **options)),
    )
    begun = [*chat, {"role": "assistant", "content": "over the"}]
    assert ours(begun, **options)[0]["generated_text"][-1]["content"].startswith("over the")
    assert isinstance(ours(chat, return_full_text=False, **options)[0]["generated_text"], str)
    torch.manual_seed(0)
    assert len(ours(texts[0], max_new_tokens=3, num_return_sequences=2)) == 2


SPECIAL = {
    "summarization": {"prefix": "over the ", "max_length": 9, "num_beams": 2},
    "translation_en_to_de": {"prefix": "the quick ", "max_length": 7},
}


@pytest.mark.parametrize(
    ("task", "key"),
    [("summarization", "summary_text"), ("translation_en_to_de", "translation_text"),
     ("text2text-generation", "generated_text"), ("translation", "translation_text")],
)  # fmt: skip
def test_texts_become_what_the_model_generates_for_them(folder, tmp_path, task, key):
    """The peer has no such pipelines any more: prefix, generate, decode."""
    model = make(folder, tmp_path, "t5", "AutoModelForSeq2SeqLM", task_specific_params=SPECIAL)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    options = copy.deepcopy(SPECIAL.get(task, {"max_new_tokens": 5}))
    prefix, wanted = options.pop("prefix", ""), []
    for sentence in SENTENCES:
        ids = torch.tensor([tokenizer.encode(prefix + sentence)])
        out = model.generate(ids, do_sample=False, **options)
        wanted.append({key: tokenizer.decode(out[0], skip_special_tokens=True)})
    ours = pipeline(task, tmp_path)
    given = {} if task in SPECIAL else {"max_new_tokens": 5}
    assert ours(SENTENCES, **given) == wanted
    assert ours(SENTENCES[1], **given) == [wanted[1]]
    several = ours(SENTENCES[1], num_beams=3, num_return_sequences=2, max_new_tokens=4)
    assert len(several) == 2


def test_answers_follow_the_formula_over_all_parts(folder, tmp_path):
    make(folder, tmp_path, "bert", "AutoModelForQuestionAnswering")
    ours = pipeline("question-answering", tmp_path)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path).eval()
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    question, found = "the capital of france", []
    parts = fast(question, CONTEXT, truncation="only_second", max_length=64, stride=32,
                 return_overflowing_tokens=True)  # fmt: skip
    nothing = 1.0
    for i, ids in enumerate(parts["input_ids"]):
        types = [s or 0 for s in parts.sequence_ids(i)]
        types[-1] = 1
        with torch.no_grad():
            out = model(torch.tensor([ids]), token_type_ids=torch.tensor([types]))
        inside = [s == 1 for s in parts.sequence_ids(i)]
        open_ = torch.tensor([j == 0 or inside[j] for j in range(len(ids))])
        sides = [logits[0].masked_fill(~open_, -1e4).softmax(0).double().numpy()
                 for logits in (out.start_logits, out.end_logits)]  # fmt: skip
        nothing = min(nothing, float(sides[0][0] * sides[1][0]))
        for first in range(1, len(ids)):
            for last in range(first, min(len(ids), first + 4)):
                if inside[first] and inside[last]:
                    words = [parts[i].token_to_word(t) for t in (first, last)]
                    start = parts[i].word_to_chars(words[0], 1)[0]
                    end = parts[i].word_to_chars(words[1], 1)[1]
                    found.append((float(sides[0][first] * sides[1][last]), start, end))
    score, start, end = max(found)
    answer = ours(question=question, context=CONTEXT, max_answer_len=4)
    assert len(parts["input_ids"]) > 2
    same(answer, {"score": score, "start": start, "end": end, "answer": CONTEXT[start:end]})
    options = {"top_k": 3, "handle_impossible_answer": True, "max_answer_len": 4}
    several = ours({"question": question, "context": CONTEXT}, **options)
    assert len(several) == 3
    assert [a["score"] for a in several] == sorted((a["score"] for a in several), reverse=True)
    both = ours(question=[question, "fox"], context=[CONTEXT, SENTENCES[0]], max_answer_len=4)
    same(both[0], answer)
    everything = ours({"question": question, "context": SENTENCES[3]}, top_k=50,
                      handle_impossible_answer=True)  # fmt: skip
    assert any(a["answer"] == "" for a in everything)


def test_the_best_span_is_not_longer_than_allowed():
    start, end = np.array([0.1, 0.6, 0.3]), np.array([0.2, 0.1, 0.7])
    allowed = np.array([True, True, True])
    assert best(start, end, 3, 1, allowed)[0][:2] == (1, 2)
    assert best(start, end, 1, 1, allowed)[0][:2] == (2, 2)
    assert best(start, end, 3, 1, np.array([True, False, True]))[0][:2] == (2, 2)


def test_generators_and_batches_keep_the_order(folder, tmp_path):
    make(folder, tmp_path, "bert", "AutoModelForSequenceClassification", **LABELS)
    ours = pipeline("text-classification", tmp_path)
    wanted = [ours(s)[0] for s in SENTENCES]
    stream = ours(s for s in SENTENCES)
    assert not isinstance(stream, list)
    same(list(stream), wanted)
    for size in (1, 2, 100):
        same(pipeline("text-classification", tmp_path, batch_size=size)(SENTENCES), wanted)
    same(ours(tuple(SENTENCES)), wanted)
    assert ours([]) == []


def test_adapters_are_loaded_and_switched(folder, tmp_path):
    from topwork import AutoModelForSequenceClassification

    make(folder, tmp_path / "base", "bert", "AutoModelForSequenceClassification", **LABELS)
    wanted = {}
    for i, name in enumerate(("one", "two")):
        torch.manual_seed(i)
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        adapted = get_peft_model(base, LoraConfig(
            target_modules=["query", "value"], init_lora_weights=False,
            modules_to_save=["classifier"]))  # fmt: skip
        adapted.save_pretrained(tmp_path / name)
        pipe = pipeline("text-classification", adapted, Tokenizer.from_pretrained(folder))
        wanted[name] = pipe(SENTENCES)
    plain = pipeline("text-classification", tmp_path / "base")(SENTENCES)
    ours = pipeline("text-classification", tmp_path / "base",
                    adapter={n: tmp_path / n for n in wanted})  # fmt: skip
    assert ours.adapters == ["one", "two"]
    for name in ("one", "two", "one"):
        same(ours(SENTENCES, adapter=name), wanted[name])
    assert plain != wanted["one"] != wanted["two"]
    single = pipeline("text-classification", tmp_path / "base", adapter=tmp_path / "two")
    same(single(SENTENCES), wanted["two"])
    with pytest.raises(ConfigError, match="nearest: 'one'"):
        ours.set_adapter("onee")


def test_bad_calls_say_what_is_wrong(folder, tmp_path):
    model = make(folder, tmp_path, "bert", "AutoModelForSequenceClassification", **LABELS)
    ours = pipeline("text-classification", tmp_path)
    zero_shot = pipeline("zero-shot-classification", tmp_path)
    cases = [
        (lambda: pipeline("text-clasification", tmp_path), ConfigError, "nearest: 'text-class"),
        (lambda: pipeline("summarization", tmp_path), ConfigError, "no model for seq2seq-lm"),
        (lambda: pipeline("fill-mask", ours.model, ours.tokenizer), ConfigError, "ForMaskedLM"),
        (lambda: pipeline("text-classification", model), ConfigError, "tokenizer"),
        (lambda: ours(""), DataError, "input 0 is empty"),
        (lambda: ours(["fox", "  "]), DataError, "input 1 is empty"),
        (lambda: ours(["fox", 3]), DataError, "input 1 is int"),
        (lambda: ours(7), DataError, "got int"),
        (lambda: ours(CONTEXT), DataError, "truncation=True"),
        (lambda: ours("fox", topk=2), ConfigError, "nearest: 'top_k'"),
        (lambda: ours("fox", function_to_apply="softmx"), ConfigError, "nearest: 'softmax'"),
        (lambda: ours([{"text": "a", "text_pair": "b"}, "c"]), DataError, "input 1"),
        (lambda: ours("fox", adapter="x"), ConfigError, "no adapter 'x'"),
        (lambda: zero_shot("fox", ["a"]), ConfigError, "entail"),
        (lambda: pipeline("ner", tmp_path, batch_size=0), ConfigError, "batch_size=0"),
    ]  # fmt: skip
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
    assert len(ours(CONTEXT, truncation=True)) == 1


def test_each_task_has_a_default_that_the_docs_name():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    for task, (_, usual) in TASKS.items():
        assert f"`{task}`" in text
        assert usual in text
