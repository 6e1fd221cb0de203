"""What the families with experts read alike."""

from __future__ import annotations

from typing import Any

from topwork.models.config import ConfigReader
from topwork.nn.layers import MlpSpec
from topwork.nn.moe import ExpertsSpec, MoeSpec, RouterLoss, SoftmaxRouter
from topwork.weights import Pack, Table

# Per expert in the file, stacked in memory.
PER_EXPERT = (
    Pack(
        ("mlp.experts.#.gate_proj.weight", "mlp.experts.#.up_proj.weight"),
        "mlp.experts.gate_up_proj",
    ),
    Pack(("mlp.experts.#.down_proj.weight",), "mlp.experts.down_proj"),
)
TABLE = Table(PER_EXPERT)


def router_loss(read: ConfigReader, default: float = 0.001) -> RouterLoss:
    """The routers' loss; `default` is the family's weight."""
    weight = float(read("router_aux_loss_coef", default))
    return RouterLoss(weight, bool(read("output_router_logits", False)))


def sparse_layers(read: ConfigReader) -> list[bool]:
    """Qwen's choice of layers with experts: every so many, less those named."""
    step, dense = read("decoder_sparse_step", 1), read("mlp_only_layers", [])
    return [i not in dense and (i + 1) % step == 0 for i in range(read.need("num_hidden_layers"))]


def softmax_experts(read: ConfigReader, count: int, width: int, **fields: Any) -> MoeSpec:
    """Experts behind a softmax router whose weights may be made to sum to one."""
    router = SoftmaxRouter(read.need("num_experts_per_tok"), read("norm_topk_prob", False))
    return MoeSpec(ExpertsSpec(count, width, read("hidden_act", "silu")), router, **fields)


def mixed(read: ConfigReader, moe: MoeSpec, dense: MlpSpec) -> list[MoeSpec | MlpSpec]:
    """The experts on the sparse layers, the plain MLP on the others."""
    return [moe if sparse else dense for sparse in sparse_layers(read)]
