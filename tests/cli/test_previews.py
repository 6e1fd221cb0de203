"""Previews of rows with images and of rows with tools: as the trainer reads them."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import tiny
from sighted import pair, picture
from topwork import DPOTrainer, GRPOConfig, GRPOTrainer, SelfDistillationTrainer
from topwork.cli.main import app
from topwork.errors import ConfigError, DataError
from topwork.objectives.registry import OBJECTIVES
from topwork.text.tools import get_json_schema

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if m.tool_calls %}<tool_call>{{ m.tool_calls[0]['function'] | tojson }}</tool_call>"
    "{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
ADD = '''def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: one
        b: other
    """
    return a + b
'''


def shown(*words):
    result = CliRunner().invoke(app, ["preview", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def written(home, rows):
    path = home / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A checkpoint that reads images, without its weights: a preview needs none."""
    home = tmp_path_factory.mktemp("seeing")
    made = pair("llava")
    (home / "config.json").write_text(json.dumps(made.model.config.to_dict()))
    made.processor.save_pretrained(home)
    picture(16, 16).save(home / "a.png")
    return home


@pytest.fixture(scope="module")
def calling(tmp_path_factory):
    home = tmp_path_factory.mktemp("calling")
    (home / "config.json").write_text(json.dumps(tiny.model().config.to_dict()))
    tiny.tokenizer(TEMPLATE).save_pretrained(home)
    return home


def illustrated(home, objective):
    asked = [{"role": "user", "content": "what is it?"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("a dog", "no"))
    images = [str(home / "a.png")]
    if objective in ("sft", "distill"):
        return [{"messages": [*asked, *good], "images": images}] * 2
    if objective == "kto":
        return [{"prompt": asked, "completion": good, "label": i == 0, "images": images}
                for i in range(2)]  # fmt: skip
    return [{"prompt": asked, "chosen": good, "rejected": bad, "images": images}] * 2


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto", "orpo", "cpo"])
def test_rows_with_images_show_each_image_with_its_size_and_tokens(seeing, tmp_path, objective):
    rows = written(tmp_path, illustrated(seeing, objective))
    common = ("--model", seeing, "--data", rows, "--objective", objective)
    more = ("--prompt_nll", "false") if objective == "orpo" else ()
    text = shown(*common, *more)
    assert "images: 2 in 2 rows" in text
    assert "[image 16x16, 16 tokens]" in text
    assert "a dog" in text
    assert "<image>" not in text


def test_a_preview_refuses_what_the_trainer_refuses(seeing, tmp_path):
    rows = written(tmp_path, illustrated(seeing, "orpo"))
    common = ("--model", seeing, "--data", rows)
    with pytest.raises(ConfigError, match="prompt_nll=True trains prompts"):
        shown(*common, "--objective", "orpo")
    with pytest.raises(DataError, match="row 0: it has 1 images, which nothing reads here"):
        shown(*common, "--objective", "reward")
    rows = written(tmp_path, illustrated(seeing, "distill"))
    with pytest.raises(DataError, match="row 0: it has 1 images, which nothing reads here"):
        shown("--model", seeing, "--data", rows, "--objective", "uld")
    with pytest.raises(ConfigError, match="neftune_noise_alpha does not go with images"):
        shown(*common, "--objective", "sft", "--neftune_noise_alpha", 5)


def with_tools(objective):
    schema = {"type": "function", "function": {
        "name": "look_up", "description": "Looks up.", "parameters": {"type": "object",
        "properties": {"word": {"type": "string", "description": "a word"}}}}}  # fmt: skip
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "otter"}}}
    asked = [{"role": "user", "content": "otter?"}]
    good = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    bad = [{"role": "assistant", "content": "no idea"}]
    if objective in ("sft", "distill", "gkd", "server_distill", "iw_opd", "uld", "gold"):
        return [{"messages": [*asked, *good], "tools": [schema]}]
    if objective == "kto":
        return [{"prompt": asked, "completion": good, "label": True, "tools": [schema]}]
    if objective == "tpo":
        best = [{"role": "assistant", "content": "an animal"}]
        return [{"prompt": asked, "chosen": good, "rejected": bad, "reference": best,
                 "tools": [schema]}]  # fmt: skip
    if objective in ("dpo", "orpo", "cpo", "reward"):
        return [{"prompt": asked, "chosen": good, "rejected": bad, "tools": [schema]}]
    return [{"prompt": asked, "tools": [schema], "privileged_context": "an animal"}]


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "prm"])
def test_rows_with_tools_show_them_as_the_template_tells_the_model(calling, tmp_path, objective):
    rows = written(tmp_path, with_tools(objective))
    text = shown("--model", calling, "--data", rows, "--objective", objective)
    assert '"name": "look_up"' in text
    if objective in ("sft", "dpo"):
        assert '<tool_call>{"name": "look_up"' in text.replace("\n", "")


@pytest.mark.parametrize("objective", ["grpo", "rloo", "ppo", "online_dpo"])
def test_the_tools_of_a_run_are_shown_with_its_prompts(calling, tmp_path, objective):
    (tmp_path / "tools.py").write_text(ADD)
    rows = written(tmp_path, [{"prompt": [{"role": "user", "content": "1+1?"}]}])
    common = ("--model", calling, "--data", rows, "--objective", objective)
    text = shown(*common, "--tools", f"{tmp_path}/tools.py:add")
    space = {}
    exec(ADD, space)
    wanted = tiny.tokenizer(TEMPLATE).apply_chat_template(
        [{"role": "user", "content": "1+1?"}], tools=[get_json_schema(space["add"])],
        add_generation_prompt=True, tokenize=False,
    )  # fmt: skip
    assert wanted.strip() in text
    with pytest.raises(ConfigError, match="nearest: 'add'"):
        shown(*common, "--tools", f"{tmp_path}/tools.py:ad")


def test_the_trainers_notes_show_one_prompt_as_the_model_reads_it(tmp_path):
    space = {}
    exec(ADD, space)
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2)
    trainer = GRPOTrainer(
        tiny.model(), lambda completions, **_: [0.0] * len(completions), args,
        [{"prompt": [{"role": "user", "content": "1+1?"}]}],
        processing_class=tiny.tokenizer(TEMPLATE), tools=[space["add"]],
    )  # fmt: skip
    assert trainer.notes[-2] == "row 0, as the model reads it:"
    assert '"name": "add"' in trainer.notes[-1]
    advised = SelfDistillationTrainer(
        tiny.model(), train_dataset=[{"prompt": "ask", "privileged_context": "it is 7"}],
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    assert advised.notes[-2] == "  ask"
    assert "it is 7" in advised.notes[-1]


def test_the_notes_of_rows_with_images_show_them(tmp_path, seeing):
    made = pair("llava")
    trainer = DPOTrainer(
        made.model, train_dataset=illustrated(seeing, "dpo"), processing_class=made.processor
    )
    assert any("[image 16x16, 16 tokens]" in line for line in trainer.notes)
