"""Our loss on packed rows with images against transformers' models on padded ones."""

from __future__ import annotations

import pytest
import torch
import transformers

from sighted import pair, rows
from topwork import SFTConfig, SFTTrainer
from topwork.data.packing import collate


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_loss_and_gradients_of_a_packed_batch_equal_the_peers_padded_ones(family, tmp_path):
    made = pair(family)
    data = [rows()[0], rows()[1], rows()[2]]
    made.model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    processor = made.processor
    processor.tokenizer.padding_side = "right"
    call = processor.apply_chat_template(
        [row["messages"] for row in data], tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    labels = torch.full_like(call["input_ids"], -100)
    for i, said in enumerate(("a dog", "both of them", "good day")):
        real = int(call["attention_mask"][i].sum())
        count = len(processor.tokenizer(said + "</s>", add_special_tokens=False)["input_ids"])
        labels[i, real - count : real] = call["input_ids"][i, real - count : real]
    wanted = theirs(**call, labels=labels).loss
    wanted.backward()
    args = SFTConfig(output_dir=str(tmp_path / "run"), disable_tqdm=True)
    run = SFTTrainer(made.model, args, data, processing_class=processor)
    run.model.eval()
    batch = collate(run.prepared.samples, run.objective.placer)
    assert len(batch.targets) == int((labels != -100).sum())
    found = run.objective.loss(run.model, batch).total / len(batch.targets)
    found.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    mine = dict(run.model.named_parameters())
    used = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert sum(p.grad is not None for p in mine.values()) == len(used)
    floor = 5e-2 * max(grad.norm() for grad in used.values())
    for name, grad in used.items():
        (place,) = run.model.table.places(name, mine)
        assert (mine[place.name].grad - grad).norm() < 1e-5 * max(grad.norm(), floor), name
