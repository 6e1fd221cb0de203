from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import tiny
from topwork import AutoModelForCausalLM, PeftModel
from topwork.cli.main import app
from topwork.cli.settings import parse, read_settings
from topwork.errors import ConfigError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in tiny.chats(8)))
    return path


def run(*words, **more):
    result = CliRunner().invoke(app, [str(w) for w in words], **more)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_run_from_a_file_with_fields_on_the_command_line(base, data, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {base}\ndata: {data}\nlearning_rate: 2e-3\nlora:\n  r: 4\n"
        "  target_modules: all-linear\nmax_steps: 9\n"
    )
    out = tmp_path / "out"
    run("train", config, "--output_dir", out, "--max-steps", 2, "--lora.lora_alpha=6",
        "--disable_tqdm")  # fmt: skip
    saved = json.loads((out / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (4, 6)
    args = json.loads((out / "checkpoint-2" / "training_args.json").read_text())
    assert (args["max_steps"], args["learning_rate"]) == (2, 2e-3)
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--lerning_rate", "1"], "nearest: 'learning_rate'"),
        (["--modle", "x"], "nearest: 'model'"),
        (["--objective", "stf"], "nearest: 'sft'"),
        (["--lora.rr", "3"], "nearest: 'r'"),
        (["--learning_rate", "fast"], "learning_rate"),
        (["learning_rate", "1"], "expected --field value"),
    ],
)
def test_a_wrong_word_names_the_nearest(base, data, words, error):
    with pytest.raises(ConfigError, match=error):
        run("train", "--model", base, "--data", data, *words)


def test_a_run_without_model_or_data_says_so(base):
    with pytest.raises(ConfigError, match="lacks 'data'"):
        run("train", "--model", base)
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        run("train", "absent.yaml")


def test_errors_come_as_one_line_with_status_two(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from topwork.cli.main import main; main()", "train", "--model=x"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().startswith("topwork: the run lacks 'data'")


def test_preview_shows_rows_with_their_trained_tokens(base, data):
    text = run("preview", "--model", base, "--data", data, "--rows", 2).output
    assert "messages format; 8 of 8 rows kept" in text
    assert "row 0: " in text
    assert "row 1: " in text
    assert "row 2: " not in text


def test_generate_prints_the_answer_and_merge_keeps_it(base, data, tmp_path):
    out, merged = tmp_path / "adapter", tmp_path / "merged"
    run("train", "--model", base, "--data", data, "--output_dir", out, "--max_steps", 3,
        "--learning_rate", "1e-2", "--disable_tqdm", "true")  # fmt: skip
    said = run("generate", base, "say 1", "--adapter", out, "--max-new-tokens", 8).output
    assert said == run("generate", out, "say 1", "--max-new-tokens", 8).output
    run("merge", base, out, merged)
    assert run("generate", merged, "say 1", "--max-new-tokens", 8).output == said
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
        again = AutoModelForCausalLM.from_pretrained(merged)
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_chat_remembers_what_was_said(base, monkeypatch):
    text = run(
        "chat", base, "--max-new-tokens", 3, "--temperature", 0, "--system", "s",
        input="hello\nmore\n/new\nhello\n/quit\n",
    ).output  # fmt: skip
    answers = [part.split("\n")[0] for part in text.split("› ")[1:5]]
    assert answers[0] == answers[3]


def test_help_reads_well():
    text = run("--help").output
    for name in ("train", "preview", "generate", "chat", "merge", "demo"):
        assert name in text
    assert "topwork" in run("--version").output


def test_settings_are_typed():
    assert [parse(t) for t in ("2e-4", "3", "true", "a b", "[1, 2]")] == [
        2e-4, 3, True, "a b", [1, 2],
    ]  # fmt: skip
    assert read_settings(None, ["--a.b", "1", "--a.c", "--d=x"]) == {
        "a": {"b": 1, "c": True}, "d": "x",
    }  # fmt: skip


def test_rewards_come_from_a_file_of_ones_own(base, tmp_path):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"go {i}"}) + "\n" for i in range(4)))
    own = tmp_path / "rewards.py"
    own.write_text(
        "def brief(completions, **_):\n    return [-float(len(c)) for c in completions]\n"
    )
    common = ("--objective", "grpo", "--model", base, "--data", rows)
    out = tmp_path / "out"
    run("train", *common, "--reward", f"{own}:brief", "--output_dir", out, "--max_steps", 1,
        "--max_completion_length", 4, "--disable_tqdm")  # fmt: skip
    assert (out / "completions.jsonl").is_file()
    assert "prompts: 4 rows, 8 answers to each" in run("preview", *common).output
    with pytest.raises(ConfigError, match="nearest: 'brief'"):
        run("train", *common, "--reward", f"{own}:breif")
    with pytest.raises(ConfigError, match="--reward"):
        run("train", *common)


def test_any_adapter_on_a_base_in_four_bits(base, data, tmp_path):
    out = tmp_path / "out"
    run("train", "--model", base, "--data", data, "--output_dir", out, "--max_steps", 1,
        "--adapter.peft_type", "ia3", "--adapter.target_modules", "[v_proj, down_proj]",
        "--adapter.feedforward_modules", "[down_proj]", "--load_in_4bit",
        "--disable_tqdm")  # fmt: skip
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "IA3"
    args = json.loads((out / "checkpoint-1" / "training_args.json").read_text())
    said = args["model_init_kwargs"]["quantization_config"]
    assert said["load_in_4bit"]
    assert said["bnb_4bit_quant_type"] == "nf4"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--adapter.peft_type", "ia4"], "nearest: 'IA3'"),
        (["--adapter.peft_type", "ia3", "--adapter.r", "8"], "IA3 does not act on"),
        (["--adapter.peft_type", "ia3", "--lora.r", "8"], "both lora and adapter"),
        (["--adapter", "ia3"], "expected fields"),
        (["--load_in_4bit", "--load_in_8bit"], "twice how the base is quantised"),
    ],
)
def test_a_wrong_adapter_or_base_is_refused(base, data, words, error):
    with pytest.raises(ConfigError, match=error):
        run("train", "--model", base, "--data", data, *words)


def test_the_fields_of_every_configuration_can_be_listed():
    names = run("fields").output
    assert "nash_md" in names
    assert "randlora" in names
    shown = run("fields", "grpo").output
    assert "beside model and data: reward" in shown
    assert "num_iterations: int = 1\n    Passes over the same answers (μ).\n" in shown
    assert "logging_steps: int = 10" in shown  # a base's, which says nothing more
    assert "peft_type: str = 'IA3'" in run("fields", "ia3").output
    with pytest.raises(ConfigError, match="nearest: 'grpo'"):
        run("fields", "grppo")
