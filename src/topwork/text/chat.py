"""`apply_chat_template`: chats to text or ids, as the template writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from topwork.errors import ConfigError
from topwork.text.encoding import Encoding
from topwork.text.template import TemplateError, render
from topwork.text.tokenizer import SPECIAL, Tokenizer
from topwork.text.tools import as_tools


def apply_chat_template(
    tokenizer: Tokenizer,
    conversation: Sequence[Any],
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[dict[str, Any]] | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    tokenize: bool = True,
    padding: bool | str = False,
    truncation: bool | str = False,
    max_length: int | None = None,
    return_tensors: str | None = None,
    return_dict: bool = False,
    return_assistant_tokens_mask: bool = False,
    tokenizer_kwargs: dict[str, Any] | None = None,
    **variables: Any,
) -> Any:
    """See `Tokenizer.apply_chat_template`."""
    source = chat_template or tokenizer.chat_template
    if source is None:
        raise ConfigError("this tokenizer has no chat template; pass chat_template")
    if continue_final_message and add_generation_prompt:
        raise ConfigError("continue_final_message and add_generation_prompt exclude each other")
    if return_assistant_tokens_mask and not (tokenize and return_dict):
        raise ConfigError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
    single = not conversation or isinstance(conversation[0], dict)
    chats = [conversation] if single else list(conversation)
    special = {n: getattr(tokenizer, n) for n in SPECIAL if getattr(tokenizer, n) is not None}
    variables = {"tools": as_tools(tools), "documents": documents, **special, **variables}
    texts = []
    for chat in chats:
        text = render(source, chat, add_generation_prompt=add_generation_prompt, **variables)
        texts.append(_open_end(text, chat) if continue_final_message else text)
    if not tokenize:
        return texts[0] if single else texts
    encoded = tokenizer(
        texts, add_special_tokens=False, truncation=truncation, max_length=max_length,
        **(tokenizer_kwargs or {}),
    )  # fmt: skip
    if return_assistant_tokens_mask:
        masks = _masks(tokenizer, chats, texts, source, variables)
        cut = [len(ids) for ids in encoded["input_ids"]]
        left = tokenizer.truncation_side == "left"
        encoded["assistant_masks"] = [
            mask[len(mask) - n :] if left else mask[:n] for mask, n in zip(masks, cut)
        ]
    padded = tokenizer.pad(
        encoded, padding=padding, max_length=max_length, return_tensors=return_tensors
    )
    if single and return_tensors is None:
        padded = Encoding({key: value[0] for key, value in padded.items()})
    return padded if return_dict else padded["input_ids"]


def _masks(
    tokenizer: Tokenizer,
    chats: list[Any],
    texts: list[str],
    source: str,
    variables: dict[str, Any],
) -> list[list[int]]:
    """1 for each token that an assistant turn of the chat has to write."""
    from topwork.text.spans import render_spans_batch

    spans = render_spans_batch(tokenizer, chats, chat_template=source, variables=variables)
    masks = []
    for span, text in zip(spans, texts):
        size = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not (text.startswith(span.text) or span.text.startswith(text)):
            raise TemplateError("the template ends this chat in another way: no mask for it")
        mask = span.mask()[:size]
        masks.append(mask + [0] * (size - len(mask)))
    return masks


def _open_end(text: str, chat: Sequence[Any]) -> str:
    """`text` up to the end of the last message's content."""
    content = chat[-1].get("content") or ""
    if not isinstance(content, str):  # a list of entries, images among them
        texts = [entry["text"] for entry in content if entry.get("type") == "text"]
        content = texts[-1] if texts else ""
    last = content.strip()
    at = text.rfind(last)
    if not last or at < 0:
        raise TemplateError("continue_final_message: the template changes the last message")
    # Trailing blanks of the message stay where the template keeps them.
    whole = content.lstrip()
    return text[:at] + (whole if text.startswith(whole, at) else last)
