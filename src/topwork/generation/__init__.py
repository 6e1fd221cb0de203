"""Decoding: from a prompt to tokens."""

from topwork.generation.config import GenerationConfig
from topwork.generation.engine import Engine
from topwork.generation.generate import generate
from topwork.generation.loop import GenerateOutput, Streamer
from topwork.generation.request import Event, Request
from topwork.generation.stopping import StopStrings
from topwork.generation.streaming import TextIteratorStreamer, TextStreamer

__all__ = [
    "Engine", "Event", "GenerateOutput", "GenerationConfig", "Request", "StopStrings", "Streamer",
    "TextIteratorStreamer", "TextStreamer", "generate",
]  # fmt: skip
