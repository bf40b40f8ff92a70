"""JSON as strict types: the same classes write a file and read it back, whoever wrote it, within bounds."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, PlainSerializer, ValidationError

from cakeflow.errors import EditError
from cakeflow.storage.atomic import write_text

LARGEST = 1e100
"""Largest number in a file: sums of squares of such stay finite, and no run measures more."""
DEEPEST = 64
"""Most levels of lists and objects in a file."""


def plain(value: Any) -> Any:
    """Return data as JSON has it: texts as names, lists for tuples, None for a number that is not one."""
    if isinstance(value, float):
        return value if abs(value) <= LARGEST else None
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


Json = Annotated[JsonValue, BeforeValidator(plain)]
"""Any JSON value."""
Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if plain(value) is None else value),
    PlainSerializer(plain, when_used="json"),
]
"""A number; one that is not finite, or beyond ``LARGEST``, is null in the file and nan when it is read."""
Count = Annotated[int, Field(ge=0, lt=2**53)]
"""A whole number that something can be counted or numbered by."""
Share = Annotated[float, Field(ge=0, le=1)]
SHA256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
S = TypeVar("S", bound="Schema")


class Schema(BaseModel):
    """Base of everything that is written: strict types, no unknown fields, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data; optional fields that are not set are left out."""
        return self.model_dump(mode="json", exclude_unset=True)


def read_as(kind: type[S], data: object, where: str, error: type[EditError], remedy: str) -> S:
    """Return data from a file as one of our types.

    Args:
        kind: The type.
        data: Parsed JSON.
        where: File and line of the data, for the message.
        error: Type of the error to raise.
        remedy: Advice at the end of the message.

    Raises:
        EditError: ``error``, naming field, value and the expected type.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as invalid:
        raise error(f"{where}, {first_fault(invalid)}; {remedy}") from invalid


def first_fault(invalid: ValidationError) -> str:
    """Return the first fault in words: field, value and the expected type."""
    first = invalid.errors(include_url=False, include_context=False)[0]
    field = ".".join(map(str, first["loc"])) or "content"
    value = "" if first["type"] == "missing" else f" = {reprlib.repr(first['input'])}"
    return f"{field}{value}: {first['msg']}"


def parse_as(kind: type[S], text: str | bytes, where: str, error: type[EditError], remedy: str) -> S:
    """Return JSON text as one of our types; arguments and errors as for ``read_as``.

    NaN and infinities, which 0.1 wrote, count as null.
    """
    try:
        data = json.loads(text, parse_float=_number, parse_constant=lambda _: None)
        if _depth(data) > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} levels deep")
    except (ValueError, RecursionError) as invalid:
        raise error(f"{where}: {invalid}; {remedy}") from invalid
    return read_as(kind, data, where, error, remedy)


def parse_lines(kind: type[S], text: str, path: object, error: type[EditError], remedy: str) -> list[S]:
    """Return a text with a JSON object a line as ours; lines end at line feeds only, as JSON has other ends in texts.

    Args:
        kind: The type.
        text: Content of the file.
        path: The file, for messages.
        error: Type of the error to raise.
        remedy: Advice at the end of the message.

    Raises:
        EditError: ``error``, naming line, field, value and the expected type.
    """
    lines = enumerate(text.split("\n"), 1)
    return [parse_as(kind, line, f"{path}, line {number}", error, remedy) for number, line in lines if line.strip()]


def write_lines(path: Path, objects: Iterable[Schema]) -> None:
    """Write a file that ``parse_lines`` reads, at once and durably: a JSON object a line.

    Args:
        path: The file.
        objects: What it will have, in order.
    """
    write_text(path, "".join(f"{each.model_dump_json()}\n" for each in objects))


def _number(text: str) -> float:
    if not abs(value := float(text)) <= LARGEST:
        raise ValueError(f"{text[:40]} is beyond {LARGEST:.0e}, which no run could have measured")
    return value


def _depth(data: object) -> int:
    """Return the number of levels of lists and objects, at most one more than ``DEEPEST``."""
    depth, level = 0, [data]
    while depth <= DEEPEST and (level := [each for each in level if isinstance(each, (dict, list))]):
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
        depth += 1
    return depth
