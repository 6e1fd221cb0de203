"""Decoding: from a prompt to tokens."""

from topwork.generation.config import GenerationConfig
from topwork.generation.engine import Engine
from topwork.generation.generate import generate
from topwork.generation.loop import GenerateOutput, Streamer
from topwork.generation.request import Event, Request

__all__ = [
    "Engine", "Event", "GenerateOutput", "GenerationConfig", "Request", "Streamer", "generate",
]  # fmt: skip
