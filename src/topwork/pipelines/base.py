"""What all pipelines share: one input, lists and streams of them, options, adapters."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch

from topwork.errors import ConfigError, DataError, nearest
from topwork.peft import PeftModel

WINDOW = 256  # items of a generator that are looked at together


class Pipeline:
    """Things in, answers out, in the order they came in.

    One input gives one result, a list a list; a generator or any other iterable is read as the
    results are taken. A pipeline says what its model is for (`model_task`; of several the first
    that the model's family has), what it `needs` beside the model, each an attribute of that name
    ("tokenizer", "image_processor", "feature_extractor", "processor"), and what it `takes`; `run`
    does the work.
    """

    model_task: ClassVar[str | tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[str] = "inputs"
    run: Callable[..., list[Any]]  # (items, the task's options) → one result for each item
    task: str = ""
    defaults: Mapping[str, Any] = {}
    """Options that every call has unless it says otherwise."""

    def __init__(self, model: Any, batch_size: int | None = None, **readers: Any) -> None:
        self.model, self.batch_size = model.eval(), checked_size(batch_size)
        for name in self.needs:
            setattr(self, name, readers[name])

    # -- calling ---------------------------------------------------------------------------------

    def __call__(
        self, inputs: Any, *, adapter: str | None = None, batch_size: int | None = None,
        num_workers: int | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """The results; `adapter` names the one to use from now on, `batch_size` is this call's.

        Options are the task's. `num_workers` has no effect: inputs are read in this process.
        """
        if adapter is not None:
            self.set_adapter(adapter)
        if batch_size is not None:
            found = copy.copy(self)
            found.batch_size = checked_size(batch_size)
            return found(inputs, **options)
        self.check(options)
        if self.is_single(inputs):
            return self.results([inputs], options)[0]
        if isinstance(inputs, (list, tuple)) or hasattr(inputs, "shape"):
            return self.results(list(inputs), options)
        if not isinstance(inputs, Iterable) and not hasattr(inputs, "__getitem__"):
            raise DataError(
                f"{type(self).__name__} takes {self.takes}, got {type(inputs).__name__}"
            )
        return self._stream(iter(inputs), options)

    def _stream(self, items: Iterator[Any], options: dict[str, Any]) -> Iterator[Any]:
        while window := list(islice(items, WINDOW)):
            yield from self.results(window, options)

    def results(self, items: list[Any], options: dict[str, Any]) -> list[Any]:
        if not items:
            return []
        options = {**self.defaults, **options}
        with torch.inference_mode():
            return self.run(items, **options)

    def check(self, options: Mapping[str, Any]) -> None:
        """ConfigError for an option that `run` does not have."""
        known = [p.name for p in inspect.signature(self.run).parameters.values()]
        if "generation" in known:
            return
        for name in options:
            if name not in known[1:]:
                raise ConfigError(
                    f"{type(self).__name__} has no option {name!r}{nearest(name, known[1:])}; "
                    f"it has {', '.join(known[1:])}"
                )

    def is_single(self, inputs: Any) -> bool:
        """Whether `inputs` is one input rather than several."""
        return isinstance(inputs, (str, Mapping))

    # -- adapters --------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        return list(self.model.peft_config) if isinstance(self.model, PeftModel) else []

    def load_adapter(self, path: str | Path, name: str = "default") -> None:
        """Load an adapter; the first one is used at once, later ones after `set_adapter`."""
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(path, name)
        else:
            self.model = PeftModel.from_pretrained(self.model, path, name)
        self.model.eval()

    def set_adapter(self, name: str) -> None:
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ConfigError(f"no adapter {name!r} is loaded{nearest(name, self.adapters)}; "
                              f"there are: {known}")  # fmt: skip
        self.model.set_adapter(name)

    @property
    def base(self) -> Any:
        """The model below the adapters."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def generation_config(self) -> Any:
        """What the model's files say of generation; set its attributes to say otherwise."""
        return self.base.generation_config

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model and what reads its inputs into `folder`."""
        for part in (self.model, *(getattr(self, name) for name in self.needs)):
            part.save_pretrained(folder)

    def label(self, index: int) -> str:
        names = self.config.get("id2label") or {}
        return names.get(str(index), names.get(index, f"LABEL_{index}"))


def checked_size(batch_size: int | None) -> int | None:
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    return batch_size


class KeyDataset:
    """One column of a data set as a list of inputs."""

    def __init__(self, dataset: Any, key: str) -> None:
        self.dataset, self.key = dataset, key

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if index >= len(self.dataset):
            raise IndexError(index)
        return self.dataset[index][self.key]
