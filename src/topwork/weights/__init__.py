"""Tensors on disk: reading shard by shard, checking, writing."""

from topwork.weights.files import LoadReport, load_weights, save_weights

__all__ = ["LoadReport", "load_weights", "save_weights"]
