"""Images into texts: captions, answers to questions about an image, chats with images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from topwork.errors import ConfigError, DataError
from topwork.media import ImageTextProcessor, load_image
from topwork.media.images import is_array, is_one, is_pillow
from topwork.pipelines.base import Pipeline
from topwork.pipelines.text_generation import is_chat

BATCH = 8  # inputs in one pass, where no batch size is given


class ImageTextPipeline(Pipeline):
    """What the three share: the model's processor, and prompts that are padded on the left."""

    needs = ("processor",)
    takes: ClassVar[str] = "images"
    processor: ImageTextProcessor

    def is_single(self, inputs: Any) -> bool:
        kinds = (str, Path, bytes, bytearray, Mapping)
        if is_array(inputs):
            return len(inputs.shape) < 4
        return isinstance(inputs, kinds) or is_pillow(inputs) or hasattr(inputs, "read")

    @property
    def token(self) -> str | None:
        """What stands for an image in a text; None where images stand beside it."""
        return self.processor.style.placeholder(self.processor)

    def groups(self, count: int) -> Iterator[list[int]]:
        """Indices that go together."""
        size = self.batch_size or BATCH
        return (list(range(at, min(at + size, count))) for at in range(0, count, size))

    def read(self, images: Any, texts: Sequence[str], **options: Any) -> dict[str, Any]:
        """What the model reads, on its device and in its dtype."""
        tokenizer = self.processor.tokenizer
        side = tokenizer.padding_side
        if self.token is not None:
            tokenizer.padding_side = "left"
        padding = len(texts) > 1
        try:
            found = self.processor(
                images, list(texts), padding=padding, return_tensors="pt", **options
            )
        finally:
            tokenizer.padding_side = side
        return self.placed(found)

    def placed(self, found: Mapping[str, Any]) -> dict[str, Any]:
        device, dtype = self.base.device, self.base.dtype
        return {
            key: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for key, value in found.items()
            if key != "labels"
        }

    def limits(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options of `generate`: 256 new tokens where neither call nor file says."""
        file = self.base.generation_config
        options = dict(given)
        if not {"max_new_tokens", "max_length"} & (set(options) | set(file)):
            options["max_new_tokens"] = 256
        if self.processor.tokenizer.pad_token_id is not None:
            options.setdefault("pad_token_id", self.processor.tokenizer.pad_token_id)
        return options

    def decode(self, ids: Any) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True)


class ImageToTextPipeline(ImageTextPipeline):
    """`pipe(image)` → [{"generated_text": caption}], one for each returned sequence."""

    model_task = "image-text-to-text"

    def run(
        self, items: list[Any], prompt: str | None = None, **generation: Any
    ) -> list[list[dict[str, Any]]]:
        """`prompt`: how captions begin, or what a model of chats is asked (with a placeholder for
        the image where it needs to stand elsewhere than in front)."""
        results: list[list[dict[str, Any]]] = [[] for _ in items]
        images = [one if is_array(one) else load_image(one, f"input {i}")
                  for i, one in enumerate(items)]  # fmt: skip
        options = self.limits(generation)
        if self.token is None:
            options.pop("pad_token_id", None)
        for group in self.groups(len(items)):
            chosen = [images[i] for i in group]
            if self.token is None:
                call = self.placed(self.processor(chosen, return_tensors="pt"))
                if prompt is not None:
                    ids = self.processor.tokenizer(prompt, return_tensors="pt")["input_ids"]
                    call["input_ids"] = ids.repeat(len(group), 1).to(self.base.device)
            else:
                text = prompt or ""
                text = text if self.token in text else self.token + text
                call = self.read([[image] for image in chosen], [text] * len(group))
            out = self.model.generate(**call, **options)
            copies = len(out) // len(group)
            for place, ids in enumerate(out):
                results[group[place // copies]].append({"generated_text": self.decode(ids).strip()})
        return results


class VisualQuestionAnsweringPipeline(ImageTextPipeline):
    """`pipe(image, question)` or `pipe({"image", "question"})` → [{"score", "answer"}].

    A model that writes its answers gives [{"answer"}].
    """

    model_task = "visual-question-answering"

    def __call__(self, image: Any, question: Any = None, **options: Any) -> Any:
        """`question` is one for all images or, as a list, one for each."""
        if question is None:
            return super().__call__(image, **options)
        several = not is_one(image)
        asked = isinstance(question, (list, tuple))
        if several and asked and len(image) != len(question):
            raise DataError(f"{len(image)} images, but {len(question)} questions")
        if not several and not asked:
            return super().__call__({"image": image, "question": question}, **options)
        count = len(image) if several else len(question)
        images = list(image) if several else [image] * count
        questions = list(question) if asked else [question] * count
        rows = [{"image": a, "question": b} for a, b in zip(images, questions)]
        return super().__call__(rows, **options)

    def run(
        self,
        items: list[Any],
        top_k: int = 5,
        truncation: bool | str = False,
        **generation: Any,
    ) -> list[list[dict[str, Any]]]:
        """`top_k`: how many answers, of a model that chooses among some; `truncation` cuts
        questions that are too long. All other options are those of `generate`."""
        if top_k < 1:
            raise ConfigError(f"top_k={top_k} must be at least 1")
        images, questions = [], []
        for i, item in enumerate(items):
            if not isinstance(item, Mapping) or not {"image", "question"} <= set(item):
                raise DataError(f'input {i} needs an "image" and a "question"')
            if not isinstance(item["question"], str) or not item["question"].strip():
                raise DataError(f"input {i}: the question is empty or no text")
            one = item["image"]
            images.append(one if is_array(one) else load_image(one, f"input {i}"))
            questions.append(item["question"])
        results: list[list[dict[str, Any]]] = [[] for _ in items]
        for group in self.groups(len(items)):
            call = self.read(
                [images[i] for i in group], [questions[i] for i in group], truncation=truncation
            )
            if not hasattr(self.base, "ask"):
                logits = self.model(**call).logits.float().cpu()
                for i, row in zip(group, logits.sigmoid()):
                    results[i] = self._best(row, top_k)
                continue
            call.pop("token_type_ids", None)
            out = self.model.generate(**call, **generation)
            copies = len(out) // len(group)
            for place, ids in enumerate(out):
                results[group[place // copies]].append({"answer": self.decode(ids).strip()})
        return results

    def _best(self, scores: Tensor, top_k: int) -> list[dict[str, Any]]:
        found = scores.topk(min(top_k, len(scores)))
        pairs = zip(found.values.tolist(), found.indices.tolist())
        return [{"score": score, "answer": self.label(index)} for score, index in pairs]


class ImageTextToTextPipeline(ImageTextPipeline):
    """`pipe(chat)`, `pipe(images, text=…)` or `pipe({"images", "text"})` → [{"input_text",
    "generated_text"}], one for each returned sequence."""

    model_task = "image-text-to-text"
    takes = "chats, or images with texts"

    def is_single(self, inputs: Any) -> bool:
        return is_chat(inputs) or isinstance(inputs, (str, Mapping))

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        """`text` may hold a chat, or be a text with a placeholder for each of `images`."""
        if images is None and text is None:
            raise ConfigError("image-text-to-text takes a chat, or images with a text")
        if text is None:
            if not is_chat(images) and (is_pillow(images) or is_array(images)):
                raise DataError("an image without a text: pass text=…, or a chat that holds both")
            return super().__call__(images, **options)
        if images is None:
            return super().__call__(text, **options)
        if is_chat(text):
            raise DataError('images beside a chat: put each into a message, as {"type": "image"}')
        if isinstance(text, str):
            return super().__call__({"images": images, "text": text}, **options)
        if is_one(images) or len(images) != len(text):
            raise DataError(f"{len(text)} texts need a list of images for each")
        rows = [{"images": own, "text": one} for own, one in zip(images, text)]
        return super().__call__(rows, **options)

    def run(
        self,
        items: list[Any],
        return_full_text: bool = True,
        continue_final_message: bool | None = None,
        **generation: Any,
    ) -> list[list[dict[str, Any]]]:
        """`return_full_text` False leaves the prompt out. `continue_final_message`: go on with the
        last message of a chat; by default where it is the assistant's. All other options are those
        of `generate`."""
        results: list[list[dict[str, Any]]] = [[] for _ in items]
        options = self.limits(generation)
        for i, item in enumerate(items):
            goes_on = continue_final_message
            if goes_on is None:
                goes_on = is_chat(item) and item[-1].get("role") == "assistant"
            call = self._prompt(i, item, goes_on)
            out = self.model.generate(**call, **options)
            shown = item["text"] if isinstance(item, Mapping) else item
            for ids in out:
                before, whole = self.decode(call["input_ids"][0]), self.decode(ids)
                new = whole[len(before) :] if whole.startswith(before) else whole
                made = self._shown(shown, new, goes_on) if return_full_text else new
                results[i].append({"input_text": shown, "generated_text": made})
        return results

    def _prompt(self, place: int, item: Any, goes_on: bool) -> dict[str, Any]:
        if is_chat(item):
            found = self.processor.apply_chat_template(
                item, add_generation_prompt=not goes_on, continue_final_message=goes_on,
                tokenize=True, return_dict=True, return_tensors="pt",
            )  # fmt: skip
            return self.placed(found)
        images, text = None, item
        if isinstance(item, Mapping):
            if "text" not in item:
                raise DataError(f'input {place} has no "text", only {sorted(item)}')
            images, text = item.get("images", item.get("image")), item["text"]
        if not isinstance(text, str) or not text:
            raise DataError(f"input {place}: the text is empty or no text")
        if images is not None and not is_one(images):
            images = [list(images)]
        return self.read(images, [text])

    def _shown(self, prompt: Any, new: str, goes_on: bool) -> Any:
        if not is_chat(prompt):
            return prompt + new
        if not goes_on:
            return [*prompt, {"role": "assistant", "content": new}]
        last = prompt[-1]
        content = last["content"]
        if isinstance(content, str):
            made: Any = content + new
        else:
            made = [*content[:-1], {**content[-1], "text": content[-1]["text"] + new}]
        return [*prompt[:-1], {**last, "content": made}]
