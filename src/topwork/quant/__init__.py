"""Linear layers whose weights are held in few bits."""

from topwork.quant.blocks import Blocks
from topwork.quant.config import BitsAndBytesConfig, Summary, prepare
from topwork.quant.linear import QuantisedLinear, dequantise, quantise
from topwork.quant.rows import Rows
from topwork.quant.tiles import Tiles

__all__ = [
    "BitsAndBytesConfig", "Blocks", "QuantisedLinear", "Rows", "Summary", "Tiles", "dequantise",
    "prepare", "quantise",
]  # fmt: skip
