"""Tensors on disk: reading shard by shard, checking, writing."""

from topwork.weights.files import LoadReport, load_weights, save_weights
from topwork.weights.gguf import GgufFile

__all__ = ["GgufFile", "LoadReport", "load_weights", "save_weights"]
