"""A checkpoint's files: found in a folder or on the Hub, and put there."""

from topwork.hub.resolve import PLACES, Checkpoint, read_json, resolve
from topwork.hub.upload import upload

__all__ = ["PLACES", "Checkpoint", "read_json", "resolve", "upload"]
