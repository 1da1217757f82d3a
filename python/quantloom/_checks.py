"""Checks of plain arguments: each raises an error that names the argument, what was given and what is
expected."""

from __future__ import annotations

import json
import math
import operator
import os
from pathlib import Path
from typing import Any


def type_name(value: Any) -> str:
    return type(value).__name__


def integer(name: str, value: Any, low: int | None = None, expected: str = "an integer") -> int:
    """An int (NumPy integers count, bools do not), at least `low`."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: got bool, expected {expected}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {type_name(value)}, expected {expected}") from None
    if low is not None and number < low:
        raise ValueError(f"{name}: got {number}, expected {expected} >= {low}")
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name}: got {number}, expected {expected} of at most 64 bits")
    return number


def integers(name: str, values: Any) -> list[int]:
    """A list of the integers of a sequence."""
    try:
        entries = list(values)
    except TypeError:
        raise TypeError(f"{name}: got {type_name(values)}, expected a sequence of integers") from None
    return [integer(name, entry) for entry in entries]


def real(name: str, value: Any, expected: str = "a finite number") -> float:
    """A finite float."""
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{name}: got {type_name(value)}, expected {expected}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {type_name(value)}, expected {expected}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {number}, expected {expected}")
    return number


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type_name(value)}, expected True or False")
    return value


def string(name: str, value: Any, expected: str = "a string") -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {type_name(value)}, expected {expected}")
    return value


def path(name: str, value: Any) -> Path:
    """A path given as a string, bytes or a path."""
    try:
        text = os.fspath(value)
    except TypeError:
        raise TypeError(f"{name}: got {type_name(value)}, expected a string or a path") from None
    text = os.fsdecode(text)
    if not text or "\0" in text:
        raise ValueError(f"{name}: got {text!r}, expected the name of a file or folder")
    return Path(text)


def choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if not isinstance(value, type(choices[0])):
        raise TypeError(f"{name}: got {type_name(value)}, expected {' or '.join(map(repr, choices))}")
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected {' or '.join(map(repr, choices))}")
    return value


def thread_count(value: Any) -> int:
    number = integer("threads", value, 0, "0 (OpenMP's default) or a number of threads")
    if number > 4096:
        raise ValueError(f"threads: got {number}, expected at most 4096")
    return number


def json_object(name: str, text: Any) -> dict[str, Any]:
    string(name, text, "a JSON object as text")
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: got text that is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{name}: got JSON {type_name(fields)}, expected an object")
    return fields
