"""AdaLoRA's allocation against peft, step by step, and its files with fewer directions."""

from __future__ import annotations

import torch

import peft
import topwork
from parity.bases import IDS, base, close
from topwork.peft import PeftModel

OPTIONS = {
    "task_type": "CAUSAL_LM",
    "init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": 12, "deltaT": 2,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
}  # fmt: skip


def trained(library, steps):
    torch.manual_seed(0)
    model = library.get_peft_model(base("qwen2"), library.AdaLoraConfig(**OPTIONS))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def test_losses_masks_and_files_equal_the_peers(tmp_path):
    theirs, wanted = trained(peft, 12)
    ours, found = trained(topwork, 12)
    close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4)
    pattern = ours.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 2 * len(pattern)
    peers = theirs.peft_config["default"].rank_pattern
    assert pattern == {key.removesuffix(".default"): value for key, value in peers.items()}
    ours.eval().save_pretrained(tmp_path / "ours")
    theirs.eval().save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        logits = ours(IDS).logits
        for home in ("ours", "theirs"):
            again = PeftModel.from_pretrained(base("qwen2"), tmp_path / home)
            assert max(p.shape[0] for n, p in again.named_parameters() if "lora_E" in n) < 6
            close(again(IDS).logits, logits, rtol=1e-4, atol=1e-4)
        peers = peft.PeftModel.from_pretrained(base("qwen2"), tmp_path / "ours")
        close(peers(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert topwork.AdaLoraConfig.from_pretrained(tmp_path / "ours").rank_pattern == pattern
