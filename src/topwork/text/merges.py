"""The merges that a scored vocabulary implies (SentencePiece's BPE stores pieces, not merges)."""

from __future__ import annotations

from collections.abc import Mapping


def merges_of(scores: Mapping[str, float], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Each pair of pieces in `vocab` that makes a piece of `scores`, best score first.

    Of several pairs for one piece, the ones with the older parts come first.
    """
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                found.append((-score, vocab[piece], vocab[left], vocab[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]
