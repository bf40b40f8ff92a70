"""Words of a command about loading: how a model is loaded, what is trusted, and modules of the user's to import."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any

from jsonargparse import Namespace

from cakeflow.cli.words import take, words_of
from cakeflow.errors import ConfigError, did_you_mean
from cakeflow.models.loading import SECRET, Loading

TRUST_OPTIONS = ("trust_remote_code", "trust_task_code")
"""Options that let the Python of a model's folder, or of a task file, run; no config can have them."""


def take_loading(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the words of ``fit`` or ``evaluate`` without ``--loading.NAME VALUE``, and these options by name.

    Raises:
        ConfigError: If there is no such option, or it has no value.

    Example:
        >>> take_loading(["fit", "--loading.revision", "v1", "--data", "builtin"])
        (['fit', '--data', 'builtin'], {'revision': 'v1'})
    """
    names = [each.name for each in fields(Loading) if each.name != "trust_remote_code"]  # a switch of its own
    rest, taken = take(words, "--loading", "--loading.")
    options: dict[str, str] = {}
    for option, value in taken:
        name = option.removeprefix("--loading").removeprefix(".").replace("-", "_")
        if name not in names:
            raise ConfigError(f"{option}: expected --loading.{', --loading.'.join(names)}{did_you_mean(name, names)}")
        if not value or value.startswith("--"):
            raise ConfigError(f"{option} needs a value")
        options[name] = value
    return rest, options


def without_token(words: Sequence[str]) -> list[str]:
    """Return the words of a command as they may be shown: all but an access token.

    Example:
        >>> without_token(["fit", "--loading.token", "hf_x", "--loading.revision", "v1"])
        ['fit', '--loading.revision=v1']
    """
    rest, options = take_loading(words)
    return [*rest, *(f"--loading.{name}={value}" for name, value in options.items() if name != "token")]


def loading_words(loading: Loading) -> list[str]:
    """Return the words of a command that load a model in this way, all but an access token.

    Example:
        >>> loading_words(Loading(revision="v1", token="hf_x", trust_remote_code=True))
        ['--loading.revision', 'v1', '--trust_remote_code']
    """
    named = {f"loading.{name}": value for name, value in loading.arguments().items() if name not in SECRET}
    return words_of({**named, "trust_remote_code": loading.trust_remote_code})


def with_loading(config: Any, loading: Loading) -> Any:
    """Return the config of ``fit`` or ``evaluate`` that its run folder keeps: with these options, but no secrets.

    A method without ``model_kwargs`` has no place for them; its ledger names them all the same.
    """
    result, command = config.clone(), config.subcommand
    settings = result[command].model.init_args
    if "model_kwargs" in settings:
        arguments = {**(settings.model_kwargs or {}), **loading.arguments()}
        settings.model_kwargs = {name: value for name, value in arguments.items() if name not in SECRET} or None
    return result


def with_trust(config: Any, trusted: Collection[str]) -> Any:
    """Return a config in which these of ``TRUST_OPTIONS`` are switched on wherever they have a place."""
    if isinstance(config, list):
        return [with_trust(part, trusted) for part in config]
    if not isinstance(config, Namespace):
        return config
    parts = {name: with_trust(part, trusted) for name, part in vars(config).items()}
    parts |= {name: True for name in trusted if name in parts}
    if "trust_remote_code" in trusted and "model_kwargs" in parts:
        parts["model_kwargs"] = {**(parts["model_kwargs"] or {}), "trust_remote_code": True}
    return Namespace(parts)  # type: ignore[no-untyped-call]


def take_options(words: Sequence[str]) -> tuple[list[str], set[str]]:
    """Import the modules that ``--import`` names, and return the other words and the trust that they give.

    Raises:
        ConfigError: If a module cannot be imported.
    """
    rest, modules = take(words, "--import")
    for _, name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # importing a module of the user's can raise anything
            reason = f"{type(error).__name__}: {error}"
            remedy = "name a module on PYTHONPATH, or in this folder with PYTHONPATH=."
            raise ConfigError(f"--import {name}: {reason}; {remedy}") from error
    switches = [f"--{name}" for name in TRUST_OPTIONS]
    return [word for word in rest if word not in switches], {word[2:] for word in rest if word in switches}
