"""Linear layers with weights of 4 or 8 bits."""

from topwork.quant.linear import QuantisedLinear, quantise

__all__ = ["QuantisedLinear", "quantise"]
