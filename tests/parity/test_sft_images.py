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
    compared = 0
    for name, parameter in theirs.named_parameters():
        (place,) = run.model.table.places(name, mine)
        if parameter.grad is None:
            assert mine[place.name].grad is None
            continue
        compared += 1
        grad, size = mine[place.name].grad, parameter.grad.norm()
        assert (grad - parameter.grad).norm() < 1e-4 * size + 1e-6, name
    assert compared > 20
