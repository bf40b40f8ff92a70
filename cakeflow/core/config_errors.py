"""Errors of the config parser in plain words: the setting, its value, and the name that was probably meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from inspect import Parameter, signature

from cakeflow.errors import did_you_mean

_KEY = re.compile(r'Parser key "(.+?)":')
_CLASS = re.compile(r"Problem with given class_path '(?:.+\.)?(\w+)'")
_UNION = re.compile(r"Subtypes: \[(.*)\]\n(?:.*\n)*?\s*Given value: (.*)")
_NAMES = {"NoneType": "null", "str": "a text", "int": "an integer", "float": "a number", "bool": "true or false"}


def arguments_of(kind: type) -> dict[str, Parameter]:
    """Return what a class can be given, by name; what it hands on to its base as ``**`` is among them.

    Args:
        kind: The class.

    Example:
        >>> class Base:
        ...     def __init__(self, size=1): ...
        >>> class Part(Base):
        ...     def __init__(self, name, **common): ...
        >>> list(arguments_of(Part))
        ['name', 'size']
    """
    arguments: dict[str, Parameter] = {}
    for each in kind.__mro__[:-1]:
        if "__init__" not in vars(each):
            continue
        own = [*signature(vars(each)["__init__"]).parameters.values()][1:]
        named = [part for part in own if part.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
        arguments = {**arguments, **{part.name: part for part in named if part.name not in arguments}}
        if not any(part.kind is Parameter.VAR_KEYWORD for part in own):
            break
    return arguments


def plain_message(message: str, options: Collection[str], classes: Mapping[str, type]) -> str:
    """Return what a parser of jsonargparse complains of in one line; a complaint that is not known stays as it is.

    Args:
        message: Its message.
        options: Options of the command.
        classes: Classes that a config may name, by short name.
    """
    for pattern, explain in _RULES:
        if match := re.search(pattern, message):
            where = ".".join(_KEY.findall(message[: match.start()]))
            return explain(match, where, message, options, classes)
    return message


def _unknown_option(match: re.Match[str], _: str, __: str, options: Collection[str], ___: object) -> str:
    name = match[1].split("=")[0]
    if not name.startswith("-"):
        return f"unexpected word {name!r}"
    return f"unknown option {name}{did_you_mean(name, options)}"


def _misplaced_word(match: re.Match[str], *_: object) -> str:
    return f"there is no command {match[1]!r}; the command comes first, its options follow"


def _absent_file(match: re.Match[str], where: str, *_: object) -> str:
    return f"{where}: there is no file {match[1]}"


def _unknown_key(match: re.Match[str], _: str, __: str, options: Collection[str], ___: object) -> str:
    return f"a config has no {match[1]!r}{did_you_mean(match[1], [each.lstrip('-') for each in options])}"


def _unknown_setting(match: re.Match[str], where: str, message: str, _: object, classes: Mapping[str, type]) -> str:
    owners = _CLASS.findall(message[: match.start()])
    names = arguments_of(classes[owners[-1]]) if owners and owners[-1] in classes else ()
    owner = f"{where} ({owners[-1]})" if owners else where
    near = did_you_mean(match[1], names) or (f"; it has {', '.join(names)}" if names else "")
    return f"{owner} has no setting {match[1]!r}{near}"


def _unknown_class(match: re.Match[str], where: str, _: str, __: object, classes: Mapping[str, type]) -> str:
    return f"{where}: there is no class {match[1]!r}{did_you_mean(match[1], classes)}"


def _no_choice(match: re.Match[str], where: str, *_: object) -> str:
    choices = re.findall(r"'(.*?)'", match[1])
    return f"{where} must be one of {', '.join(choices)}, got {match[2]!r}{did_you_mean(match[2], choices)}"


def _wrong_type(match: re.Match[str], where: str, *_: object) -> str:
    return f"{where} must be {_kind(match[1])}, got {match[2]!r}"


def _other_reason(match: re.Match[str], _: str, message: str, *__: object) -> str:
    return f"{'.'.join(_KEY.findall(message[: match.end()]))}: {match[1]}"


def _wrong_union(_: re.Match[str], __: str, message: str, *___: object) -> str:
    """Name the innermost setting, whose kinds stand last."""
    start = message.rindex("Subtypes: [")
    where = ".".join(_KEY.findall(message[:start]))
    match = _UNION.match(message, start)
    kinds, value = match.groups() if match else (message[start:], "")
    remedy = (
        f"; write [{value}]" if _kind(kinds) in ("a list", "a list or null") and value[:1] not in ("[", "{", "") else ""
    )
    return f"{where} must be {_kind(kinds)}, got {value!r}{remedy}"


def _kind(kinds: str) -> str:
    """Return types as words: ``<class 'int'>, <class 'NoneType'>`` is ``an integer or null``."""
    plain = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", kinds)
    plain = re.sub(r"(?:\w+\.)+(\w+)", r"\1", plain)
    plain = re.sub(r"Literal\['(\w+)'\]", r"\1", plain)
    parts = re.split(r", (?![^\[]*\])", plain)
    names = (_NAMES.get(part, part) for part in parts)
    return " or ".join("a list" if name.lower().startswith(("list[", "sequence[")) else name for name in names)


_Explain = Callable[[re.Match[str], str, str, Collection[str], Mapping[str, type]], str]
_RULES: tuple[tuple[str, _Explain], ...] = (
    (r"unrecognized arguments: (\S+)", _unknown_option),
    (r"argument subcommand: invalid choice: '(.+?)'", _misplaced_word),
    (r"File does not exist: (.+)", _absent_file),
    (r"Subcommand '\w+' does not accept option '(.+?)'", _unknown_key),
    (r"Option '(.+?)' is not accepted", _unknown_setting),
    (r"Expected a dot import path string: (.+)", _unknown_class),
    (r"Expected a typing.Literal\[(.*?)\]\. Got value: (.*)", _no_choice),
    (r"Expected a (<class '.+?'>)\. Got value: (.*)", _wrong_type),
    (
        r"(?:Problem with given class_path '.+?'|Parser key \".+?\"):\n\s+(?!Does not|Parser key|Problem|-)(\S.*)",
        _other_reason,
    ),
    (r"Subtypes: \[", _wrong_union),
)
"""What jsonargparse says -> what we say; the first one that fits counts."""
