"""Decoding: from a prompt to tokens."""

from topwork.generation.config import GenerationConfig
from topwork.generation.generate import Streamer, generate

__all__ = ["GenerationConfig", "Streamer", "generate"]
