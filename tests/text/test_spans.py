"""Role spans against the formats written out by hand, on random chats full of traps."""

from __future__ import annotations

import random
import time

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Core
from transformers import PreTrainedTokenizerFast

from chat_formats import CHATML, FORMATS, ONCE, PHI3, SPECIALS, Format
from topwork.errors import ConfigError
from topwork.text import Tokenizer
from topwork.text.spans import render_spans, render_spans_batch
from topwork.text.template import TemplateError

WORDS = [
    "Hello", "there", "x1", "y2", "1", "é🙂", "東京", "the answer", "user", "assistant\n", "\n",
    "{{ 1 }}", "### user:\n", "zz", "def f(x):\n    return x",
]  # fmt: skip
CORPUS = ["The answer to the question is 42.", "assistant user system", "def f(x):\n    return x"]


def tokenizer_for(form, kind="bytes", strips=()):
    if kind == "bytes":
        core = Core(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.post_processor = processors.ByteLevel(trim_offsets=True)
        trainer = trainers.BpeTrainer(
            vocab_size=400, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
    else:
        core = Core(models.BPE(byte_fallback=True, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        core.decoder = decoders.Metaspace(prepend_scheme="never")
        pieces = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            show_progress=False,
            special_tokens=["<unk>", *pieces],
            initial_alphabet=list(" \nabcdefghijklmnopqrstuvwxyz"),
        )
    core.train_from_iterator(CORPUS * 4, trainer)
    core.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=t in strips) for t in SPECIALS]
    )
    config = {"bos_token": form.bos, "eos_token": form.eos, "chat_template": form.template}
    return Tokenizer(core, config)


def random_text(rng, specials=True):
    pool = WORDS + (["<|im_end|>", "</s>", "[/INST]", "<|end|>"] if specials else [])
    joined = rng.choice([" ", "", "\n"]).join(rng.choices(pool, k=rng.randint(0, 6)))
    return rng.choice(["", "", " ", "\n"]) + joined + rng.choice(["", "", " ", "\n\n"])


def random_call(rng):
    value = rng.choice([3, True, "x1", 'a "quote"', "<|im_end|>", None, {"in": ["side"]}])
    arguments = {f"a{k}": value for k in range(rng.randint(0, 2))}
    return {"type": "function", "function": {"name": rng.choice("fg"), "arguments": arguments}}


def random_chat(form, rng):
    chat = [{"role": "system", "content": random_text(rng)}] if form.system else []
    chat = chat if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 4)):
        chat.append({"role": "user", "content": random_text(rng)})
        if form.tools and rng.random() < 0.5:
            for _ in range(rng.randint(1, 2)):
                chat.append({"role": "assistant", "content": rng.choice(["", "Let me see."])})
                chat[-1]["tool_calls"] = [random_call(rng) for _ in range(rng.randint(1, 2))]
                if form.name.startswith("qwen3") and rng.random() < 0.5:
                    chat[-1]["reasoning_content"] = "I need it"
                chat += [{"role": "tool", "content": "42"}] * rng.randint(1, 2)
        if not form.alternates and rng.random() < 0.1:
            chat.append(dict(chat[-1]) | {"role": "user", "content": "again"})
        answer = {"role": "assistant", "content": random_text(rng)}
        if form.name.startswith("qwen3") and rng.random() < 0.5:
            answer["content"] = "<think>\nhm x1\n</think>\n\n" + answer["content"].strip()
        if form.name == "channels" and rng.random() < 0.5:
            answer["thinking"] = "hm x1"
        chat.append(answer)
        if rng.random() < 0.1 and not form.alternates:
            chat.append({"role": "assistant", "content": chat[-1]["content"]})
    return chat


def by_hand(tokenizer, pieces):
    """The ids of the pieces' text, and for each token whether it lies in a trained piece."""
    text = "".join(piece for piece, _ in pieces)
    mine = [own for piece, own in pieces for _ in piece]
    bare = Core.from_str(tokenizer.core.to_str())
    bare.post_processor = None
    encoded = bare.encode(text, add_special_tokens=False)
    trained = [mine[begin] if begin < end else False for begin, end in encoded.offsets]
    straddles = any(
        mine[begin] != mine[begin:end][-1] for begin, end in encoded.offsets if begin < end
    )
    return text, encoded.ids, trained, straddles


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_turns_are_those_of_the_format_written_by_hand(form, kind):
    tokenizer, rng = tokenizer_for(form, kind), random.Random(form.name)
    tools = [{"name": "f"}]
    sure = 0
    for n in range(60):
        chat = random_chat(form, rng)
        options = {"tools": tools} if form.tools and n % 2 else {}
        pieces = form.write(chat, **options, **form.variables)
        text, ids, trained, straddles = by_hand(tokenizer, pieces)
        if straddles:
            continue
        if form.variables and any(own and piece.startswith("<think>") for piece, own in pieces):
            with pytest.raises(TemplateError, match="does not begin with what the generation"):
                render_spans(tokenizer, chat, **options, **form.variables)
            continue
        found = render_spans(tokenizer, chat, **options, **form.variables)
        sure += 1
        assert found.text == text
        assert found.input_ids == ids
        assert [t.message for t in found.turns] == [
            i for i, m in enumerate(chat) if m["role"] == "assistant"
        ]
        assert [bool(m) for m in found.mask()] == trained, (chat, text)
        for turn in found.turns:
            last = tokenizer.convert_ids_to_tokens(ids[turn.stop - 1])
            assert turn.closed == (turn.terminator is not None)
            if turn.closed:
                assert ids[turn.stop - 1] == turn.terminator
                assert last in SPECIALS
        assert all(t.closed for t in found.turns) or form.name == "once"
    assert sure > (5 if form.variables else 30)


@pytest.mark.parametrize("form", [f for f in FORMATS if f.tags], ids=lambda f: f.name)
def test_turns_equal_the_peers_mask_of_a_template_with_tags(form):
    tokenizer, rng = tokenizer_for(form), random.Random(7)
    theirs = PreTrainedTokenizerFast(tokenizer_object=Core.from_str(tokenizer.core.to_str()))
    theirs.bos_token, theirs.eos_token = form.bos, form.eos
    sure = 0
    for _ in range(30):
        chat = random_chat(form, rng)
        for message in chat:  # the peer loses an answer that is empty, or begins with a break
            message["content"] = "a" + message["content"]
        wanted = theirs.apply_chat_template(
            chat, chat_template=form.tags, return_dict=True, return_assistant_tokens_mask=True
        )
        for source in (form.tags, form.template):
            found = render_spans(tokenizer, chat, chat_template=source)
            assert found.input_ids == wanted["input_ids"]
            assert found.mask() == wanted["assistant_masks"]
        sure += 1
    assert sure == 30


def chatml_tokenizer():
    return tokenizer_for(FORMATS[0])


def test_a_batch_gives_what_each_row_gives_and_names_the_row_that_it_refuses():
    tokenizer, rng = chatml_tokenizer(), random.Random(3)
    chats = [random_chat(FORMATS[0], rng) for _ in range(20)]
    for chat in chats:
        chat[-1]["content"] = "a"
        for message in chat:
            message["content"] = message["content"].lstrip()
    together = render_spans_batch(tokenizer, chats)
    assert together == [render_spans(tokenizer, chat) for chat in chats]
    chats[4] = [{"role": "user"}]
    with pytest.raises(TemplateError, match=r"row 4: the chat template refuses"):
        render_spans_batch(tokenizer, chats)
    refused = {}
    assert render_spans_batch(tokenizer, chats, refused=refused) == together[:4] + together[5:]
    assert list(refused) == [4]


def test_each_row_may_bring_its_own_variables():
    form = next(f for f in FORMATS if f.name == "qwen3")
    tokenizer = tokenizer_for(form)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"tools": None}, {"tools": [{"name": "f"}]}]
    plain, tools = render_spans_batch(tokenizer, [chat, chat], variables=rows)
    assert "<tools>" in tools.text
    assert "<tools>" not in plain.text
    assert tools == render_spans(tokenizer, chat, **rows[1])
    with pytest.raises(ConfigError, match="2 chats, but variables for 1"):
        render_spans_batch(tokenizer, [chat, chat], variables=rows[:1])


def test_a_header_token_that_takes_blanks_along_stays_outside():
    form = Format("phi3", PHI3, lambda m: [])
    tokenizer = tokenizer_for(form, strips=("<|assistant|>", "<|user|>", "<|end|>"))
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "  b"}]
    found = render_spans(tokenizer, [*chat, *chat])
    pieces = [
        tokenizer.convert_ids_to_tokens(found.input_ids[t.start : t.stop]) for t in found.turns
    ]
    assert [[p.strip() for p in piece] for piece in pieces] == [["b", "<|end|>"]] * 2


def test_bos_stands_once_and_training_text_continues_the_inference_text():
    form = FORMATS[2]
    tokenizer = tokenizer_for(form)
    tokenizer.core.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", tokenizer.bos_token_id)],
    )
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = render_spans(tokenizer, chat)
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)
    assert found.input_ids.count(tokenizer.bos_token_id) == 1
    assert found.input_ids[: found.turns[0].start] == prompt
    assert found.input_ids == tokenizer.apply_chat_template(chat)
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id  # the post-processor is back


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
REFUSED = [
    # The message's text stands in the render twice.
    (CHATML + "{{ messages[-1].content }}", [USER, ANSWER], "message 1: the template writes more"),
    # The answer is not written at all.
    ("{% for m in messages %}{{ m.role }}{% endfor %}", [USER, ANSWER], "does not write its cont"),
    # The header of the prompt is not the one of the answer.
    (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'bot: ' }}{% endif %}",
        [USER, ANSWER],
        "message 1: its turn does not begin with what the generation prompt writes",
    ),
    # The prompt's last token and the answer's first one are one token.
    (ONCE, [USER, {"role": "assistant", "content": "\n\nreturn"}], "lies across the turn's start"),
    (CHATML, [USER, {"content": "a"}], "message 1 is not an object with a role"),
]


@pytest.mark.parametrize(("source", "chat", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_certain_is_refused_with_its_reason(source, chat, words):
    tokenizer = tokenizer_for(FORMATS[0])
    tokenizer.core.add_tokens([AddedToken(":\n\n\nreturn", normalized=False)])
    with pytest.raises(TemplateError, match=words):
        render_spans(tokenizer, chat, chat_template=source)


@pytest.mark.parametrize("name", ["chatml", "qwen3"])
def test_ten_thousand_rows_take_seconds(name):
    form = next(f for f in FORMATS if f.name == name)
    tokenizer = tokenizer_for(form)
    chat = [USER, {**ANSWER, "content": "the answer is 42 " * 10}] * 3
    start = time.process_time()
    found = render_spans_batch(tokenizer, [chat] * 1000)
    assert time.process_time() - start < 5  # about 1 s here
    assert len(found) == 1000
