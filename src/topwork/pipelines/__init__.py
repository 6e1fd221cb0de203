"""Tasks in one call: a text, an image or a sound in, an answer out."""

from topwork.pipelines.base import KeyDataset, Pipeline
from topwork.pipelines.factory import TASKS, pipeline

__all__ = ["KeyDataset", "Pipeline", "TASKS", "pipeline"]
