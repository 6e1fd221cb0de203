"""Texts and chats, gone on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from topwork.errors import DataError
from topwork.pipelines.text import TextPipeline
from topwork.text.tokenizer import clean_up


class TextGenerationPipeline(TextPipeline):
    """`pipe(text or chat)` → [{"generated_text": …}], one for each returned sequence."""

    model_task = "causal-lm"

    def is_single(self, inputs: Any) -> bool:
        return isinstance(inputs, str) or is_chat(inputs)

    def run(
        self,
        items: list[Any],
        return_full_text: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        add_special_tokens: bool = True,
        return_tensors: bool = False,
        clean_up_tokenization_spaces: bool = False,
        **generation: Any,
    ) -> list[list[dict[str, Any]]]:
        """`return_full_text` False leaves the prompt out. `tools` are for chats. `return_tensors`
        gives `generated_token_ids` in place of texts, the prompt's first. All other options are
        those of `generate`; by default 256 tokens are sampled at temperature 0.7."""
        prompts = [self._prompt(i, item, tools, continue_final_message, add_special_tokens)
                   for i, item in enumerate(items)]  # fmt: skip
        options = self._options(generation)
        results: list[list[dict[str, Any]]] = [[] for _ in items]
        for group in self._groups(prompts, options):
            rows, mask = self._padded([prompts[i] for i in group])
            out = self.model.generate(rows, attention_mask=mask, **options)
            copies = len(out) // len(group)
            for place, ids in enumerate(out):
                i = group[place // copies]
                new = ids[rows.shape[1] :]
                if return_tensors:
                    results[i].append({"generated_token_ids": prompts[i] + new.tolist()})
                    continue
                text = self._shown(items[i], prompts[i], new, return_full_text)
                if clean_up_tokenization_spaces and isinstance(text, str):
                    text = clean_up(text)
                results[i].append({"generated_text": text})
        return results

    def _prompt(self, place: int, item: Any, tools: Any, goes_on: bool, special: bool) -> list[int]:
        if is_chat(item):
            last = item[-1].get("role") == "assistant"
            return self.tokenizer.apply_chat_template(
                item, tools=tools, add_generation_prompt=not (goes_on or last),
                continue_final_message=goes_on or last,
            )  # fmt: skip
        if not isinstance(item, str) or not item:
            what = "is empty" if item == "" else f"is {type(item).__name__}, not a text or a chat"
            raise DataError(f"input {place} {what}")
        ids = self.tokenizer(item, add_special_tokens=special)["input_ids"]
        limit = self.config.get("max_position_embeddings")
        if limit is not None and len(ids) > limit:
            raise DataError(
                f"input {place} has {len(ids)} tokens, the model's context is {limit}: shorten it"
            )
        return ids

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        file = self.base.generation_config
        options = dict(given)
        if not {"max_new_tokens", "max_length"} & (set(given) | set(file)):
            options["max_new_tokens"] = 256
        if "generation_config" not in given and not {"do_sample"} & (set(given) | set(file)):
            beams = given.get("num_beams", 1) > 1
            options |= {} if beams else {"do_sample": True, "temperature": 0.7}
            options |= {k: given[k] for k in ("temperature",) if k in given}
        if self.tokenizer.pad_token_id is not None:
            options.setdefault("pad_token_id", self.tokenizer.pad_token_id)
        if options.get("stop_strings"):
            options.setdefault("tokenizer", self.tokenizer)
        return options

    def _groups(self, prompts: list[list[int]], options: dict[str, Any]) -> Any:
        if options.get("streamer") is not None:
            return [[i] for i in range(len(prompts))]
        return self.groups([len(p) for p in prompts])

    def _padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        width, device = max(map(len, prompts)), self.base.device
        filler = self.tokenizer.pad_token_id or 0
        rows = torch.tensor([[filler] * (width - len(p)) + p for p in prompts], device=device)
        if all(len(p) == width for p in prompts):
            return rows, None
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        return rows, torch.tensor(mask, device=device)

    def _shown(self, item: Any, prompt: list[int], new: torch.Tensor, full: bool) -> Any:
        decode, ids = self.tokenizer.decode, new.tolist()
        before = decode(prompt, skip_special_tokens=True)
        text = decode(prompt + ids, skip_special_tokens=True)[len(before) :]
        if not is_chat(item):
            return item + text if full else text
        if not full:
            return text
        if item[-1].get("role") == "assistant":
            last = {**item[-1], "content": item[-1]["content"] + text}
            return [*item[:-1], last]
        return [*item, {"role": "assistant", "content": text}]


def is_chat(item: Any) -> bool:
    """Whether it is a list of messages."""
    return (
        isinstance(item, (list, tuple))
        and len(item) > 0
        and all(isinstance(m, Mapping) and "role" in m for m in item)
    )
