"""Processors of images in texts: placeholders as long as each image's features, and both encoded.

What differs between families is how one placeholder is written out (a `Style`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from topwork import hub
from topwork.errors import ConfigError, DataError
from topwork.media.image_processor import AutoImageProcessor, ImageProcessor, Prepared
from topwork.media.images import is_one
from topwork.text import Tokenizer
from topwork.text.encoding import Encoding

FILE = "processor_config.json"
TOKENS = ("image_token", "boi_token", "eoi_token", "fake_image_token", "global_image_token")


class Style(Protocol):
    """How a family writes images into texts. `chats`: whether these may be chats; if not, they are
    a prompt and an answer."""

    chats: ClassVar[bool]

    @property
    def class_name(self) -> str: ...

    def placeholder(self, of: ImageTextProcessor) -> str | None:
        """What stands for an image in a text; None: images stand beside it."""
        ...

    def inside(self, of: ImageTextProcessor) -> str | None:
        """The token that an image's features stand for."""
        ...

    def written(self, of: ImageTextProcessor, image: Prepared) -> str:
        """The placeholder of `image`, written out."""
        ...

    def text(self, of: ImageTextProcessor, text: str) -> str:
        """A text before its placeholders are written out."""
        ...

    def finish(self, of: ImageTextProcessor, columns: dict[str, Any]) -> None:
        """Add what the family's models read besides."""

    def types(self, trained: np.ndarray) -> np.ndarray | None:
        """What the family's models read besides for a text [T] of which these tokens are trained,
        as `token_type_ids`; None: nothing."""
        ...


@dataclass(frozen=True)
class Beside:
    """Images stand beside the text (BLIP, ViLT, CLIP)."""

    class_name: str
    typed: bool = True
    chats: ClassVar[bool] = True

    def placeholder(self, of: ImageTextProcessor) -> str | None:
        return None

    def inside(self, of: ImageTextProcessor) -> str | None:
        return self.placeholder(of)

    def written(self, of: ImageTextProcessor, image: Prepared) -> str:
        return ""

    def text(self, of: ImageTextProcessor, text: str) -> str:
        return text

    def finish(self, of: ImageTextProcessor, columns: dict[str, Any]) -> None:
        if not self.typed:
            columns.pop("token_type_ids", None)

    def types(self, trained: np.ndarray) -> np.ndarray | None:
        return None


@dataclass(frozen=True)
class Repeated(Beside):
    """One token for each patch (LLaVA)."""

    class_name: str = "LlavaProcessor"

    def placeholder(self, of: ImageTextProcessor) -> str | None:
        return of.token("image_token", "<image>")

    def written(self, of: ImageTextProcessor, image: Prepared) -> str:
        patch = of.options.get("patch_size")
        if not patch:
            raise ConfigError(f"{FILE} lacks patch_size, the pixels along a patch's side")
        high, wide = image.tiles[0].shape[:2]
        count = (high // patch) * (wide // patch)
        count += of.options.get("num_additional_image_tokens", 0)
        count -= of.options.get("vision_feature_select_strategy") == "default"
        return str(self.placeholder(of)) * count


@dataclass(frozen=True)
class Patches(Beside):
    """One token for each merged square (Qwen2-VL), told apart in `mm_token_type_ids`."""

    class_name: str = "Qwen2VLProcessor"

    def placeholder(self, of: ImageTextProcessor) -> str | None:
        return of.token("image_token", "<|image_pad|>")

    def written(self, of: ImageTextProcessor, image: Prepared) -> str:
        patches = image.facts["rows"] * image.facts["cols"]
        return str(self.placeholder(of)) * (patches // of.image_processor.merge_size**2)

    def finish(self, of: ImageTextProcessor, columns: dict[str, Any]) -> None:
        columns["mm_token_type_ids"] = of.marked(columns["input_ids"], str(self.placeholder(of)))


@dataclass(frozen=True)
class Squares(Beside):
    """An image between its own tokens (Gemma 3); its tokens have the type 1."""

    class_name: str = "Gemma3Processor"

    def placeholder(self, of: ImageTextProcessor) -> str | None:
        return of.token("boi_token", "<start_of_image>")

    def inside(self, of: ImageTextProcessor) -> str | None:
        return of.token("image_token", "<image_soft_token>")

    def written(self, of: ImageTextProcessor, image: Prepared) -> str:
        tokens = str(self.inside(of)) * of.length(256)
        end = of.token("eoi_token", "<end_of_image>")
        return f"\n\n{self.placeholder(of)}{tokens}{end}\n\n"

    def finish(self, of: ImageTextProcessor, columns: dict[str, Any]) -> None:
        columns["token_type_ids"] = of.marked(columns["input_ids"], str(self.inside(of)))


@dataclass(frozen=True)
class Before(Beside):
    """Images before the prompt, which ends with a line break; what follows it has the type 1
    (PaliGemma)."""

    class_name: str = "PaliGemmaProcessor"
    chats: ClassVar[bool] = False

    def placeholder(self, of: ImageTextProcessor) -> str | None:
        return of.token("image_token", "<image>")

    def written(self, of: ImageTextProcessor, image: Prepared) -> str:
        return str(self.placeholder(of)) * of.length(256)

    def text(self, of: ImageTextProcessor, text: str) -> str:
        token = str(self.placeholder(of))
        if token not in text:
            raise DataError(f"{text!r} has no {token}: write one for each image before the prompt")
        end = text.rfind(token) + len(token)
        return f"{text[:end]}{of.tokenizer.bos_token}{text[end:]}\n"

    def finish(self, of: ImageTextProcessor, columns: dict[str, Any]) -> None:
        pairs = zip(columns["input_ids"], columns["token_type_ids"])
        columns["labels"] = [[i if t else -100 for i, t in zip(*row)] for row in pairs]

    def types(self, trained: np.ndarray) -> np.ndarray | None:
        return np.maximum.accumulate(trained).astype(np.int64)


@dataclass(frozen=True)
class Tiles(Beside):
    """Tiles by row and column, then the whole image (Idefics 3, SmolVLM)."""

    class_name: str = "Idefics3Processor"

    def placeholder(self, of: ImageTextProcessor) -> str | None:
        return of.token("image_token", "<image>")

    def written(self, of: ImageTextProcessor, image: Prepared) -> str:
        around = of.token("fake_image_token", "<fake_token_around_image>")
        tokens = str(self.placeholder(of)) * of.length(169)
        whole = of.token("global_image_token", "<global-img>")
        whole = f"{around}{whole}{tokens}{around}"
        rows, cols = image.facts["rows"], image.facts["cols"]
        if not rows:
            return whole
        lines = [
            "".join(f"{around}<row_{i + 1}_col_{j + 1}>{tokens}" for j in range(cols)) + "\n"
            for i in range(rows)
        ]
        return "".join(lines) + "\n" + whole


STYLES: dict[str, Style] = {
    "BlipProcessor": Beside("BlipProcessor", typed=False),
    "CLIPProcessor": Beside("CLIPProcessor"),
    "Gemma3Processor": Squares(),
    "Idefics3Processor": Tiles(),
    "LlavaProcessor": Repeated(),
    "PaliGemmaProcessor": Before(),
    "Qwen2VLProcessor": Patches(),
    "Qwen2_5_VLProcessor": Patches("Qwen2_5_VLProcessor"),
    "SiglipProcessor": Beside("SiglipProcessor"),
    "SmolVLMProcessor": Tiles("SmolVLMProcessor"),
    "ViltProcessor": Beside("ViltProcessor"),
}
OF_MODELS = {
    "blip": "BlipProcessor", "clip": "CLIPProcessor", "gemma3": "Gemma3Processor",
    "idefics3": "Idefics3Processor", "llava": "LlavaProcessor", "paligemma": "PaliGemmaProcessor",
    "qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "siglip": "SiglipProcessor", "smolvlm": "SmolVLMProcessor", "vilt": "ViltProcessor",
}  # fmt: skip
OPTIONS = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy",
           "image_seq_len", "image_seq_length", *TOKENS)  # fmt: skip


@dataclass
class ImageTextProcessor:
    """Images and texts → what one model reads. `options`: those of processor_config.json."""

    image_processor: ImageProcessor
    tokenizer: Tokenizer
    style: Style
    options: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None

    # -- what styles ask -------------------------------------------------------------------------

    def token(self, name: str, usual: str) -> str:
        """The special token called `name`."""
        extra = self.tokenizer.config.get("extra_special_tokens")
        named = extra if isinstance(extra, Mapping) else {}
        found = self.tokenizer.config.get(name) or named.get(name) or self.options.get(name)
        found = found.get("content") if isinstance(found, Mapping) else found
        return found or usual

    def length(self, usual: int) -> int:
        """How many tokens an image (or a tile) has."""
        return self.options.get("image_seq_len") or self.options.get("image_seq_length") or usual

    def marked(self, rows: Sequence[Sequence[int]], token: str) -> list[list[int]]:
        """1 where a row has `token`."""
        wanted = self.tokenizer.convert_tokens_to_ids(token)
        return [[int(i == wanted) for i in row] for row in rows]

    # -- calling ---------------------------------------------------------------------------------

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        suffix: str | Sequence[str] | None = None,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        **image_options: Any,
    ) -> Encoding:
        """What the model reads of `images` (one, a list, or a list for each text) and `text`.

        `suffix`: the answers to train on (PaliGemma). DataError where the number of placeholders
        in the texts is not that of the images, or a text is cut within an image.
        """
        if images is None and text is None:
            raise ConfigError("a processor needs images or text")
        found: dict[str, Any] = {}
        prepared: list[Prepared] = []
        if images is not None:
            found, prepared = self.image_processor.read(
                self._grouped(images, text), **image_options
            )
        columns: dict[str, Any] = {}
        if text is not None:
            single = isinstance(text, str)
            texts = self._written([text] if single else list(text), prepared, images)
            pair = [suffix] if isinstance(suffix, str) else suffix
            if pair is not None:
                pair = [f"{one}{self.tokenizer.eos_token}" for one in pair]
            types = True if isinstance(self.style, Before) else None
            columns = dict(
                self.tokenizer(
                    texts, pair, padding=padding, truncation=truncation, max_length=max_length,
                    add_special_tokens=add_special_tokens, return_token_type_ids=types,
                )
            )  # fmt: skip
            self._check_whole(texts, columns["input_ids"])
            self.style.finish(self, columns)
            if single and self.style.placeholder(self) is None and return_tensors is None:
                columns = {key: value[0] for key, value in columns.items()}
        return as_tensors({**columns, **found}, return_tensors, padding)

    def _grouped(self, images: Any, text: Any) -> Any:
        """A flat list of images by the texts that they stand in."""
        token = self.style.placeholder(self)
        if token is None or text is None or isinstance(text, str):
            return images
        flat = not is_one(images) and all(is_one(one) for one in images)
        counts = [one.count(token) for one in text]
        if not flat or sum(counts) != len(images):
            return images
        rest = list(images)
        return [[rest.pop(0) for _ in range(count)] for count in counts]

    def _written(self, texts: list[str], prepared: list[Prepared], images: Any) -> list[str]:
        token = self.style.placeholder(self)
        if token is None:
            return texts
        counts = [text.count(token) for text in texts]
        if sum(counts) != len(prepared):
            raise DataError(
                f"the texts have {sum(counts)} placeholders {token!r}, but {len(prepared)} images "
                "were given"
            )
        lists: list[Any] = [] if images is None or is_one(images) else list(images)
        nested = not all(is_one(one) for one in lists)
        for i, (count, own) in enumerate(zip(counts, lists if nested else [])):
            if count != (1 if is_one(own) else len(own)):
                raise DataError(
                    f"text {i} has {count} placeholders {token!r}, but {len(own)} images"
                )
        made, at = [], 0
        for text in texts:
            first, *rest = self.style.text(self, text).split(token)
            pieces = [first]
            for piece in rest:
                pieces += [self.style.written(self, prepared[at]), piece]
                at += 1
            made.append("".join(pieces))
        return made

    def _check_whole(self, texts: list[str], rows: Sequence[Sequence[int]]) -> None:
        token = self.style.inside(self)
        wanted = None if token is None else self.tokenizer.core.token_to_id(token)
        if token is None or wanted is None:
            return
        for i, (text, ids) in enumerate(zip(texts, rows)):
            left = list(ids).count(wanted)
            if text.count(token) != left:
                raise DataError(
                    f"text {i} needs {text.count(token)} image tokens, but {left} are left: it was "
                    "cut within an image, raise max_length"
                )

    # -- chats -----------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """A chat (or a batch) as the template writes it; with `tokenize` ids, with `return_dict`
        all that the model reads.

        An image is an entry {"type": "image"} of a message's content, with the image under
        "image", "path", "url" or "base64". `options` as for a tokenizer's; `processor_kwargs` are
        those of a call.
        """
        single = isinstance(conversation[0], Mapping)
        chats = [conversation] if single else list(conversation)
        template = options.pop("chat_template", None) or self.chat_template
        texts = self.tokenizer.apply_chat_template(
            [[listed(message) for message in chat] for chat in chats],
            tokenize=False, chat_template=template, **options,
        )  # fmt: skip
        if not tokenize:
            return texts[0] if single else texts
        call = dict(processor_kwargs or {})
        bos = self.tokenizer.bos_token
        if bos is not None and texts[0].startswith(bos):
            call["add_special_tokens"] = False
        images = [images_of(chat) for chat in chats]
        made = self(
            images if any(images) else None, texts[0] if single else texts,
            return_tensors=return_tensors, **call,
        )  # fmt: skip
        return made if return_dict else made["input_ids"]

    # -- back and files --------------------------------------------------------------------------

    def decode(self, ids: Any, **options: Any) -> Any:
        """The text of ids; see the tokenizer."""
        return self.tokenizer.decode(ids, **options)

    def batch_decode(self, rows: Any, **options: Any) -> list[str]:
        """The text of each row."""
        return self.tokenizer.batch_decode(rows, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files of all parts into `folder`."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        values = {**self.options, "processor_class": self.style.class_name}
        if "image_seq_length" in values:  # where PaliGemma's is looked for
            path = Path(folder) / "preprocessor_config.json"
            images = {**self.image_processor.to_dict(), **values}
            path.write_text(json.dumps(images, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (Path(folder) / FILE).write_text(text, encoding="utf-8")
        if self.chat_template is not None:
            path = Path(folder) / "chat_template.jinja"
            path.write_text(self.chat_template, encoding="utf-8")

    @classmethod
    def from_checkpoint(cls, files: hub.Checkpoint, name: str | Path, **where: Any) -> Any:
        """The processor that the files of a folder or Hub id describe; None where they are of no
        images in texts."""
        values: dict[str, Any] = {}
        for file in ("preprocessor_config.json", FILE):
            if file in files.files:
                found = files.json(file)
                values |= {**(found.get("image_processor") or {}), **found}
        kind = values.get("processor_class")
        if kind is None and "config.json" in files.files:
            kind = OF_MODELS.get(files.json("config.json").get("model_type", ""))
        if kind not in STYLES:
            return None
        options = {key: values[key] for key in OPTIONS if values.get(key) is not None}
        if not isinstance(STYLES[kind], Repeated):  # elsewhere it is the image processor's
            options.pop("patch_size", None)
        tokenizer = Tokenizer.from_pretrained(name, **where)
        template = None
        if "chat_template.json" in files.files:
            template = files.json("chat_template.json").get("chat_template")
        if isinstance(STYLES[kind], Before):
            tokenizer = _of_paligemma(tokenizer)
        images = AutoImageProcessor.from_pretrained(name, **where)
        return cls(images, tokenizer, STYLES[kind], options, template or tokenizer.chat_template)


def _of_paligemma(tokenizer: Tokenizer) -> Tokenizer:
    """With tokens for places and segments, and without one of its own at either end."""
    if tokenizer.core.token_to_id("<image>") is None:
        tokenizer.add_tokens(["<image>"], special=True)
    places = [f"<loc{i:0>4}>" for i in range(1024)] + [f"<seg{i:0>3}>" for i in range(128)]
    tokenizer.add_tokens(places)
    return tokenizer


def listed(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is a list of entries, as the templates of these models read it."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    return dict(message)


def images_of(chat: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The images of a chat, in order."""
    found = []
    for message in chat:
        content = message.get("content")
        for entry in content if isinstance(content, (list, tuple)) else ():
            if not isinstance(entry, Mapping) or entry.get("type") not in ("image", "image_url"):
                continue
            source = entry.get("image_url")
            source = source.get("url") if isinstance(source, Mapping) else source
            if entry.get("base64"):
                source = f"data:image/;base64,{entry['base64']}"
            for key in ("image", "path", "url"):
                source = source if source is not None else entry.get(key)
            if source is not None:
                found.append(source)
    return found


def as_tensors(found: dict[str, Any], kind: str | None, padding: bool | str) -> Encoding:
    """All columns as tensors; ConfigError for texts of different lengths."""
    if kind is None:
        return Encoding(found)
    if kind not in ("pt", "np"):
        raise ConfigError(f"return_tensors={kind!r}; 'pt' or 'np'")
    made: dict[str, Any] = {}
    for key, rows in found.items():
        if not isinstance(rows, np.ndarray):
            if len({np.shape(row) for row in rows}) > 1:
                what = "images of different sizes" if "pixel" in key else "texts of other lengths"
                raise ConfigError(f"{key}: {what} are no tensor; pass padding=True or resize them")
            rows = np.stack([np.asarray(row) for row in rows])
        made[key] = np.ascontiguousarray(rows)
    if kind == "np":
        return Encoding(made)
    import torch

    return Encoding({key: torch.from_numpy(rows) for key, rows in made.items()})
