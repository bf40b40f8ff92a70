"""Requests from wherever a user keeps them: files, folders, URLs, the hub, or lists and data sets in memory."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cakeflow.data.builtin import builtin_facts
from cakeflow.data.request import EditRequest
from cakeflow.data.schemas import parse_requests
from cakeflow.errors import ConfigError, Fault, RequestError, StatisticsError, listed

SOURCES = (
    "give 'builtin', a .json or .jsonl file (also .gz), a folder with a data set, a URL of such a file (http://... or "
    "https://...), or a data set of the hub as 'owner/name'"
)


_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


_FILE_NAME = re.compile(r".*\.jsonl?(\.gz)?")


_GZIP = b"\x1f\x8b"


LARGEST = 1 << 29
"""Most bytes of a file, unpacked: ten times the largest one of the field."""


_PATIENCE = 10.0
"""Seconds that the hub has for its first answer."""


def read_requests(source: Any, split: str | None = None) -> list[EditRequest]:
    """Read requests and check each of them.

    Args:
        source: ``"builtin"``; a ``.json`` (one list) or ``.jsonl`` file, either also ``.gz``; an ``http(s)`` URL of
            such a file, which is kept in the cache of ``datasets``; a folder with a data set; a data set of the hub,
            ``"owner/name"`` (a local path of that name wins); a list of requests or mappings; or a
            ``datasets.Dataset``. Schemas: ours, CounterFact's (single and multi) and zsRE's (MEND), unchanged.
        split: Of a data set that has several, e.g. ``"test"`` or ``"train[:100]"``.

    Returns:
        The requests in order. Some may contradict each other: ``EditDataModule`` asks that of those that are edited.

    Raises:
        ConfigError: If there is no such source or split, or it cannot be reached.
        RequestError: Listing every fault of every entry, or naming the broken line of a file.

    Example:
        >>> len(read_requests("builtin")[0].probes) > 5
        True
        >>> read_requests({"prompt": "{} flows into", "subject": "The Elbe", "target_new": "the Black Sea"})[0].text
        'The Elbe flows into'
    """
    return parse_requests(read_entries(source, split))


def read_entries(source: Any, split: str | None = None) -> list[Any]:
    """The entries of a source, whatever their schema.

    Args:
        source: As for ``read_requests``.
        split: Of a data set that has several.

    Raises:
        ConfigError: If there is no such source or split, or it cannot be reached or read.
        RequestError: Naming the broken line of a file.
    """
    if isinstance(source, (str, Path)) and source != "builtin":
        return _named(source, split)
    if _is_splits(source):
        return _one_split(source, split, "the data set")
    _refuse_split(split, source)
    if isinstance(source, str):
        return [*builtin_facts()]
    if isinstance(source, (EditRequest, Mapping)):
        return [source]
    if isinstance(source, (bytes, bytearray)) or not isinstance(source, Iterable):
        raise ConfigError(f"requests must be named, a list or a data set, got {type(source).__name__}; {SOURCES}")
    return list(source)


def _named(source: str | Path, split: str | None) -> list[Any]:
    """The entries of a file, a folder, a URL or a data set of the hub; a path object is never one of the latter two."""
    name, path = str(source), Path(source)
    if name and exists(path) and path.is_dir():  # the path of no name is the current folder
        return _load_folder(path, split)
    remote = isinstance(source, str)
    if remote and not exists(path) and _HUB_NAME.fullmatch(name) and not _FILE_NAME.fullmatch(name):
        return _load_hub(name, split)
    _refuse_split(split, name)
    if remote and name.startswith(("http://", "https://")):
        return parse_entries(read_text(_fetch(name), name), name, urlsplit(name).path)
    return parse_entries(read_text(path), name, name)


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; what the system takes for no name at all is none."""
    try:
        return path.exists()
    except (OSError, ValueError):  # e.g. requests pasted in place of their file's name
        return False


def read_text(path: Path, name: str = "") -> str:
    """The text of a file, unpacked if it is a gzip file, without a byte order mark.

    Args:
        path: The file.
        name: What messages call it; its path by default.

    Raises:
        ConfigError: If there is no such file, it is not UTF-8, or it has more than ``LARGEST`` bytes.
    """
    if not exists(path) or not path.is_file():
        raise ConfigError(f"no file or folder {str(path)[:300]!r}; {SOURCES}")
    try:
        with path.open("rb") as file:
            packed = file.read(len(_GZIP)) == _GZIP
        with gzip.open(path) if packed else path.open("rb") as handle:
            raw = handle.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise ConfigError(f"{name or path} has more than {LARGEST >> 20} MiB of text; give it in parts")
        return raw.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{name or path} cannot be read as UTF-8 text: {error}; save it as such, or fetch it again"
        ) from error


def parse_entries(text: str, name: str, path: str) -> list[Any]:
    """The entries in a text.

    Args:
        text: One JSON list or object, or JSON lines.
        name: What messages call it.
        path: Its path; one that ends in ``.jsonl`` or ``.jsonl.gz`` says that each line is an entry.

    Raises:
        RequestError: Naming the broken line.
    """
    if path.removesuffix(".gz").endswith(".jsonl"):
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [_parse_line(name, number, line) for number, line in lines]
    entries = _parse_line(name, 1, text)
    return entries if isinstance(entries, list) else [entries]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a field that is given twice, ``json`` would keep the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"one object gives a field twice: {listed([name for name, _ in pairs])}")
    return found


def _parse_line(name: str, number: int, line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        at = number + error.lineno - 1
        remedy = f"broken JSON in {name}, line {at}, column {error.colno}: {error.msg}"
        raise RequestError([Fault(at, "line", line.split("\n")[error.lineno - 1][:80], remedy)]) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, too many digits, a field given twice
        remedy = f"JSON in {name}, line {number} or below, that cannot be requests: {error}"
        raise RequestError([Fault(number, "line", line[:80], remedy)]) from error


def _fetch(url: str) -> Path:
    """The file of a URL in the cache of ``datasets``; a server that sends ETags is asked whether it changed."""
    import datasets  # a second to import, and few sources need it

    try:
        return Path(datasets.DownloadManager(download_config=datasets.DownloadConfig(max_retries=0)).download(url))
    except Exception as error:
        reason = error.__cause__ or error
        raise ConfigError(f"{url} cannot be fetched: {reason}; check it, or download it and give the file") from error


def _load_folder(folder: Path, split: str | None) -> list[Any]:
    import datasets

    try:
        if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):  # of save_to_disk
            return _one_split(datasets.load_from_disk(str(folder)), split, str(folder))
        return _one_split(datasets.load_dataset(str(folder), split=split), None, str(folder))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"the folder {str(folder)!r} cannot be read as a data set: {error}; {SOURCES}") from error


def _load_hub(name: str, split: str | None) -> list[Any]:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        with suppress(OfflineModeIsEnabled):  # then the cache has it or nothing has
            HfApi().dataset_info(name, timeout=_PATIENCE)  # asked once; load_dataset would try again for half a minute
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise ConfigError(
            f"no file or folder {name!r} here, and no data set of this name on the hub that loads: {error}; {SOURCES}. "
            "Without a network, HF_HUB_OFFLINE=1 reads what datasets has in its cache"
        ) from error
    return _one_split(loaded, None, name)


def _is_splits(source: Any) -> bool:
    """Whether this is a ``DatasetDict``: a dictionary, but of data sets."""
    return isinstance(source, dict) and bool(source) and all(hasattr(part, "column_names") for part in source.values())


def _one_split(loaded: Any, split: str | None, name: str) -> list[Any]:
    """The records of a data set, of its only split or of the one that was chosen."""
    if not _is_splits(loaded):
        _refuse_split(split, name)
        return list(loaded)
    if split is None and len(loaded) == 1:
        (split,) = loaded
    if split not in loaded:
        problem = "needs a split" if split is None else f"has no split {split!r}"
        raise ConfigError(f"{name} {problem}; choose one of {', '.join(map(str, loaded))}")
    return list(loaded[split])


def _refuse_split(split: str | None, source: Any) -> None:
    if split is not None:
        shown = repr(source) if isinstance(source, (str, Path)) else f"a {type(source).__name__}"
        raise ConfigError(f"split={split!r}: {shown} has no splits; leave it out")


def read_texts(source: Any) -> Iterator[str]:
    """Documents of a corpus.

    Args:
        source: A ``.txt`` file (one document), ``.jsonl`` (field ``text``), either of them ``.gz``; an Arrow file or a
            folder saved by ``datasets``; a ``datasets.Dataset`` (column ``text``); a hub name; or a list of these.

    Yields:
        Text, in order.

    Raises:
        StatisticsError: If there is no such source or it has no text.
    """
    if isinstance(source, (list, tuple)):
        for part in source:
            yield from read_texts(part)
    elif isinstance(source, (str, Path)):
        path = Path(source)
        yield from _read_file(path) if path.is_file() and path.suffix != ".arrow" else _column(_load(path, str(source)))
    else:
        yield from _column(source)


def _read_file(path: Path) -> Iterator[str]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as handle:
        if not path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
            yield handle.read()
            return
        for number, line in enumerate(handle, 1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise StatisticsError(f"{path}, line {number}: not a JSON object with a field 'text'") from error
            if not isinstance(text, str):
                raise StatisticsError(f"{path}, line {number}: text = {text!r} is not a string")
            yield text


def _load(path: Path, name: str) -> Any:
    import datasets  # a second to import, and only this source needs it

    try:
        if path.suffix == ".arrow":
            return datasets.Dataset.from_file(str(path))
        if path.is_dir():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(name, split="train")
    except Exception as error:
        raise StatisticsError(
            f"corpus {name!r} is neither a text or JSONL file, an Arrow file, a folder saved by datasets nor a hub "
            f"dataset that loads here: {error}"
        ) from error


def _column(dataset: Any) -> Iterator[str]:
    for index, record in enumerate(dataset):
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise StatisticsError(f"corpus record {index}: needs a field 'text' with a string")
        yield record["text"]
