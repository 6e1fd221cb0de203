"""Captions: a small BLIP learns from scratch to say what is drawn, then a LoRA another language.

Data: drawn here, a shape of some colour on one side of a picture; 300 pictures are held out.
Metrics: exact match and ROUGE-L. Under three minutes on 2 cores.
"""

from __future__ import annotations

import random

import torch
from PIL import Image, ImageDraw
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers, processors

from topwork import (
    AutoModelForImageTextToText,
    Config,
    LoraConfig,
    Trainer,
    TrainingArguments,
    get_peft_model,
    pipeline,
)
from topwork.media import ImageProcessor
from topwork.media.image_text import STYLES, ImageTextProcessor
from topwork.text import Tokenizer

COLOURS = {"red": "rot", "green": "grün", "blue": "blau", "yellow": "gelb"}
SHAPES = {"circle": "Kreis", "square": "Quadrat", "triangle": "Dreieck"}
PLACES = {"left": "links", "right": "rechts"}
SIDE = 24
WORDS = ["[PAD]", "[START]", "[END]", "a", "ein", *COLOURS, *COLOURS.values(), *SHAPES,
         *SHAPES.values(), "on", "the", *PLACES, *PLACES.values()]  # fmt: skip


def drawn(colour, shape, place, rng):
    """A picture of the shape, somewhere on its side."""
    image = Image.new("RGB", (SIDE, SIDE), tuple(rng.randrange(40) for _ in range(3)))
    pen, size = ImageDraw.Draw(image), rng.randrange(7, 11)
    x = rng.randrange(0, SIDE // 2 - size + 1) + (SIDE // 2 if place == "right" else 0)
    y = rng.randrange(0, SIDE - size)
    box = (x, y, x + size, y + size)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=colour)
    return image


def rows(count, seed):
    """Pictures with their captions in English and in German."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        colour, shape, place = (rng.choice(list(all)) for all in (COLOURS, SHAPES, PLACES))
        english = f"a {colour} {shape} on the {place}"
        german = f"ein {SHAPES[shape]} {COLOURS[colour]} {PLACES[place]}"
        made.append((drawn(colour, shape, place, rng), english, german))
    return made


def reader():
    """A tokenizer of whole words, and the processor around it."""
    core = Core(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[START] $A [END]", special_tokens=[("[START]", 1), ("[END]", 2)]
    )
    core.add_special_tokens(WORDS[:3])
    names = {"pad_token": "[PAD]", "bos_token": "[START]", "eos_token": "[END]"}
    images = ImageProcessor("BlipImageProcessor", size=SIDE)
    return ImageTextProcessor(images, Tokenizer(core, names), STYLES["BlipProcessor"])


processor = reader()
train, held_out = rows(3000, 0), rows(300, 1)
rouge = RougeScorer(["rougeL"])


def samples(pictures, language):
    """What the model reads; the captions are all of one length."""
    found = processor([p[0] for p in pictures], return_tensors="pt")["pixel_values"]
    ids = [processor.tokenizer(p[language])["input_ids"] for p in pictures]
    return [
        {"pixel_values": pixels, "labels": torch.tensor(row)} for pixels, row in zip(found, ids)
    ]


def measured(folder, language, pictures, **adapter):
    """Exact match and ROUGE-L of the captions."""
    pipe = pipeline("image-to-text", folder, batch_size=50, **adapter)
    said = [row[0]["generated_text"] for row in pipe([p[0] for p in pictures], max_new_tokens=8)]
    wanted = [p[language] for p in pictures]
    exact = sum(a == b for a, b in zip(said, wanted)) / len(said)
    score = sum(rouge.score(b, a)["rougeL"].fmeasure for a, b in zip(said, wanted)) / len(said)
    return f"exact {exact:.3f}, ROUGE-L {score:.3f}"


def train_on(model, language, folder, **options):
    arguments = {"per_device_train_batch_size": 64, "lr_scheduler_type": "cosine",
                 "warmup_steps": 0.1, "save_strategy": "no", "logging_steps": 25}  # fmt: skip
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=folder, **arguments, **options),
        train_dataset=samples(train, language),
    )
    trainer.train()
    trainer.save_model()


torch.manual_seed(0)
text = {"vocab_size": len(WORDS), "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 16,
        "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
          "num_attention_heads": 4, "image_size": SIDE, "patch_size": 4}  # fmt: skip
config = Config(model_type="blip", text_config=text, vision_config=vision, initializer_range=0.1)
model = AutoModelForImageTextToText.from_config(config)
train_on(model, 1, "shapes", num_train_epochs=12, learning_rate=2e-3)
processor.save_pretrained("shapes")
print(f"English, from scratch: {measured('shapes', 1, held_out)}")

lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
adapted = get_peft_model(AutoModelForImageTextToText.from_pretrained("shapes"), lora)
before = measured("shapes", 2, held_out)
train_on(adapted, 2, "shapes-german", num_train_epochs=5, learning_rate=5e-3)
after = measured("shapes", 2, held_out, adapter="shapes-german")
print(f"German, LoRA: {before} → {after} with {adapted.num_parameters(only_trainable=True):,} of "
      f"{adapted.num_parameters():,} parameters")  # fmt: skip
