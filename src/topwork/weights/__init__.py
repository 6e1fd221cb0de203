"""Tensors on disk: reading shard by shard, names and layouts by a table, checking, writing."""

from topwork.weights.files import LoadReport, load_weights, pickled, save_weights, write_tensors
from topwork.weights.gguf import GgufFile
from topwork.weights.table import PLAIN, Convert, Pack, Rename, Table, Unpack, transposed

__all__ = [
    "PLAIN", "Convert", "GgufFile", "LoadReport", "Pack", "Rename", "Table", "Unpack",
    "load_weights", "pickled", "save_weights", "transposed", "write_tensors",
]  # fmt: skip
