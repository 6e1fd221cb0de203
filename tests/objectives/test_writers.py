"""Answers by a server over its public API, and answers drawn ahead by a thread."""

from __future__ import annotations

import copy
import json
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import tiny
from serving import process
from topwork import (
    GRPOConfig,
    GRPOTrainer,
    IA3Config,
    LoraConfig,
    PeftModel,
    PPOConfig,
    PPOTrainer,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from topwork.errors import ConfigError, TrainingError
from topwork.generation.engine import Engine
from topwork.objectives.ahead import Ahead, SnapshotWriter, snapshot
from topwork.objectives.rollouts import Answer, EngineWriter
from topwork.objectives.server import check_servable
from topwork.peft import get_peft_model

ROWS = [{"prompt": f"go {i}", "top": 100} for i in range(6)]
LORA = {"r": 8, "lora_alpha": 32, "target_modules": "all-linear"}


def share(completion_ids, top, **_):
    """The share of an answer's tokens below its row's `top`."""
    return [sum(i < x for i in ids) / len(ids) for ids, x in zip(completion_ids, top)]


def trainer(folder, kind=GRPOTrainer, config=GRPOConfig, reward=share, lora=True, **options):
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "num_generations": 4,
        "max_completion_length": 8, "learning_rate": 2e-2, "logging_steps": 1,
        "disable_tqdm": True, "save_strategy": "no", "max_steps": 4,
    }  # fmt: skip
    torch.manual_seed(2)
    return kind(
        tiny.model(), reward, config(**{**values, **options}), ROWS,
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(**LORA) if lora is True else lora or None,
    )  # fmt: skip


def means(run, name):
    return [e[name] for e in run.state.log_history if name in e]


class Server(ThreadingHTTPServer):
    """What a run uses of vLLM's server, over the tiny model."""

    daemon_threads = True

    def __init__(self, old=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.old, self.calls, self.adapters = old, [], {}
        self.lock = threading.Lock()
        self.broken, self.base = None, tiny.model()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, body):
        engine = Engine(self.adapters[body["model"]])
        request = engine.submit(
            body["prompt"], do_sample=True, temperature=body["temperature"], seed=body["seed"],
            top_k=max(0, body["top_k"]), max_new_tokens=body["max_tokens"],
            eos_token_id=body["stop_token_ids"],
        )  # fmt: skip
        for _ in engine.run():
            pass
        logprobs = {
            "tokens": [f"token_id:{i}" for i in request.new_ids],
            "token_logprobs": request.logprobs,
        }
        choice = {"text": "…", "finish_reason": request.finish_reason, "logprobs": logprobs}
        if not self.old:
            choice["token_ids"] = request.new_ids
        return {"choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        verb, server = self.path.removeprefix("/v1/"), self.server
        with server.lock:
            server.calls.append((verb, body))
            if server.broken and verb == server.broken[0]:
                status, text = server.broken[1:]
            elif verb == "load_lora_adapter":
                base = copy.deepcopy(server.base)
                with torch.random.fork_rng():
                    loaded = PeftModel.from_pretrained(base, body["lora_path"]).eval()
                server.adapters[body["lora_name"]] = loaded
                status, text = 200, f"Success: {body['lora_name']} added"
            elif verb == "unload_lora_adapter":
                del server.adapters[body["lora_name"]]
                status, text = 200, "Success"
            else:
                status, text = 200, json.dumps(server.answer(body))
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    made = Server()
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize("old", [False, True], ids=["token_ids", "tokens as ids"])
def test_a_run_on_a_server_equals_one_in_the_process(tmp_path, server, old):
    server.old = old
    there = trainer(tmp_path / "there", rollout_server=f"{server.url}/v1", temperature=0.8, top_k=9)
    there.train()
    here = trainer(tmp_path / "here", temperature=0.8, top_k=9)
    here.train()
    for name in ("reward", "loss", "grad_norm", "sampling/ratio"):
        assert means(there, name) == pytest.approx(means(here, name), rel=1e-4, abs=1e-6), name
    verbs = [verb for verb, _ in server.calls if verb != "completions"]
    # each step's adapter is loaded, and no more of them stay than may be in use
    assert verbs.count("load_lora_adapter") == 4
    assert verbs.count("unload_lora_adapter") == 2
    assert sorted(server.adapters) == ["topwork-there-2", "topwork-there-3"]
    kept = sorted(p.name for p in (tmp_path / "there" / "rollout_adapters").iterdir())
    assert kept == ["topwork-there-2", "topwork-there-3"]
    body = next(body for verb, body in server.calls if verb == "completions")
    assert body["model"] == "topwork-there-0"
    assert len({b["seed"] for v, b in server.calls if v == "completions"}) == 16


def test_topwork_serve_draws_for_a_run_as_vllm_does(tmp_path):
    options = {"temperature": 0.8, "top_k": 9}
    base = tmp_path / "base"
    tiny.model().save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    with process(base, "--load-adapters", "--processed-logprobs") as url:
        there = trainer(tmp_path / "there", rollout_server=url, **options)
        there.train()
        with urllib.request.urlopen(f"{url}/v1/models") as reply:
            listed = [m["id"] for m in json.load(reply)["data"]]
    assert listed == ["base", "topwork-there-2", "topwork-there-3"]
    here = trainer(tmp_path / "here", **options)
    here.train()
    for name in ("reward", "loss", "grad_norm", "sampling/ratio"):
        assert means(there, name) == pytest.approx(means(here, name), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (("load_lora_adapter", 404, "Not Found"), "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        (("completions", 500, "out of memory"), "completions answered 500: out of memory"),
        (("completions", 200, '{"choices": []}'), "no token ids with their log-probabilities"),
        (("completions", 200, json.dumps({"choices": [{"finish_reason": "stop", "token_ids": [5],
          "logprobs": {"tokens": [], "token_logprobs": []}}]})), "1 tokens came with 0"),
    ],
)  # fmt: skip
def test_what_the_server_refuses_stops_the_run_after_saving(tmp_path, server, broken, words):
    server.broken = broken
    with pytest.raises(TrainingError, match=rf"{words}[\s\S]*saved as"):
        trainer(tmp_path, rollout_server=server.url).train()
    assert (tmp_path / "checkpoint-0" / "manifest.json").is_file()


def test_a_server_that_is_not_there_is_named(tmp_path):
    gone = Server()
    gone.shutdown()
    gone.server_close()
    with pytest.raises(TrainingError, match=r"cannot be reached .*rollout_server running\?"):
        trainer(tmp_path, rollout_server=gone.url).train()


def test_a_server_takes_up_adapters_alone(tmp_path, server):
    with pytest.raises(ConfigError, match="takes up adapters alone"):
        trainer(tmp_path, lora=False, rollout_server=server.url).train()
    with pytest.raises(ConfigError, match="no address like http://host:8000"):
        trainer(tmp_path, rollout_server="localhost:8000")


@pytest.mark.parametrize(
    ("own", "words"),
    [({"use_dora": True}, "leaves use_dora out"), ({"bias": "all"}, "leaves bias out"),
     ({"modules_to_save": ["lm_head"]}, "leaves modules_to_save out")],
)  # fmt: skip
def test_what_the_server_would_leave_out_is_refused(own, words):
    model = get_peft_model(tiny.model(), LoraConfig(**LORA, **own))
    with pytest.raises(ConfigError, match=words):
        check_servable(model)


def test_other_adapters_are_refused():
    model = get_peft_model(
        tiny.model(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    with pytest.raises(ConfigError, match="takes LoRA adapters, not IA3"):
        check_servable(model)


# -- ahead -----------------------------------------------------------------------------------------


def test_a_snapshot_shares_what_is_frozen_alone():
    torch.manual_seed(0)
    model = get_peft_model(tiny.model(), LoraConfig(**LORA, init_lora_weights=False))
    copied = snapshot(model)
    ids = torch.tensor([[5, 6, 7]])
    before = model.eval()(ids).logits
    torch.testing.assert_close(copied(ids).logits, before, rtol=1e-4, atol=1e-5)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        assert (copied.get_parameter(name) is parameter) == (name not in trained)
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(1.0)
    torch.testing.assert_close(copied(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_a_writer_over_a_snapshot_writes_what_the_model_would():
    torch.manual_seed(0)
    model = get_peft_model(tiny.model(), LoraConfig(**LORA, init_lora_weights=False))
    options = {"do_sample": True, "temperature": 1.0, "eos_token_id": 2}
    plain, copied = EngineWriter(options), SnapshotWriter(EngineWriter(options))
    texts, limits, seeds = [[5, 6, 7], [8, 9]], [8, 8], [1, 2]
    copied.follow(model, 0)
    first = copied.write(None, texts, limits, seeds)
    assert first == plain.write(model, texts, limits, seeds)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert copied.write(None, texts, limits, seeds) == first
    copied.follow(model, 1)
    second = copied.write(None, texts, limits, seeds)
    assert second == plain.write(model, texts, limits, seeds)
    assert second != first


CAUSAL = {"task_type": "CAUSAL_LM"}
UNLIKE_LORA = {
    "prompt": PromptTuningConfig(**CAUSAL, num_virtual_tokens=40),
    "prefix": PrefixTuningConfig(**CAUSAL, num_virtual_tokens=3),
    "aLoRA": LoraConfig(**LORA, **CAUSAL, alora_invocation_tokens=[81, 223]),
    "a whole head": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "parameters": LoraConfig(target_modules=["q_proj"], target_parameters=["o_proj.weight"]),
}


@pytest.mark.parametrize("kind", UNLIKE_LORA)
def test_answers_of_any_adapter_have_the_chances_that_the_trainer_finds(kind, tmp_path):
    run = trainer(tmp_path, lora=UNLIKE_LORA[kind], max_steps=2, learning_rate=0.2)
    weights = {n: p.clone() for n, p in run.model.named_parameters() if p.requires_grad}
    run.train()
    assert max(means(run, "sampling/logp_difference")) < 1e-4
    assert means(run, "sampling/ratio") == pytest.approx([1.0, 1.0], abs=1e-4)
    now = dict(run.model.named_parameters())
    assert any(not torch.equal(now[name], before) for name, before in weights.items())


class Slow:
    """A writer that waits to be let on, and notes whose weights it saw."""

    def __init__(self):
        self.version, self.gate = -1, threading.Semaphore(0)

    def follow(self, model, step):
        self.version = step

    def write(self, model, texts, limits, seeds):
        self.gate.acquire(timeout=20)
        return [Answer([self.version], True)] * len(texts)


def test_answers_are_drawn_in_order_and_no_older_than_the_bound():
    writer = Slow()

    def play(writer, prompts, number, generator):
        return [writer.write(None, prompts, [1], [number])]

    ahead = Ahead(writer, 2, play, lambda number: [[number]] if number < 5 else None)
    ages = []
    for number in range(5):
        writer.gate.release()
        staleness, answers = ahead.take(None, number, number * 10)
        assert set(ahead.jobs) == set(range(number + 1, min(5, number + 3)))
        assert answers[0][0].ids[0] >= number * 10 - staleness
        ages.append(staleness)
    assert ages[0] == 0
    assert max(ages) in (10, 20)
    assert not ahead.jobs
    ahead.stop()


@pytest.mark.parametrize(("kind", "config"), [(GRPOTrainer, GRPOConfig), (PPOTrainer, PPOConfig)])
def test_a_run_trains_on_answers_drawn_ahead(tmp_path, kind, config):
    own = {"num_ppo_epochs": 2} if kind is PPOTrainer else {}
    run = trainer(tmp_path, kind, config, max_staleness=1, max_steps=6, **own)
    run.train()
    ages = means(run, "sampling/staleness")
    assert ages[0] == 0
    assert max(ages) <= (2 if own else 1)
    assert len(set(ages)) == 2
    assert all(d > 1e-4 for d, a in zip(means(run, "sampling/logp_difference"), ages) if a)
    assert run.objective.draw.ahead.pool is None
    assert not [t for t in threading.enumerate() if "rollouts" in t.name]
    assert [json.loads(line)["step"] for line in
            (tmp_path / "completions.jsonl").read_text().split("\n")[:-1]] == (
                [0, 2, 4] if own else list(range(6)))  # fmt: skip


def test_an_error_in_the_thread_stops_the_run_after_saving(tmp_path, server):
    server.broken = ("completions", 500, "gone")
    run = trainer(tmp_path, rollout_server=server.url, max_staleness=1)
    with pytest.raises(TrainingError, match=r"answered 500[\s\S]*saved as"):
        run.train()
