"""Every objective from a file, and its preview."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import tiny
from teaching import teaching
from topwork.cli.main import app
from topwork.errors import ConfigError
from topwork.objectives.registry import OBJECTIVES

PAIRS = [{"prompt": f"ask {i}", "chosen": f" yes {i}", "rejected": " no"} for i in range(4)]
JUDGED = [{"prompt": "ask", "completion": f" {i}", "label": i % 2 == 0} for i in range(4)]
STEPS = [{"prompt": "1+1", "completions": ["one", "two"], "labels": [True, False]}] * 4
ADVISED = [{"prompt": f"ask {i}", "privileged_context": f"{i}"} for i in range(4)]
ROWS = {
    "sft": tiny.chats(4),
    "tpo": [{**row, "reference": f" yes indeed {i}"} for i, row in enumerate(PAIRS)],
    "distill": tiny.chats(4),
    "gkd": tiny.chats(4),
    "server_distill": tiny.chats(4),
    "iw_opd": tiny.chats(4),
    "uld": tiny.chats(4),
    "gold": tiny.chats(4),
    "self_distill": ADVISED,
    "kto": JUDGED,
    "prm": STEPS,
}
SHOWN = {
    "sft": "messages format", "distill": "messages format", "gkd": "messages format",
    "server_distill": "messages format", "iw_opd": "messages format", "uld": "messages format",
    "gold": "messages format",
    "self_distill": "prompts: 4 rows, an answer to each",
    "kto": "unpaired preference format",
    "prm": "8 steps, 4 of them right",
    **dict.fromkeys(("grpo", "gmpo", "sdpo"), "prompts: 4 rows, 8 answers to each"),
    "rloo": "prompts: 4 rows, 2 answers to each",
    **dict.fromkeys(("ppo", "a2po"), "prompts: 4 rows, an answer to each"),
    **dict.fromkeys(("online_dpo", "xpo", "nash_md"), "prompts: 4 rows, 2 answers to each"),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path, request):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in ROWS.get(request.param, PAIRS)))
    return request.param, path


def run(*words):
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.mark.filterwarnings("ignore:.*start with fresh values")
@pytest.mark.parametrize("data", OBJECTIVES, indirect=True)
def test_an_objective_is_previewed_and_trained(base, data, tmp_path):
    objective, path = data
    common = ("--model", base, "--data", path, "--objective", objective)
    shown = run("preview", *common, "--rows", 2)
    assert SHOWN.get(objective, "preference format; 4 of 4 rows kept") in shown
    assert "row 1" in shown
    out = tmp_path / "out"
    extra = ("--teacher", base) if objective in ("distill", "gkd", "iw_opd", "uld", "gold") else ()
    if objective == "self_distill":
        extra = ("--max_completion_length", 4)
    if objective in ("grpo", "gmpo", "sdpo", "a2po", "rloo", "ppo", "online_dpo", "xpo", "nash_md"):
        own = tmp_path / "rewards.py"
        own.write_text("def brief(completions, **_):\n    return [-len(c) for c in completions]\n")
        extra = ("--reward", f"{own}:brief", "--max_completion_length", 4)
    with teaching(tiny.model()) as server:
        if objective == "server_distill":
            extra = ("--teacher_model_server_url", server.url, "--max_new_tokens", 4)
        lora = ("--lora.r", 2, "--lora.target_modules", "[q_proj]")
        run("train", *common, *extra, "--output_dir", out, "--max_steps", 1, "--disable_tqdm",
            "--save_strategy", "no", *lora)  # fmt: skip
    assert (out / "adapter_model.safetensors").is_file()
    assert len((out / "log.jsonl").read_text().splitlines()) == 2  # the step, and the whole run


@pytest.mark.parametrize("data", ["dpo"], indirect=True)
def test_a_reference_may_be_named_and_a_wrong_key_names_the_nearest(base, data, tmp_path):
    common = ("--model", base, "--data", data[1], "--objective", "dpo")
    run("train", *common, "--ref_model", base, "--output_dir", tmp_path / "out", "--max_steps", 1,
        "--disable_tqdm", "--save_strategy", "no", "--loss_type", "[sigmoid, sft]")  # fmt: skip
    with pytest.raises(ConfigError, match="nearest: 'ref_model'"):
        run("train", *common, "--ref_modle", base)
    with pytest.raises(ConfigError, match="no field 'teacher'"):
        run("train", *common, "--teacher", base)
