"""Compiled models with adapters: one graph, the same outputs and gradients. Every method on a plain
model is in `parity/test_methods.py`; here are bases, blocks and calls of other kinds."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import tiny
import topwork
from parity.bases import IDS as WORDS
from parity.bases import close, randomise
from parity.test_methods import FIRST, of_tasks, our_config
from topwork import LoraConfig, get_peft_model
from topwork.quant import Blocks, QuantisedLinear, Rows
from topwork.quant.config import linears_of

pytestmark = pytest.mark.slow
IDS = torch.tensor([[5, 17, 200, 3, 42, 99, 7, 250]])
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


def llama(form=None):
    return quantised(tiny.model(hidden_size=32, intermediate_size=48, num_hidden_layers=1), form)


def quantised(model, form):
    for path, linear in list(linears_of(model, model.trunk)) if form else ():
        home, _, name = path.rpartition(".")
        setattr(model.get_submodule(home), name, QuantisedLinear.of(linear, form))
    return model


def bert():
    torch.manual_seed(0)
    config = topwork.Config(
        model_type="bert", vocab_size=259, hidden_size=32, intermediate_size=48,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    return topwork.AutoModelForSequenceClassification.from_config(config)


def two_adapters():
    model = get_peft_model(llama(), LoraConfig(**LORA))
    model.add_adapter("other", LoraConfig(**{**LORA, "r": 2}))
    model.set_adapter(["default", "other"])
    return model


def checkpointed():
    model = llama()
    model.gradient_checkpointing_enable()
    return get_peft_model(model, LoraConfig(**LORA)).train()


def outliers():
    model = llama(Rows())
    model.model.layers[0].input_layernorm.weight.data[3] = 20.0
    return get_peft_model(model, LoraConfig(**LORA)).eval()


CASES = {
    "nf4": lambda: get_peft_model(llama(Blocks("nf4", double=True)), LoraConfig(**LORA)),
    "int8 in training": lambda: get_peft_model(llama(Rows()), LoraConfig(**LORA)).train(),
    "int8 with outliers": outliers,
    "sequential": lambda: get_peft_model(llama(), topwork.SeqBnConfig(mh_adapter=True)),
    "parallel": lambda: get_peft_model(llama(), topwork.ParBnConfig()),
    "post-norm blocks": lambda: get_peft_model(bert(), topwork.SeqBnConfig(mh_adapter=True)),
    "bottleneck": lambda: get_peft_model(llama(), topwork.BottleneckConfig()),
    "two adapters": two_adapters,
    "checkpointing": checkpointed,
}


def outputs_and_gradients(model, call):
    logits = call(IDS).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return logits.detach(), grads


@pytest.mark.parametrize("case", CASES)
def test_it_is_one_graph_with_the_same_outputs_and_gradients(case):
    torch._dynamo.reset()
    model = CASES[case]()
    if not case.startswith("int8"):  # where steps of rounding would tell
        randomise(model)
    plain = outputs_and_gradients(model, model)
    assert plain[1]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(outputs_and_gradients(model, compiled), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "CPT"])
def test_virtual_tokens_are_in_the_graph(kind):
    torch._dynamo.reset()
    told = {"cpt_token_ids": [5, 9, 11, 2], "cpt_tokens_type_mask": [1, 2, 3, 4]}
    options = told if kind == "CPT" else {"num_virtual_tokens": 4}
    config = topwork.PeftConfig.from_dict({"peft_type": kind, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(llama(), config)
    plain = outputs_and_gradients(model, model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(outputs_and_gradients(model, compiled), plain, rtol=1e-4, atol=1e-4)


def test_packed_rows_compile_too():
    torch._dynamo.reset()
    model = get_peft_model(llama(), LoraConfig(**LORA))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain, made = (
        outputs_and_gradients(model, partial(way, lengths=(3, 5))) for way in (model, compiled)
    )
    close(made, plain, rtol=1e-4, atol=1e-4)


def small(form=None):
    torch.manual_seed(0)
    config = topwork.Config(
        model_type="qwen2", vocab_size=37, hidden_size=24, intermediate_size=40,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return quantised(topwork.AutoModelForCausalLM.from_config(config), form)


# Those whose training differs from their inference, and the newest.
TRAINS = ("Lily", "Frod", "OSF", "Super", "Adamss", "Shadow", "Poly", "Shira", "Pvera", "AdaLora")
OWN = [
    r
    for r in FIRST
    if r.config.startswith(TRAINS)
    or {"monteclora_config", "alora_invocation_tokens"} & set(r.options)
]


@pytest.mark.parametrize("row", OWN, ids=str)
def test_a_compiled_training_step_has_the_same_loss_and_gradients(row):
    torch._dynamo.reset()
    model = get_peft_model(small(), our_config(row)).train()
    randomise(model)

    def step(ids):
        return model(ids, labels=ids, **of_tasks(model)).loss

    found = []
    for way in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(3)
        loss = way(WORDS)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad(set_to_none=True)
    assert len(found[0]) > 1
    close(found[1], found[0], rtol=1e-3, atol=1e-4)
