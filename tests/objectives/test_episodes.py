"""Answers of several turns, by policies that say what a script tells them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import tiny
from topwork import GRPOConfig, GRPOTrainer, LoraConfig, PPOConfig, PPOTrainer
from topwork.errors import ConfigError, DataError, TrainingError
from topwork.objectives.draws import Drawn, collate_answers
from topwork.objectives.episodes import set_stage
from topwork.objectives.rollouts import Answer, read_prompts

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER = tiny.tokenizer(TEMPLATE)
ROWS = [{"prompt": [{"role": "user", "content": f"add {i}"}], "goal": i} for i in range(4)]
OPTIONS = {
    "per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 200,
    "max_steps": 1, "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no",
}  # fmt: skip


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The one.
        b: The other.
    """
    return a + b


class Counter:
    """An environment: count up to a goal."""

    def reset(self, goal, **_):
        self.goal, self.at = goal, 0
        return f" up to {goal}"

    def step(self, by: int) -> str:
        """Go on.

        Args:
            by: How far.
        """
        self.at += by
        return f"at {self.at}"

    def get_reward(self):
        return float(self.at == self.goal)


class Script:
    """Writes `lines[k]` as turn k of each text; remembers what it was given."""

    def __init__(self, *lines):
        self.lines, self.seen = lines, []

    def follow(self, model, step):
        pass

    def write(self, model, texts, limits, seeds):
        turn = len(self.seen)
        self.seen.append([TOKENIZER.decode(list(t)) for t in texts])
        found = []
        for i, limit in enumerate(limits):
            line = self.lines[turn]
            line = line[i % len(line)] if isinstance(line, list) else line
            ids = [*TOKENIZER(line)["input_ids"], 2]
            found.append(Answer(ids[:limit], len(ids) <= limit, [-1.0] * len(ids[:limit])))
        return found


def play(script, tools=(), factory=None, count=1, rounds=None, limit=400, rows=ROWS[:1]):
    stage = set_stage(TOKENIZER, tools, factory, rounds)
    prompts, _ = read_prompts(rows, TOKENIZER, None, stage.schemas)
    return stage.play(script, None, prompts, count, limit)


def test_a_tools_result_stands_in_the_text_and_is_not_trained():
    script = Script("let me see " + call("add", a=2, b=3), "it is 5")
    ((answer,),) = play(script, [add])
    text = TOKENIZER.decode(answer.ids)
    assert text == (
        f"let me see {call('add', a=2, b=3)}<|im_end|>\n<|im_start|>tool\n5<|im_end|>\n"
        "<|im_start|>assistant\nit is 5<|im_end|>"
    )
    own = TOKENIZER.decode([i for i, o in zip(answer.ids, answer.own) if o])
    assert own == f"let me see {call('add', a=2, b=3)}<|im_end|>it is 5<|im_end|>"
    assert [m["role"] for m in answer.messages] == ["assistant", "tool", "assistant"]
    assert answer.messages[0]["content"] == "let me see"
    assert answer.messages[1] == {"role": "tool", "name": "add", "content": "5"}
    assert (answer.ended, answer.calls, answer.failures) == (True, 1, 0)
    assert all(math.isnan(p) != o for p, o in zip(answer.logprobs, answer.own))
    # the second turn was asked for what the template writes of the whole conversation
    whole = [*ROWS[0]["prompt"], answer.messages[0], answer.messages[1]]
    schemas = set_stage(TOKENIZER, [add], None, None).schemas({}, 0)
    rendered = TOKENIZER.apply_chat_template(
        whole, tools=schemas, add_generation_prompt=True, tokenize=False
    )
    kept = script.seen[1][0].replace("let me see " + call("add", a=2, b=3), "…")
    assert kept == rendered.replace(
        'let me see<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>', "…"
    )
    assert '"description": "Add two numbers."' in script.seen[0][0]


def test_what_a_tool_raises_is_told_to_the_policy():
    said = call("add", a=1) + call("ad", a=1, b=2) + "<tool_call>{</tool_call>"
    ((answer,),) = play(Script(said, "sorry"), [add])
    errors = [m["content"] for m in answer.messages if m["role"] == "tool"]
    assert "missing 1 required positional argument: 'b'" in errors[0]
    assert "no tool 'ad'; nearest: 'add'" in errors[1]
    assert "no JSON" in errors[2]
    assert (answer.calls, answer.failures) == (3, 3)


def test_async_tools_are_awaited_and_results_are_json():
    async def find(word: str) -> dict:
        """Look a word up.

        Args:
            word: Which.
        """
        return {"word": word, "n": [1, 2]}

    ((answer,),) = play(Script(call("find", word="a"), "ok"), [find])
    assert json.loads(answer.messages[1]["content"]) == {"word": "a", "n": [1, 2]}


def test_each_answer_has_its_own_environment():
    script = Script([call("step", by=1), call("step", by=2)], ["done", call("step", by=5)], "end")
    rows = [{**ROWS[3]}]
    ((one, two),) = play(script, factory=Counter, count=2, rows=rows)
    assert one.environment is not two.environment
    assert [m["content"] for m in one.messages if m["role"] == "tool"] == ["at 1"]
    assert [m["content"] for m in two.messages if m["role"] == "tool"] == ["at 2", "at 7"]
    assert "add 3 up to 3<|im_end|>" in script.seen[0][0]
    assert np.array_equal(one.prompt, TOKENIZER(script.seen[0][0])["input_ids"])


def test_environments_are_used_again_and_reset():
    made = []

    class Watched(Counter):
        def __init__(self):
            made.append(self)

    stage = set_stage(TOKENIZER, (), Watched, None)
    prompts, _ = read_prompts(ROWS[:2], TOKENIZER, None, stage.schemas)
    for _ in range(3):
        stage.play(Script(call("step", by=1), "x"), None, prompts, 2, 400)
    assert len(made) == 4
    assert all(e.at == 1 for e in made)


def test_rows_name_their_environment():
    class Other(Counter):
        def leap(self) -> str:
            """Leap."""
            return "far"

    factory = {"count": Counter, "other": Other}
    rows = [{**ROWS[0], "environment": "other"}, {**ROWS[1], "environment": "count"}]
    script = Script([call("leap"), call("leap")], "x")
    (one,), (two,) = play(script, factory=factory, rows=rows)
    assert one.messages[1]["content"] == "far"
    assert "no tool 'leap'" in two.messages[1]["content"]
    with pytest.raises(ConfigError, match="environment='cuont'; nearest: 'count'"):
        play(script, factory=factory, rows=[{**ROWS[0], "environment": "cuont"}])


def test_calls_and_length_are_limited():
    calls = Script(*[call("add", a=1, b=1)] * 3)
    ((answer,),) = play(calls, [add], rounds=2)
    assert answer.ended
    assert answer.calls == 2
    size = len(call("add", a=1, b=1)) + 1
    ((answer,),) = play(Script(call("add", a=1, b=1)), [add], limit=size + 10)
    assert not answer.ended  # what the tool says has no room
    assert len(answer.ids) == size
    ((answer,),) = play(Script(call("add", a=1, b=1)), [add], limit=5)
    assert (answer.calls, len(answer.ids), answer.ended) == (0, 5, False)


def test_prompts_that_differ_are_computed_apart():
    prompt = read_prompts(ROWS[:1], TOKENIZER, None)[0][0]
    answers = [
        Answer([5, 6, 2], True, [-0.5] * 3, [True, False, True], np.array(p, np.int32))
        for p in ([7, 8], [7, 8], [9])
    ]
    batch, sampled = collate_answers(
        [Drawn(prompt, answers, torch.zeros(3, 1))], torch.device("cpu")
    )
    assert batch.lengths == ((2, 3, 3), 4)
    assert batch.targets.tolist() == [5, 2] * 3
    assert batch.owners.tolist() == [0, 0, 1, 1, 2, 2]
    assert sampled.tolist() == [-0.5] * 6


@pytest.mark.parametrize(("kind", "config"), [(GRPOTrainer, GRPOConfig), (PPOTrainer, PPOConfig)])
def test_a_run_trains_on_what_the_policy_wrote_alone(tmp_path, kind, config):
    seen = []

    def calls(completions, environments, **_):
        seen.extend(environments)
        return [float(sum(m["role"] == "tool" for m in c)) for c in completions]

    run = kind(
        tiny.model(max_position_embeddings=1024), calls,
        config(output_dir=str(tmp_path), importance_correction="none",
               **{**OPTIONS, "max_completion_length": 400}),
        ROWS, processing_class=TOKENIZER, environment_factory=Counter,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    run.objective.draw.writer = Script([call("step", by=1), call("step", by=0)], ["ok", "well"])
    batches = []
    inner = run.objective.loss
    run.objective.loss = lambda model, batch: batches.append(batch) or inner(model, batch)
    run.train()
    log = run.state.log_history[0]
    assert log["tools/call_frequency"] == 1
    assert log["tools/failure_frequency"] == 0
    assert log["rewards/calls/mean"] == 1
    assert log["rewards/Counter/mean"] == sum(e.at == e.goal for e in seen) / 2
    first, second = call("step", by=1), call("step", by=0)
    trained = TOKENIZER.decode(batches[-1].batch.targets.tolist())
    assert trained == f"{first}<|im_end|>ok<|im_end|>{second}<|im_end|>well<|im_end|>"


def test_environments_of_rounds_in_flight_are_apart(tmp_path):
    def undisturbed(environments, goal, **_):
        return [float(e.goal == g) for e, g in zip(environments, goal)]

    run = GRPOTrainer(
        tiny.model(max_position_embeddings=1024), undisturbed,
        GRPOConfig(output_dir=str(tmp_path), max_staleness=2,
                   **{**OPTIONS, "max_completion_length": 16, "max_steps": 8}),
        ROWS, processing_class=TOKENIZER, environment_factory=Counter,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    run.train()
    assert [e["rewards/undisturbed/mean"] for e in run.state.log_history[:-1]] == [1.0] * 8
    made = [e for stage in run.objective.draw.stages for e in stage.pool[None]]
    assert len({id(e) for e in made}) == len(made) == 8


@pytest.mark.parametrize(
    ("tools", "factory", "template", "error", "words"),
    [
        ([add], None, tiny.CHATML.replace("message['content']", "(message['content'] if "
         "message['role'] != 'tool' else '')"), ConfigError, "does not show what tools return"),
        ([lambda x: x], None, TEMPLATE, DataError, "needs a docstring"),
        ([add, add], None, TEMPLATE, ConfigError, "two tools are called add"),
        ((), object, TEMPLATE, ConfigError, r"object has no reset\(\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_played_is_refused_before_the_run(tools, factory, template, error, words):
    with pytest.raises(error, match=words):
        set_stage(tiny.tokenizer(template), tools, factory, None)


def test_tools_and_environments_may_be_named(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        'def twice(n: int) -> int:\n    """Double.\n\n    Args:\n        n: What.\n    """\n'
        "    return 2 * n\n\n\nclass World:\n    def reset(self, **_):\n        pass\n"
    )
    stage = set_stage(TOKENIZER, f"{file}:twice", f"{file}:World", None)
    assert list(stage.functions(stage.environment(None, 0))) == ["twice"]
    assert type(stage.environment(None, 0)).__name__ == "World"
    with pytest.raises(ConfigError, match="no function 'twise'; nearest: 'twice'"):
        set_stage(TOKENIZER, [f"{file}:twise"], None, None)


def test_a_template_that_rewrites_the_past_is_refused():
    template = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{{ messages | length }}")
    with pytest.raises(ConfigError, match="writes earlier turns otherwise"):
        set_stage(tiny.tokenizer(template), [add], None, None)


def test_prompts_with_tools_are_messages():
    stage = set_stage(TOKENIZER, [add], None, None)
    with pytest.raises(DataError, match="row 0: with tools `prompt` is messages"):
        read_prompts([{"prompt": "add"}], TOKENIZER, None, stage.schemas)


def test_a_reset_that_fails_names_the_row():
    class Broken(Counter):
        def reset(self, **_):
            raise OSError("no board")

    with pytest.raises(TrainingError, match=r"Broken\.reset failed on row 0: OSError: no board"):
        play(Script("x"), factory=Broken, rows=ROWS[:1])
