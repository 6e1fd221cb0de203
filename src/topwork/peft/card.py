"""The README.md that is written beside an adapter: what it is, and on what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from topwork._version import __version__
from topwork.peft.config import PeftConfig

TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def write(folder: Path, config: PeftConfig, parameters: int) -> None:
    """Write README.md unless there is one."""
    path = folder / "README.md"
    if not path.exists():
        path.write_text(text(config, parameters), encoding="utf-8")


def text(config: PeftConfig, parameters: int) -> str:
    """A model card with the facts that are known."""
    method, base = str(config.peft_type), config.base_model_name_or_path
    head: dict[str, Any] = {"library_name": "peft"}
    tags = ["topwork", method.lower()]
    if base:
        head["base_model"] = base
        tags.insert(0, f"base_model:adapter:{base}")
    if config.task_type in TASKS:
        head["pipeline_tag"] = TASKS[str(config.task_type)]
    front = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    front += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    skip = set(vars(PeftConfig())) | {"peft_type"}
    rows = [
        f"| `{key}` | `{json.dumps(value, default=str)}` |"
        for key, value in config.to_dict().items()
        if key not in skip and value not in (None, {}, [])
    ]
    lines = ["---", *front, "---", "", f"# {method} adapter", ""]
    lines += [f"- Base model: {f'`{base}`' if base else 'not recorded'}"]
    if base and config.revision:
        lines += [f"- Revision of the base: `{config.revision}`"]
    lines += [
        f"- Numbers in the adapter: {parameters:,}",
        f"- Written by Topwork {__version__}",
        "",
    ]
    lines += ["| Setting | Value |", "|---|---|", *rows, ""]
    lines += ["```python", "import topwork", ""]
    lines += [f"base = topwork.AutoModelForCausalLM.from_pretrained({base or '…'!r})"]
    lines += [
        'model = topwork.PeftModel.from_pretrained(base, "path or id of this adapter")',
        "```",
    ]
    return "\n".join(lines) + "\n"
