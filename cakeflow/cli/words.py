"""The words of a command before its parser sees them: options taken out, and short forms replaced by the parser's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import yaml

from cakeflow.core.config import find_config, model_kind, shipped

CONFIG_KINDS = ("method", "model_config", "model", "targets", "data")
"""Options of ``fit`` and ``evaluate`` that take the name of a shipped config, in the order in which they count."""


def take(words: Sequence[str], *names: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the other words, and these options with their values, which are empty where the words end.

    Args:
        words: Those of a command; a value follows its option, as ``--name value`` or ``--name=value``.
        names: Options; one that ends with a dot stands for all that begin so.

    Example:
        >>> take(["fit", "--run", "a", "--x.y=1", "--data", "b"], "--run", "--x.")
        (['fit', '--data', 'b'], [('--run', 'a'), ('--x.y', '1')])
    """
    rest: list[str] = []
    taken: list[tuple[str, str]] = []
    groups = tuple(name for name in names if name.endswith("."))
    remaining = iter(words)
    for word in remaining:
        option, joined, value = word.partition("=")
        if option in names or option.startswith(groups):
            taken.append((option, value if joined else next(remaining, "")))
        else:
            rest.append(word)
    return rest, taken


def values_of(option: str, words: Sequence[str]) -> list[str]:
    """Return the values that a command gives to an option.

    Example:
        >>> values_of("--method", ["fit", "--method", "cake", "--method=memit"])
        ['cake', 'memit']
    """
    return [value for _, value in take(words, option)[1]]


def options_in(words: Sequence[str]) -> set[str]:
    """Return the options that a command names; values are among them, which do no harm.

    Example:
        >>> sorted(options_in(["--method=cake", "--run", "folder"]))
        ['--method', '--run', 'folder']
    """
    return {word.partition("=")[0] for word in words}


def words_of(options: Mapping[str, object]) -> list[str]:
    """Return options as the words of a command; what is None, False or empty is left out.

    Example:
        >>> words_of({"strict": True, "layers": [1, 2], "file": None, "run_dir": "my run"})
        ['--strict', '--layers', '[1, 2]', '--run_dir', 'my run']
    """
    words: list[str] = []
    for name, value in options.items():
        text = _list_text(value) if isinstance(value, list) else str(value)
        words += [f"--{name}", *([] if value is True else [text])] if value else []
    return words


def _list_text(values: Sequence[object]) -> str:
    """Return a list as a command takes it, with quotes where YAML would read a text as something else.

    Example:
        >>> _list_text([1, "a.json"]), _list_text(["1984", "no"])
        ('[1, a.json]', '["1984", "no"]')
    """
    plain = all(not isinstance(each, str) or _is_plain(each) for each in values)
    return f"[{', '.join(map(str, values))}]" if plain else json.dumps(values, ensure_ascii=False)


def _is_plain(text: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z_./][\w./-]*", text)) and yaml.safe_load(text) == text


def with_flags(words: Sequence[str], command: Callable[..., Any]) -> list[str]:
    """Return the words of a command with a value for every switch that stands alone, and no hyphens in options.

    Example:
        >>> def command(out: str, dry_run: bool = False) -> None: ...
        >>> with_flags(["x", "--dry-run", "--out", "a-b"], command)
        ['x', '--dry_run=true', '--out', 'a-b']
    """
    switches = {
        f"--{name}" for name, each in signature(command).parameters.items() if each.annotation in (bool, "bool")
    }
    result: list[str] = []
    for word, following in zip(words, [*words[1:], ""], strict=False):
        option, joined, value = word.partition("=")
        option = option[:2] + option[2:].replace("-", "_") if word.startswith("--") else option
        alone = option in switches and not joined and following.lower() not in ("true", "false")
        result.append(f"{option}=true" if alone else option + joined + value)
    return result


def expand_names(words: Sequence[str]) -> list[str]:
    """Replace ``--method``, ``--model``, ``--targets`` and ``--data`` in a command by options of Lightning's CLI.

    A shipped name or a YAML file becomes a ``--config``; any other model or data source becomes ``--model.base`` or
    ``--data.source``. With ``--model_config``, which has the model's numbers, ``--model`` is the model alone. Later
    configs override earlier ones: the method's, the model's, the target search's, the data's. All other options follow.

    Args:
        words: The command and its options.

    Raises:
        ConfigError: If there is no such method, target search or model config.

    Example:
        >>> expand_names(["fit", "--model", "org/name", "--model.layers", "[3, 4]"])
        ['fit', '--model.base', 'org/name', '--model.layers', '[3, 4]']
    """
    rest, taken = take(words[1:], *(f"--{kind}" for kind in CONFIG_KINDS))
    names = {option.removeprefix("--"): value for option, value in taken}
    of_model = model_kind(find_config("method", names["method"])) if "method" in names else "model"
    folders = {"model": of_model, "model_config": of_model}
    base = ["--model.base", names.pop("model")] if {"model", "model_config"} <= names.keys() else []
    given = [kind for kind in CONFIG_KINDS if kind in names]
    options = [option for kind in given for option in _as_options(kind, names[kind], folders.get(kind, kind))]
    return [*words[:1], *options, *base, *rest]


def _as_options(kind: str, name: str, folder: str) -> list[str]:
    is_config = name in shipped(folder) or name.endswith((".yaml", ".yml"))
    if is_config or kind not in ("model", "data"):
        return ["--config", str(find_config(folder, name))]
    return ["--model.base" if kind == "model" else "--data.source", name]
