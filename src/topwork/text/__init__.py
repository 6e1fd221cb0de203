"""Text to token ids and back, chats to text, and which tokens the model has to write."""

from topwork.text.encoding import Encoding
from topwork.text.spans import Rendered, Turn, render_spans, render_spans_batch
from topwork.text.template import TemplateError
from topwork.text.tokenizer import Tokenizer

AutoTokenizer = Tokenizer

__all__ = [
    "AutoTokenizer",
    "Encoding",
    "Rendered",
    "TemplateError",
    "Tokenizer",
    "Turn",
    "render_spans",
    "render_spans_batch",
]
