"""SmolVLM: Idefics 3 in small, with the decoder of SmolLM2."""

from topwork.models.families.idefics3 import CASES, MODELS

__all__ = ["CASES", "MODELS"]
