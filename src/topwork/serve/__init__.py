"""A server that speaks OpenAI's protocol, and a page to talk to what is served."""

from topwork.serve.app import create_app
from topwork.serve.guard import Door
from topwork.serve.served import Limits, Served

__all__ = ["Door", "Limits", "Served", "create_app"]
