"""Decoding: from a prompt to tokens."""

from topwork.generation.config import GenerationConfig
from topwork.generation.engine import Engine
from topwork.generation.generate import generate, transition_scores
from topwork.generation.loop import GenerateOutput, Streamer
from topwork.generation.request import Event, Request
from topwork.generation.stopping import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStrings,
)
from topwork.generation.streaming import TextIteratorStreamer, TextStreamer

__all__ = [
    "Engine", "Event", "GenerateOutput", "GenerationConfig", "LogitsProcessor",
    "LogitsProcessorList", "MaxLengthCriteria", "MaxTimeCriteria", "Request", "StopStrings",
    "StoppingCriteria", "StoppingCriteriaList", "Streamer", "TextIteratorStreamer", "TextStreamer",
    "generate", "transition_scores",
]  # fmt: skip
