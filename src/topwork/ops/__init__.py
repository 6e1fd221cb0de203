"""The hot functions: each has one plain torch reference and faster variants beside it."""

from topwork.ops.activation import swiglu
from topwork.ops.attention import (
    Blocks,
    Layout,
    Lengths,
    Rule,
    ScoreTerms,
    Unshared,
    attention,
    is_branched,
    unshared,
)
from topwork.ops.blocks import decode_blocks, encode_blocks
from topwork.ops.dense import linear_gelu, sums_of_two
from topwork.ops.divergence import (
    Likeliest,
    divergence,
    hybrid_distance,
    sorted_distance,
    sparse_divergence,
    token_divergence,
)
from topwork.ops.dora import row_norms
from topwork.ops.experts import grouped_linear, load_balancing_loss, through_experts
from topwork.ops.few import few_linears
from topwork.ops.int8 import decode_rows, encode_rows, int8_linear, int8_product
from topwork.ops.likeliest import likeliest
from topwork.ops.logprobs import (
    TokenStatistics,
    token_logprobs,
    token_logprobs_of,
    token_logprobs_swapped,
    token_statistics,
)
from topwork.ops.lora import LinearParts, LoraTerm, lora_linear, lora_linears
from topwork.ops.memory import bound_primitive_cache
from topwork.ops.norm import rms_norm
from topwork.ops.packed import Packed, linear
from topwork.ops.rotary import rotary
from topwork.ops.scan import selective_scan

bound_primitive_cache()

__all__ = [
    "TokenStatistics",
    "Blocks",
    "Layout",
    "Lengths",
    "Likeliest",
    "LinearParts",
    "LoraTerm",
    "Packed",
    "Rule",
    "ScoreTerms",
    "Unshared",
    "attention",
    "decode_blocks",
    "decode_rows",
    "encode_blocks",
    "encode_rows",
    "hybrid_distance",
    "int8_linear",
    "int8_product",
    "divergence",
    "few_linears",
    "grouped_linear",
    "is_branched",
    "linear",
    "likeliest",
    "linear_gelu",
    "load_balancing_loss",
    "lora_linear",
    "lora_linears",
    "rms_norm",
    "rotary",
    "row_norms",
    "selective_scan",
    "sums_of_two",
    "swiglu",
    "through_experts",
    "sorted_distance",
    "sparse_divergence",
    "token_divergence",
    "token_logprobs",
    "token_logprobs_of",
    "token_logprobs_swapped",
    "token_statistics",
    "unshared",
]
