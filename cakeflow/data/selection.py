"""Selection of the records of a data set that are edited, and their sequence."""

from __future__ import annotations

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cakeflow.data.files import exists, parse_json, read_text
from cakeflow.data.request import EditRequest, contradictions, is_case_id
from cakeflow.errors import ConfigError, RequestError, listed, require_choice, require_count

Conflicts = Literal["error", "drop", "keep"]
"""Treatment of records that contradict each other."""
Order = Sequence[int | str] | str | Path
"""A published order: case ids, or a file with them (``.json``: one list; any other: one id a line)."""

log = logging.getLogger(__name__)


def select(
    requests: Sequence[EditRequest],
    order: Order | None = None,
    shuffle_seed: int | None = None,
    conflicts: Conflicts = "error",
    limit: int | None = None,
) -> list[EditRequest]:
    """Choose records: bring them into order or shuffle them, then drop conflicts, then take the first ``limit``.

    A limit of N gives N records without conflicts, and the selection of a smaller limit begins that of a larger one.

    Args:
        requests: All records, in the sequence of their source.
        order: Case ids of exactly the records to edit, in their sequence (``20953`` and ``"20953"`` are one id).
        shuffle_seed: Seed of a permutation, without an order.
        conflicts: ``error`` refuses a selection with records that contradict each other (``request.contradictions``);
            ``drop`` leaves out those that contradict an earlier one, and logs how many; ``keep`` takes all.
        limit: Most records to take.

    Returns:
        The chosen records in sequence.

    Raises:
        ConfigError: If a setting is out of its range, or the order names unknown or ambiguous ids, or one twice.
        RequestError: Naming every chosen record that contradicts an earlier one, by its place in the source.

    Example:
        >>> seas = {1: "the Baltic Sea", 2: "the Black Sea", 3: "the Red Sea"}
        >>> records = [EditRequest("{} ends in", "Elbe", sea, case_id=case) for case, sea in seas.items()]
        >>> [record.target_new for record in select(records, order=[3, 1], conflicts="drop")]
        ['the Red Sea']
    """
    require_choice("data.conflicts", conflicts, Conflicts)
    require_count("data.limit", limit, 1, optional=True)
    if order is not None and shuffle_seed is not None:
        raise ConfigError("data.order and data.shuffle_seed both say in which sequence to edit; give one of them")
    chosen = list(range(len(requests))) if order is None else _places(requests, read_order(order))
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(chosen)
    if conflicts == "drop":
        dropped = {fault.index for fault in contradictions(requests, chosen)}
        log.info("%d of %d records contradict an earlier one and are left out", len(dropped), len(chosen))
        chosen = [index for index in chosen if index not in dropped]
    chosen = chosen[:limit]
    if conflicts != "keep" and (faults := contradictions(requests, chosen)):
        raise RequestError(faults)
    return [requests[index] for index in chosen]


def read_order(order: Order) -> list[int | str]:
    """Read the case ids of a published order.

    Raises:
        ConfigError: If there is no such file, it holds no id, or something else than ids.
        RequestError: If a ``.json`` file is broken, naming the line.
    """
    if isinstance(order, (str, Path)):
        path = Path(order)
        if not exists(path):
            raise ConfigError(f"data.order: no file {str(path)[:300]!r}; give case ids, or a file with them")
        text = read_text(path)
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        entries = parse_json(text, str(path)) if ".json" in path.suffixes else lines
        order = entries if isinstance(entries, list) else [entries]
    ids = list(order)
    if bad := [case for case in ids if not is_case_id(case)]:
        raise ConfigError(f"data.order must hold case ids, integers or texts; found {listed(bad)}")
    if not ids:
        raise ConfigError("data.order is empty; name at least one case id")
    return ids


def _places(requests: Sequence[EditRequest], order: Sequence[int | str]) -> list[int]:
    """Return the index of each record of an order."""
    places: defaultdict[str, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        if request.case_id is not None:
            places[str(request.case_id)].append(index)
    if not places:
        raise ConfigError("data.order names records by case_id, and no record here has one; use limit or shuffle_seed")
    ids = [str(case) for case in order]
    faults = {
        "no record has": [case for case in dict.fromkeys(ids) if case not in places],
        "named more than once": [case for case, count in Counter(ids).items() if count > 1],
        "several records have": [case for case in dict.fromkeys(ids) if len(places.get(case, ())) > 1],
    }
    if messages := [f"{fault} {listed(cases)}" for fault, cases in faults.items() if cases]:
        raise ConfigError(f"data.order, case ids: {'; '.join(messages)}")
    return [places[case][0] for case in ids]


def require_apart(requests: Sequence[EditRequest], batch_size: int) -> None:
    """Require that requests that contradict each other are in different batches.

    Args:
        requests: The requests, in the order of the edits.
        batch_size: Edits in one batch.

    Raises:
        RequestError: Naming each request that contradicts another one of its batch.
    """
    batches = [range(start, min(start + batch_size, len(requests))) for start in range(0, len(requests), batch_size)]
    if faults := [fault for batch in batches for fault in contradictions(requests, batch)]:
        raise RequestError(faults)
