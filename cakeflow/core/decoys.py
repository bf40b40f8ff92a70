"""Decoys of a batch: subjects that are not edited, each in the prompt of a fact that is."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from cakeflow.data.builtin import builtin_facts
from cakeflow.data.contexts import Contexts
from cakeflow.data.request import EditRequest
from cakeflow.data.text import plain
from cakeflow.errors import ConfigError, RequestError
from cakeflow.forward.keys import read_keys
from cakeflow.forward.tokens import encode_batch
from cakeflow.journal.steps import request_hash
from cakeflow.models.architecture import Site
from cakeflow.storage.cache import content_key

if TYPE_CHECKING:
    from cakeflow.core.locate_then_edit import LocateThenEdit


def choose_decoys(
    requests: Sequence[EditRequest],
    names: Sequence[str] = (),
    each: int = 1,
    seed: int = 0,
    leave_out: Collection[str] = (),
) -> list[EditRequest]:
    """Return some subjects that are not edited in the prompts of facts that are; a function of facts, names and seed.

    Args:
        requests: The facts of a batch.
        names: Names to choose from; by default the subjects of the built-in facts.
        each: Number of decoys for each fact.
        seed: Seed of the choice.
        leave_out: Further subjects that are no decoys, such as those edited before.

    Raises:
        ConfigError: If there are too few names.

    Example:
        >>> fact = EditRequest("{} plays", "Ann", "tennis")
        >>> [decoy.text for decoy in choose_decoys([fact], ["Ann", "Bo"])]
        ['Bo plays']
    """
    facts = [*dict.fromkeys(requests)]
    edited = {plain(name) for name in (*leave_out, *(fact.subject for fact in facts))}
    pool = [name for name in dict.fromkeys(names or _subjects()) if plain(name) not in edited]
    count = each * len(facts)
    if len(pool) < count:
        raise ConfigError(
            f"{count} decoys for {len(facts)} facts need as many names that are not edited, and {len(pool)} are left; "
            "give more names, fewer decoys for each fact, or smaller batches"
        )
    draw = random.Random(content_key("decoys", seed, *map(request_hash, facts)))
    chosen = draw.sample(pool, count)
    return [replace(facts[i // each], subject=name, probes=()) for i, name in enumerate(chosen)]


def decoy_keys(
    module: LocateThenEdit, site: Site, requests: Sequence[EditRequest], names: Sequence[str], each: int, seed: int
) -> Float[Tensor, "m d_in"]:
    """Return the keys of a batch's decoys at a projection, under the weights as they are now.

    Args:
        module: The edit method.
        site: The projection.
        requests: The facts of the batch.
        names: Names to choose from; by default the subjects of the built-in facts.
        each: Number of decoys for each fact.
        seed: Seed of the choice.

    Raises:
        ConfigError: If there are too few names, or the model cannot read one of them.
    """
    subjects = {request.subject for request in module.stream.texts.requests}
    if module.record_texts:  # else what a run knows of earlier ones would depend on whether it was interrupted
        subjects |= {request.subject for step in module.journal.steps for request in step.requests}
    decoys = choose_decoys(requests, names, each, seed, subjects)
    try:
        texts = encode_batch(module.lm, decoys, module.contexts or Contexts())
    except RequestError as error:
        raise ConfigError(f"names of decoys: {error}") from error
    facts = module.with_tokens(texts)
    return read_keys(module.lm, facts.texts, [site], module.pass_tokens)[site]


def _subjects() -> list[str]:
    return [fact.subject for fact in builtin_facts()]
