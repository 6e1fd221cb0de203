"""Text to token ids and back."""

from topwork.text.tokenizer import Encoding, Tokenizer

AutoTokenizer = Tokenizer

__all__ = ["AutoTokenizer", "Encoding", "Tokenizer"]
