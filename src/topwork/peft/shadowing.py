"""The network that a shadow is: made, run over the text before the base, and taken out alone."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from topwork import hub, ops
from topwork.errors import ConfigError, nearest
from topwork.ops.recompute import Carried
from topwork.peft.invocation import laid
from topwork.peft.prompts import NAMES, sizes_of
from topwork.peft.scalings import TwinCache
from topwork.peft.targets import base_of
from topwork.peft.tensors import Matrix

SIZES = {
    "shadow_num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "shadow_hidden_size": ("hidden_size", "n_embd", "d_model"),
    "shadow_intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
    "shadow_num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
}
"""A mirror's sizes, and the keys that models' configurations have for them."""
STACKS = ("layers", "h")
PROJECTED = "causal_lm_with_hidden_projection"
"""The model_type of a shadow with a trained projection to a larger base's width."""


@dataclass(frozen=True)
class First:
    """The shadow's last hidden states [B, T, C]; `keep` [B, T]: the real tokens of padded rows."""

    state: Tensor
    keep: Tensor | None = None


FIRST: Carried[First] = Carried("topwork.shadow")


def first_state(x: Tensor) -> Tensor:
    """That of the tokens in a block's input `x` [B, T, C]."""
    found = FIRST.get()
    if found is None:
        raise ConfigError(
            "the shadow is not known here: call the PeftModel (or its backbone or generate)"
        )
    return laid(found.state, found.keep, x.shape).to(x.device)


# -- making it -----------------------------------------------------------------------------------


def is_ours(model: Any) -> bool:
    return type(model).__module__.startswith("topwork.")


def stack_of(model: Any) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks and their path; ConfigError for a model that shows none."""
    home = model.trunk if is_ours(model) else trunk_of(model)
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        found = getattr(home, "block_list", None)
        own = name in STACKS and (not parent or model.get_submodule(parent) is home)
        if isinstance(module, nn.ModuleList) and (module is found or own):
            return path, module
    raise ConfigError(f"{type(model).__name__} shows no stack of blocks; name them")


def trunk_of(model: Any) -> Any:
    """The decoder below the head of a model of transformers."""
    for name in ("model", "transformer", "base_model", "decoder"):
        found = getattr(model, name, None)
        if isinstance(found, nn.Module) and found is not model:
            return getattr(found, "decoder", None) or found
    return model


def width_of(model: Any) -> int:
    given = sizes_of(model)
    return next(int(given[name]) for name in NAMES["token_dim"] if given.get(name))


def made(config: Any, model: Any) -> dict[str, nn.Module]:
    """The shadow, what brings it to the base's width, and a classifier's head, by their names in
    files."""
    width, weight = width_of(model), None
    if config.shadow_model == "mirror":
        net = mirror(config, model)
        home = getattr(net, "decoder", net)  # OPT's; in files as if it were the whole
        if shares(config, net, width) and hasattr(home, "embed_tokens"):
            del home.embed_tokens
    else:
        net, weight = read(model, config.shadow_model)
        words = net.get_input_embeddings()  # not trained, but written
        words.register_buffer("weight", words._parameters.pop("weight").detach())
    if weight is None and width_of(net) != width:
        weight = nn.Linear(width_of(net), width, bias=False).weight.detach()
    elif weight is not None and weight.shape != (width, width_of(net)):
        raise ConfigError(
            f"{config.shadow_model} projects {weight.shape[1]} to {weight.shape[0]} numbers; its "
            f"own width is {width_of(net)}, the base's {width}"
        )
    found = {
        "shadow_backbone": net,
        "shadow_projection": nn.Identity() if weight is None else Matrix(weight),
    }
    head = next((h for n in ("score", "classifier") if (h := getattr(model, n, None))), None)
    if config.task_type == "SEQ_CLS" and head is not None:
        found["shadow_head"] = copy.deepcopy(base_of(head)).requires_grad_(True)
    like = next(p for p in model.parameters() if p.is_floating_point())
    return {key: module.to(like.device, like.dtype) for key, module in found.items()}


def shares(config: Any, net: Any, width: int) -> bool:
    """Whether the shadow reads the base's embeddings."""
    return config.share_embeddings and config.shadow_model == "mirror" and width_of(net) == width


def mirror(config: Any, model: Any) -> Any:
    """A fresh bare model of the base's family, with fewer blocks."""
    own = copy.deepcopy(model.config if is_ours(model) else trunk_of(model).config)
    own.__dict__.pop("quantization_config", None)
    sizes = own.to_dict()
    if "text_config" in sizes:
        raise ConfigError("SHADOW goes to models of text alone")
    for field, names in SIZES.items():
        value = getattr(config, field) or (1 if field == "shadow_num_hidden_layers" else None)
        name = next((n for n in names if n in sizes), None)
        if value is not None and name is None:
            raise ConfigError(f"{field}: the model's configuration has none of {', '.join(names)}")
        if value is not None:
            setattr(own, str(name), value)
    layers = config.shadow_num_hidden_layers or 1
    if kinds := list(sizes.get("layer_types") or []):
        own.layer_types = (kinds + kinds[-1:] * layers)[:layers]
    if (sizes.get("max_window_layers") or 0) > layers:
        own.max_window_layers = layers
    return library_of(model).AutoModel.from_config(own)


def read(model: Any, name: str) -> tuple[Any, Tensor | None]:
    """The shadow in a folder or Hub id, and its projection where it has one."""
    folder, library = hub.resolve(name, want=("config", "weights")).folder, library_of(model)
    values = hub.read_json(folder / "config.json")
    if values.get("model_type") != PROJECTED:
        return library.AutoModel.from_pretrained(folder), None
    inner = dict(values["shadow_model_config"])
    if is_ours(model):
        own = library.Config(**inner)
    else:
        own = library.AutoConfig.for_model(inner.pop("model_type"), **inner)
    tensors = load_file(folder / "model.safetensors")
    projection = tensors.pop("shadow_hidden_projection.weight", None)
    if projection is None:
        raise ConfigError(f"{name} has no shadow_hidden_projection.weight")
    net = library.AutoModel.from_config(own)
    net.load_state_dict({k.removeprefix("shadow_model."): t for k, t in tensors.items()})
    return net, projection


def library_of(model: Any) -> Any:
    """The library whose classes made `model`."""
    return sys.modules[type(model).__module__.partition(".")[0]]


# -- running it ----------------------------------------------------------------------------------


class Runner:
    """The shadow of the active adapter `name`, kept on `home`."""

    weighs: ClassVar[bool] = True

    def __init__(self, home: Any, name: str, config: Any) -> None:
        self.net, self.config = home.shadow_backbone[name], config
        self.projection = home.shadow_projection[name]
        heads = getattr(home, "shadow_head", {})
        self.classifier = next((head for owner, head in heads.items() if owner == name), None)

    def _given(self, model: Any, ids: Tensor | None, embeds: Tensor | None) -> dict[str, Any]:
        """The ids or embeddings that the shadow reads."""
        if embeds is None and shares(self.config, self.net, width_of(model)):
            embeds = model.get_input_embeddings()(ids)
        if embeds is None:
            return {"input_ids": ids}
        if embeds.shape[-1] != width_of(self.net):
            raise ConfigError(
                f"inputs_embeds are {embeds.shape[-1]} wide and the shadow {width_of(self.net)}: "
                "give input_ids"
            )
        return {"inputs_embeds": embeds}

    def _projected(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.projection.weight) if _projects(self.projection) else hidden

    def through(
        self,
        model: Any,
        input_ids: Tensor | None,
        *,
        inputs_embeds: Tensor | None = None,
        cache: Any = None,
        aside: list[Tensor] | None = None,
        **call: Any,
    ) -> Tensor:
        """The base's backbone with its shadow; hidden states [B, T, C]."""
        if cache is not None and not isinstance(cache, TwinCache):
            raise ConfigError("a shadow has a cache of its own; take the model's new_cache()")
        given = self._given(model, input_ids, inputs_embeds)
        state = self._projected(self.net.backbone(**given, cache=cache and cache.bare, **call))
        if aside is not None:
            aside.append(state)
        mask = call.get("attention_mask")
        keep = mask.bool() if mask is not None and mask.shape == state.shape[:2] else None
        token = FIRST.set(First(state, keep))
        try:
            return model.backbone(
                input_ids, inputs_embeds=inputs_embeds, cache=cache and cache.inner, **call
            )
        finally:
            FIRST.reset(token)

    def new_cache(self, model: Any, inner: Any, *args: Any, **kwargs: Any) -> TwinCache:
        return TwinCache(inner, self.net.new_cache(*args, **kwargs))

    @contextmanager
    def hooked(self, model: Any, aside: list[Tensor] | None = None) -> Iterator[None]:
        """Within it calls of `model`, of transformers, have the shadow."""

        def before(module: Any, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
            cache = call.get("past_key_values")
            if cache is None and call.get("use_cache"):
                cache = library_of(module).DynamicCache(config=module.config)
                call = {**call, "past_key_values": cache}
            past = None if cache is None else shadows_cache(module, cache)
            ids = args[0] if args else call.get("input_ids")
            seen = {k: call[k] for k in ("attention_mask", "position_ids") if k in call}
            seen |= self._given(module, ids, call.get("inputs_embeds"))
            found = self.net(**seen, past_key_values=past, use_cache=past is not None)
            state = self._projected(found[0])
            if aside is not None:
                aside.append(state)
            return First(state), call

        with FIRST.told_by(model, before):
            yield

    # -- its own loss ----------------------------------------------------------------------------

    def loss(self, model: Any, state: Tensor, call: dict[str, Any]) -> Tensor | None:
        """The mean loss of the shadow's own answers to the labels of a call. On our models it goes
        through the whole head, a scale or cap of logits too, where peft takes the linear alone."""
        labels, lengths = call["labels"], call.get("lengths")
        if self.classifier is not None:
            return _class_loss(self.classifier(_last(state, call)), labels)
        head = model.get_output_embeddings() if self.config.task_type == "CAUSAL_LM" else None
        if head is None:
            return None
        following = F.pad(labels, (0, 1), value=-100)[:, 1:]
        if lengths is not None:
            ends = torch.tensor(lengths, device=labels.device).cumsum(0) - 1
            following = following.index_fill(1, ends, -100)
        kept = following != -100
        head = getattr(model, "head", head) if is_ours(model) else head
        return -ops.token_logprobs_of(head, state[kept], following[kept]).mean()

    def total(self, model: Any, state: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """λ times the summed loss of the shadow's own answers in a flat row."""
        found = model.token_logprobs(state[0, positions], targets)
        return -found.sum() * self.config.auxiliary_loss_weight


def shadows_cache(model: Any, cache: Any) -> Any:
    """The shadow's own cache that goes with one of `model`, of transformers."""
    if cache not in _CACHES:
        if int(cache.get_seq_length()):
            raise ConfigError("past_key_values holds no shadow: call the PeftModel with use_cache")
        _CACHES[cache] = library_of(model).DynamicCache()
    return _CACHES[cache]


_CACHES: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def runner_of(home: Any, names: list[str], configs: dict[str, Any]) -> Runner | None:
    """That of the shadow among the active adapters `names`."""
    found = [name for name in names if configs[name].peft_type == "SHADOW"]
    if len(found) > 1:
        raise ConfigError(f"a base has one shadow at a time, not {', '.join(found)}")
    return Runner(home, found[0], configs[found[0]]) if found else None


def _projects(projection: nn.Module) -> bool:
    return hasattr(projection, "weight")


def _last(state: Tensor, call: dict[str, Any]) -> Tensor:
    """The states [documents, C] of each text's last real token."""
    if call.get("lengths") is not None:
        return state[0, torch.tensor(call["lengths"], device=state.device).cumsum(0) - 1]
    mask = call.get("attention_mask")
    if mask is None:
        return state[:, -1]
    places = torch.arange(mask.shape[1], device=mask.device) * mask.ne(0)
    return state[torch.arange(len(state), device=state.device), places.argmax(1)]


def _class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[-1] == 1:
        return F.mse_loss(logits[:, 0], labels.to(logits.dtype).view(-1))
    if not labels.is_floating_point():
        return F.cross_entropy(logits.float(), labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits, labels)


# -- taking it out -------------------------------------------------------------------------------


@torch.no_grad()
def unloaded(peft_model: Any, name: str) -> Any:
    """The shadow of the adapter `name` as a model of its own family, which needs neither the base
    nor its blocks: its projection is multiplied into the base's head."""
    home, model = peft_model.base_model, peft_model.get_base_model()
    config = peft_model.peft_config.get(name)
    if config is None or config.peft_type != "SHADOW":
        raise ConfigError(f"there is no shadow {name!r}{nearest(name, peft_model.peft_config)}")
    net, projection = home.shadow_backbone[name], home.shadow_projection[name]
    classes = config.task_type == "SEQ_CLS"
    head: Any = home.shadow_head[name] if classes else base_of(model.get_output_embeddings())
    whole = head.weight @ projection.weight if _projects(projection) else head.weight
    own = copy.deepcopy(net.config)
    own.tie_word_embeddings = False
    if classes:
        own.num_labels, own.id2label = len(whole), {i: f"LABEL_{i}" for i in range(len(whole))}
    task = "SequenceClassification" if classes else "CausalLM"
    made = getattr(library_of(model), f"AutoModelFor{task}").from_config(own)
    trunk = made.trunk if is_ours(made) else trunk_of(made)
    trunk.load_state_dict(net.state_dict(), strict=False)
    if shares(config, net, width_of(model)):
        words = base_of(model.get_input_embeddings())
        made.get_input_embeddings().weight.copy_(words.weight)
    last = made.score if classes else made.get_output_embeddings()
    last.weight.copy_(whole)
    if getattr(head, "bias", None) is not None:
        last.bias.copy_(head.bias)
    return made.to(head.weight.device, head.weight.dtype).eval()
