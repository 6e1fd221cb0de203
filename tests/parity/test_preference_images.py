"""Preferences over answers to images against TRL's trainers in the same process."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
import trl
from datasets import Dataset, Features, Image, List, Value
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import topwork
from sighted import FAMILIES, pair, picture

PEERS = {
    "llava": (transformers.LlavaProcessor, CLIPImageProcessorPil),
    "qwen2_vl": (transformers.Qwen2VLProcessor, Qwen2VLImageProcessorPil),
}


def rows(kind):
    """One image, and two of which one is another shape."""
    pictures = [picture(24, 16), picture(16, 30, 1), picture(20, 20, 2)]
    asked = [("what?", pictures[:1]), ("which of them?", pictures[1:]), ("how many?", pictures[:1])]
    answers = [("a dog", "no"), ("both of them", "neither"), ("3", "a good many more")]
    made = []
    for i, ((question, images), (chosen, rejected)) in enumerate(zip(asked, answers)):
        row = {"prompt": [{"role": "user", "content": question}], "images": images}
        said = {"chosen": chosen, "rejected": rejected}
        if kind == "KTO":
            said = {"completion": chosen if i % 2 else rejected}
            row["label"] = bool(i % 2)
        for name, text in said.items():
            row[name] = [{"role": "assistant", "content": text}]
        made.append(row)
    return made


def dataset(data):
    message = List({"role": Value("string"), "content": Value("string")})
    kinds = {"images": List(Image()), "label": Value("bool")}
    return Dataset.from_list(data, Features({k: kinds.get(k, message) for k in data[0]}))


def homes(family, folder):
    """A base and a policy that has moved away from it, and both sides' processors."""
    made, other = pair(family), pair(family, 1)
    if family == "llava":
        made.processor.chat_template = "{{ bos_token }}" + made.processor.chat_template
    made.model.save_pretrained(folder / "base")
    with torch.no_grad():
        for p, q in zip(made.model.parameters(), other.model.parameters()):
            p.add_(0.2 * q)
    made.model.save_pretrained(folder / "policy")
    kind, images = PEERS[family]
    _, _, (_, options), extra, _, _ = FAMILIES[family]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made.processor.tokenizer.core, pad_token="<pad>", bos_token="<s>",
        eos_token="</s>",
    )  # fmt: skip
    images = images(**json.loads(json.dumps(options)))
    template = made.processor.chat_template
    if family == "llava":
        return made.processor, kind(images, tokenizer, chat_template=template, **extra)
    peer = kind.__new__(kind)  # its __init__ wants a reader of videos, which needs torchvision
    peer.image_processor, peer.tokenizer, peer.chat_template = images, tokenizer, template
    peer.image_token, peer.video_token = "<|image_pad|>", "<|video_pad|>"
    peer.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    peer.video_token_id = tokenizer.convert_tokens_to_ids("<fake_token_around_image>")
    return made.processor, peer


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
@pytest.mark.parametrize("family", PEERS)
def test_loss_gradients_and_metrics_equal_the_peer(family, kind, tmp_path):
    processor, peer_processor = homes(family, tmp_path)
    options = {"learning_rate": 0.0, "max_steps": 1, "logging_steps": 1, "optim": "sgd", "seed": 0,
               "per_device_train_batch_size": 3, "max_grad_norm": 1e9, "save_strategy": "no",
               "beta": 0.3, "disable_tqdm": True}  # fmt: skip
    ours = topwork.AutoModelForImageTextToText
    run = getattr(topwork, f"{kind}Trainer")(
        ours.from_pretrained(tmp_path / "policy"), ours.from_pretrained(tmp_path / "base"),
        getattr(topwork, f"{kind}Config")(output_dir=str(tmp_path / "ours"), shuffle=False,
                                          **options),
        rows(kind), processing_class=processor,
    )  # fmt: skip
    run.train()
    theirs = transformers.AutoModelForImageTextToText
    peer = getattr(trl, f"{kind}Trainer")(
        theirs.from_pretrained(tmp_path / "policy"), theirs.from_pretrained(tmp_path / "base"),
        getattr(trl, f"{kind}Config")(
            output_dir=str(tmp_path / "theirs"), use_cpu=True, bf16=False, report_to="none",
            gradient_checkpointing=False, max_length=None, **options,
        ),
        train_dataset=dataset(rows(kind)), processing_class=peer_processor,
    )  # fmt: skip
    peer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(peer.train_dataset)
    peer.train()
    found, wanted = run.state.log_history[0], peer.state.log_history[0]
    names = ["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen"]
    for name in [*names, *(["kl"] if kind == "KTO" else ["rewards/margins"])]:
        assert found[name] == pytest.approx(float(wanted[name]), rel=5e-5, abs=1e-5), name
