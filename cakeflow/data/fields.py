"""Fields of the records that metrics need, checked before the expensive work starts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence

from cakeflow.data.request import EditRequest
from cakeflow.errors import ConfigError

FIELDS: Mapping[str, Callable[[EditRequest], bool]] = {
    "target_true": lambda record: record.target_true is not None,
    "reference": lambda record: record.reference is not None,
    "paraphrase": lambda record: any(probe.kind == "paraphrase" for probe in record.probes),
    "generation": lambda record: any(probe.kind == "generation" for probe in record.probes),
    "neighborhood": lambda record: any(
        probe.kind == "neighborhood" and (probe.expected or record.target_true) for probe in record.probes
    ),
}
"""Field -> test for it in a record: one probe of a kind is enough, and a neighborhood probe needs an answer."""

log = logging.getLogger(__name__)


def missing_fields(requests: Sequence[EditRequest], needs: Collection[str] = tuple(FIELDS)) -> dict[str, set[int]]:
    """Return the records that lack a field.

    Args:
        requests: Records to check.
        needs: Fields to look for, names of ``FIELDS``.

    Returns:
        Field -> indices of the records that lack it; fields that all records have are left out.

    Example:
        >>> facts = [EditRequest("{} is", "Ann", "tall", "small"), EditRequest("{} is", "Bob", "tall")]
        >>> missing_fields(facts, ["target_true", "paraphrase"])
        {'target_true': {1}, 'paraphrase': {0, 1}}

    Raises:
        ConfigError: If a field is unknown.
    """
    if unknown := sorted(set(needs) - set(FIELDS)):
        raise ConfigError(f"no field {unknown[0]!r} that a metric could need; there are {', '.join(FIELDS)}")
    lacking = {field: {i for i, request in enumerate(requests) if not FIELDS[field](request)} for field in needs}
    return {field: records for field, records in lacking.items() if records}


def check_fields(
    requests: Sequence[EditRequest], needs: Mapping[str, Collection[str]], explicit: Collection[str] = ()
) -> None:
    """Check which metrics can judge which records.

    Args:
        requests: The records that will be scored.
        needs: Metric -> the fields that a record must have, all of them, for this metric to judge it.
        explicit: Metrics that the user named. One of these that can judge no record is an error; any other such metric
            is ignored. A metric that can judge only some records is logged as a warning.

    Raises:
        ConfigError: Naming each metric that can judge no record, and the fields that are missing.
    """
    useless: list[str] = []
    short: list[str] = []
    for metric, fields in needs.items():
        lacking = missing_fields(requests, fields)
        if lacking:
            counts = ", ".join(f"{field} is missing in {len(records)}" for field, records in lacking.items())
            nothing = len(set.union(*lacking.values())) == len(requests)
            if metric in explicit or not nothing:
                (useless if nothing else short).append(f"{metric}: {counts} of {len(requests)} records")
    if useless:
        raise ConfigError(f"no record can feed {'; '.join(useless)}; add the fields, or leave the metric out")
    if short:
        log.warning("some metrics cannot judge every record: %s", "; ".join(short))
