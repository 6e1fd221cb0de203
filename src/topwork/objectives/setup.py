"""What every trainer does before it runs: load the model, add the adapter, tell data sets apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from topwork import hub
from topwork.errors import CheckpointError, ConfigError, nearest
from topwork.models import AutoModelForCausalLM
from topwork.nn.moe import RouterLoss
from topwork.objectives.vocabulary import extend, with_tokens
from topwork.peft import PeftConfig, PeftModel, get_peft_model
from topwork.text import AutoTokenizer, Tokenizer


def load_pair(
    model: nn.Module | str | Path, tokenizer: Tokenizer | None, args: Any,
    auto: Any = AutoModelForCausalLM, **options: Any,
) -> tuple[nn.Module, Tokenizer]:  # fmt: skip
    """The model, loaded by `auto` if it is a name, and its tokenizer as `args` say."""
    if tokenizer is not None and not hasattr(tokenizer, "eos_token_id"):
        raise ConfigError(
            f"processing_class is a {type(tokenizer).__name__}, but this trainer takes texts "
            "alone: pass its .tokenizer"
        )
    if isinstance(model, (str, Path)):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model, **where(args))
    model = load_model(model, args, auto, "model_init_kwargs", **options)
    found: Tokenizer = tokenizer or beside(model, AutoTokenizer)
    if args.chat_template is not None:
        found.chat_template = args.chat_template
    router_weight(model, getattr(args, "router_aux_loss_coef", None))
    extend(model, found, args)
    return model, found


def beside(model: Any, auto: Any) -> Any:
    """The tokenizer or processor in the place that a loaded model came from."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    place = getattr(inner, "name_or_path", "")
    try:
        if place:
            return auto.from_pretrained(place)
    except CheckpointError:  # there is none
        pass
    raise ConfigError("a model that is loaded already needs its tokenizer: processing_class=…")


def router_weight(model: Any, asked: float | None) -> float:
    """By what the routers' loss is multiplied; ConfigError for one that the model has not."""
    has: RouterLoss | None = getattr(model, "router_loss", None)
    if has is None and asked:
        raise ConfigError(
            f"router_aux_loss_coef={asked}, but {type(model).__name__} has no routers with a "
            "load-balancing loss"
        )
    if has is None:
        return 0.0
    return has.weight if asked is None else asked


def load_model(
    model: nn.Module | str | Path, args: Any, auto: Any = AutoModelForCausalLM,
    init: str | None = None, **options: Any,
) -> nn.Module:  # fmt: skip
    """`model` itself, or the one of this name, in the run's dtype unless the field `init` says
    otherwise. ConfigError for options to load what is loaded."""
    given = {} if init is None else getattr(args, init) or {}
    if isinstance(model, nn.Module):
        if given:
            raise ConfigError(f"{init}={given}: the model is loaded already; pass its name instead")
        return model
    dtype = {True: "bfloat16", False: "float32", None: "auto"}[args.bf16]
    return auto.from_pretrained(model, **{"dtype": dtype, **options, **given})


def load_teacher(
    model: nn.Module | str | Path, args: Any, auto: Any = AutoModelForCausalLM
) -> nn.Module:
    """`model` or the one of this name, frozen."""
    loaded = load_model(model, args, auto, "teacher_model_init_kwargs")
    return loaded.requires_grad_(False).eval()


def where(args: Any, init: str = "model_init_kwargs") -> dict[str, Any]:
    """What of the field `init` says where files are found: the tokenizer's are beside them."""
    return {k: v for k, v in (getattr(args, init) or {}).items() if k in hub.PLACES}


def adapted(model: nn.Module, config: PeftConfig | None, words: Sequence[int] = ()) -> nn.Module:
    """`model` with the adapter of `config`, if there is one; beside it the rows of the tokens
    `words` are trained."""
    if config is None:
        return model
    if isinstance(model, PeftModel):
        raise ConfigError("the model has an adapter already; leave peft_config out")
    return get_peft_model(model, with_tokens(config, model, words))


def named_sets(given: Any) -> Mapping[str, Any]:
    """Evaluation data by name: several sets as they are, a single one under ""."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        lists = [v for v in given.values() if isinstance(v, list)]
        if len(lists) < len(given) or all(v and isinstance(v[0], Mapping) for v in lists):
            return {name: rows for name, rows in given.items() if rows is not None}
    return {"": given}


def end_token(tokenizer: Tokenizer, eos_token: str | None) -> int | None:
    """The id that ends plain texts: the tokenizer's, unless `eos_token` names another."""
    if eos_token is None:
        return tokenizer.eos_token_id
    found = tokenizer.get_vocab().get(eos_token)
    if found is None:
        near = nearest(eos_token, tokenizer.get_vocab())
        raise ConfigError(f"eos_token={eos_token!r} is no token of the tokenizer{near}")
    return found


def one_of(name: str, value: Any, choices: Any) -> None:
    """ConfigError unless `value` is among `choices`."""
    if value not in choices:
        raise ConfigError(
            f"{name}={value!r}{nearest(str(value), choices)}; one of {', '.join(choices)}"
        )


def unread(args: Any, plain: Mapping[str, Sequence[Any]], owner: str) -> None:
    """ConfigError for a setting that `owner` does not read, unless it has one of the values that
    ask for nothing: name → those."""
    for name, values in plain.items():
        if getattr(args, name) not in values:
            raise ConfigError(f"{name}={getattr(args, name)!r} is not read by {owner}")


def at_least(name: str, value: float | None, low: float, above: bool = False) -> None:
    """ConfigError unless `value` is None or from `low` on (or `above` it)."""
    if value is not None and not (value > low if above else value >= low):
        raise ConfigError(f"{name}={value} must be {'above' if above else 'at least'} {low}")
