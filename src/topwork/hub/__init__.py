"""Finding a checkpoint's files: a folder or a model of the Hub."""

from topwork.hub.resolve import Checkpoint, read_json, resolve

__all__ = ["Checkpoint", "read_json", "resolve"]
