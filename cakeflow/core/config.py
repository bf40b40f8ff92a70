"""Experiments as YAML: shipped configs by name, composed and checked by jsonargparse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from cakeflow.core.module import EditModule
from cakeflow.errors import ConfigError, EditError
from cakeflow.plugins import load_plugins

MODULE_DEFAULTS = {"model": {"class_path": "cakeflow.core.locate_then_edit.LocateThenEdit"}}
"""Defaults of every parser that builds an edit module."""


def shipped(kind: str) -> dict[str, Path]:
    """Name -> file of the shipped configs of a kind (``method``, ``model`` or ``data``)."""
    folder = Path(str(files("cakeflow_configs"))) / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(kind: str, name: str | Path) -> Path:
    """A shipped config by name, or any YAML file by path.

    Raises:
        ConfigError: Naming the known ones.
    """
    known = shipped(kind)
    if str(name) in known:
        return known[str(name)]
    if Path(name).is_file():
        return Path(name)
    raise ConfigError(f"no {kind} config {str(name)!r}; shipped: {', '.join(known)}; or give the path of a YAML file")


def build_module(configs: list[Path], **values: Any) -> EditModule:
    """An edit module from config files, later ones winning, and values given in Python, which win over all.

    Args:
        configs: YAML files with a ``model:`` section, as for ``cakeflow fit --config``. Its ``class_path`` names the
            module's class, ``LocateThenEdit`` by default.
        values: Arguments of that class; a mapping is merged into the configured part of that name.

    Raises:
        ConfigError: If a name or value does not fit.
    """
    plain = {name: value for name, value in values.items() if _is_plain(value)}
    objects = {name: value for name, value in values.items() if name not in plain}
    load_plugins()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(EditModule, "model", required=False)
    parser.set_defaults(MODULE_DEFAULTS)
    parser.add_argument("--config", action="config")
    try:
        config = parser.parse_args([f"--config={path}" for path in configs])
        config = parser.parse_object({"model": {"init_args": plain}}, config)
    except Exception as error:
        raise ConfigError(f"configuration {', '.join(path.name for path in configs)}: {error}") from error

    def make(kind: type[EditModule], *args: Any, **kwargs: Any) -> EditModule:
        if unknown := sorted(set(objects) - set(signature(kind).parameters)):
            names = ", ".join(signature(kind).parameters)
            raise ConfigError(f"{kind.__name__} has no argument {unknown[0]!r}; it has {names}")
        return kind(*args, **{**kwargs, **objects})

    with own_errors():
        return parser.instantiate(config, instantiators=[(make, EditModule, True)]).model  # type: ignore[no-any-return]


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise the package's own error where jsonargparse hides it in a ``ValueError``, as it does in optional parts."""
    try:
        yield
    except ValueError as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, EditError):
            cause = cause.__cause__
        raise cause or error from None


def _is_plain(value: object) -> bool:
    """True if a config file could hold the value."""
    if isinstance(value, (list, dict)):
        return all(part is None or _is_plain(part) for part in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, (str, int, float))
