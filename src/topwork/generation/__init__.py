"""Decoding: from a prompt to tokens."""

from topwork.generation.config import GenerationConfig
from topwork.generation.generate import generate
from topwork.generation.loop import GenerateOutput, Streamer

__all__ = ["GenerateOutput", "GenerationConfig", "Streamer", "generate"]
