"""Tools from Python functions: the peer's JSON schemas, and errors that name the argument."""

from __future__ import annotations

import enum
from typing import Any, Literal, Optional, Union

import pytest
from transformers.utils import get_json_schema as theirs

from topwork.errors import DataError
from topwork.text.tools import as_tools, get_json_schema


class Unit(enum.Enum):
    CELSIUS = "C"
    KELVIN = "K"


def plain(a: int, b: float, c: str, d: bool, e: Any):
    """Do it.

    Args:
        a: an int
        b: a float: with a colon
        c: a text
        d: yes or no
        e: anything
    """


def nested(a: list[int], b: dict[str, list[float]], c: tuple[int, str], d: list, e: dict, f: tuple):
    """Several lines
    of summary.

    And a paragraph.

    Args:
        a: a list
            that goes on in a second line
        b: a mapping
        c: two things
        d: a list of anything
        e: an object
        f: a tuple
    """


def choices(a: Literal["x", "y"], b: Literal[1, "two", None], c: Unit, d: str, e: str = "tea"):
    """Pick.

    Args:
        a: a letter
        b: mixed
        c: the unit
        d: a drink (choices: ["tea", " coffee "])
        e: another (choices: ["tea"])

    Returns:
        What was picked.
    """


def unions(
    a: Optional[int],  # noqa: UP045
    b: int | str,
    c: Union[int, list[int], None] = None,  # noqa: UP007
    d: list[int] | dict[str, int] | None = None,
    e: list | tuple = (),
) -> list[str]:
    """Unions.

    Args:
        a: maybe
        b: either
        c: complex
        d: more complex
        e: same in JSON

    Returns:
        list[str]: some texts

    Raises:
        ValueError: never
    """
    return []


def nothing() -> None:
    """Takes nothing."""


class Holder:
    def method(self, x: int) -> float:
        """A method.

        Args:
            x: its argument
        """
        return float(x)


@pytest.mark.parametrize(
    "tool", [plain, nested, choices, unions, nothing, Holder.method, Holder().method]
)
def test_the_schema_equals_the_peer(tool):
    assert get_json_schema(tool) == theirs(tool)


def no_hint(a):
    """x

    Args:
        a: text
    """


def no_text(a: int, b: int):
    """x

    Args:
        a: text
    """


def odd_type(a: int, b: Holder):
    """x

    Args:
        a: text
        b: text
    """


def odd_tuple(a: tuple[int, ...]):
    """x

    Args:
        a: text
    """


def bad_choices(a: str):
    """x

    Args:
        a: text (choices: [tea])
    """


def no_docstring(a: int):
    pass


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        (no_hint, "no_hint: the argument 'a' has no type hint"),
        (no_text, "no_text: the docstring's Args do not describe 'b'"),
        (odd_type, "odd_type: the argument 'b': the type .*Holder.* has no JSON schema"),
        (odd_tuple, r"odd_tuple: the argument 'a': .*use list\[…\]"),
        (bad_choices, "bad_choices: the choices of 'a' are no JSON list"),
        (no_docstring, "no_docstring: a tool needs a docstring"),
        ("search", "a tool is a function or a JSON schema, not 'search'"),
    ],
)
def test_a_tool_that_cannot_be_described_is_refused_by_name(tool, words):
    with pytest.raises(DataError, match=words):
        as_tools([tool])
