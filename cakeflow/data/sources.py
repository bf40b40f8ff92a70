"""Requests and texts from any source: files, folders, URLs, the hub, or lists and data sets in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cakeflow.data.builtin import builtin_facts
from cakeflow.data.files import MOST_ENTRIES, SOURCES, Parts, exists, lines, parse_json, read_text
from cakeflow.data.images import has_images, read_image_folder, read_image_table, with_folder
from cakeflow.data.public_files import Consequence, consequences, shape_faults, unfold
from cakeflow.data.request import EditRequest
from cakeflow.data.schemas import ZsreTarget, parse_requests
from cakeflow.data.text import Occurrence
from cakeflow.errors import ConfigError, Fault, RequestError

Source = str | Path | Mapping[str, object] | Iterable[object]
"""Type of a source: a name, or entries in memory; see ``read_requests``."""

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FILE_NAME = re.compile(r".*\.(arrow|(jsonl?|txt)(\.gz)?)")
HUB_TIMEOUT = 10.0
"""Seconds that the hub has for its first answer."""


def read_requests(
    source: Any,
    split: str | None = None,
    *,
    occurrence: Occurrence | None = None,
    zsre_target: ZsreTarget = "answers",
) -> list[EditRequest]:
    """Read requests and check each of them.

    Args:
        source: ``"builtin"``; a ``.json`` (one list) or ``.jsonl`` file, either also ``.gz``; an ``.arrow`` file; an
            ``http(s)`` URL of such a file, which is cached by ``datasets``; a folder with a data set; a data set of the
            hub, ``"owner/name"`` (a local path of that name wins); a folder of pictures, one folder in it per label,
            or a ``.csv`` file with the fields image and label, whose paths are taken from its folder; a list of
            requests or mappings; or a ``datasets.Dataset``. Schemas: ours, that of images, CounterFact's (single and
            multi), zsRE's (MEND), KnowEdit's, MQuAKE's, PEAK's, ConflictEdit's and RoundEdit's, unchanged; a record
            with several edits becomes as many requests.
        split: Split of a data set that has several, e.g. ``"test"`` or ``"train[:100]"``.
        occurrence: See ``parse_requests``.
        zsre_target: See ``parse_requests``.

    Returns:
        The requests in order. Some may contradict each other: ``EditDataModule`` checks those that are edited.

    Raises:
        ConfigError: If there is no such source or split, or it cannot be reached or read.
        RequestError: Listing every fault of every entry, or naming the broken line of a file.

    Example:
        >>> read_requests({"prompt": "{} flows into", "subject": "The Elbe", "target_new": "the Black Sea"})[0].text
        'The Elbe flows into'
    """
    return parse_requests(read_entries(source, split), occurrence=occurrence, zsre_target=zsre_target)


def read_entries(source: Any, split: str | None = None, *, raw: bool = False) -> list[Any]:
    """Read the entries of a source in any schema; those of KnowEdit, MQuAKE, PEAK, ConflictEdit and RoundEdit as ours.

    Args:
        source: Source as in ``read_requests``.
        split: Split of a data set that has several.
        raw: Return the entries as they are written, in whatever schema.

    Raises:
        ConfigError: If there is no such source or split, it cannot be reached or read, or has too many entries.
        RequestError: Naming the broken line of a file, or every record of a public file that is not of its shape.
    """
    entries = _whole(source, split)
    if raw:
        return entries
    _require_shapes(entries)
    return [each for entry in entries for each in (unfold(entry) if isinstance(entry, Mapping) else [entry])]


def read_consequences(source: Any, split: str | None = None) -> list[Consequence]:
    """Read the questions that follow from the edits of a file of KnowEdit or MQuAKE.

    Args:
        source: Source as in ``read_requests``.
        split: Split of a data set that has several.

    Raises:
        ConfigError: If the source cannot be read, or no record has such a question.
        RequestError: As ``read_entries``.
    """
    entries = _whole(source, split)
    _require_shapes(entries)
    questions = consequences(entries)
    if not questions:
        raise ConfigError(
            f"{_label(source)} has no questions that follow from its facts: KnowEdit's records have portability and "
            "locality, MQuAKE's have questions and new_answer"
        )
    return questions


def _require_shapes(entries: Sequence[Any]) -> None:
    faults = [fault for i, each in enumerate(entries) if isinstance(each, Mapping) for fault in shape_faults(each, i)]
    if faults:
        raise RequestError(faults)


def _whole(source: Any, split: str | None) -> list[Any]:
    entries = list(islice(_entries(source, split), MOST_ENTRIES + 1))
    if len(entries) > MOST_ENTRIES:
        raise ConfigError(f"{_label(source)} has more than {MOST_ENTRIES} entries; give it in parts")
    return entries


def read_texts(source: Any) -> Iterator[str]:
    """Read the documents of a corpus one after another, each whole; see ``read_documents``."""
    return ("".join(parts) for parts in read_documents(source))


def read_documents(source: Any) -> Iterator[Iterable[str]]:
    """Read the documents of a corpus one after another, in parts: nothing but a ``.json`` file is loaded whole.

    Args:
        source: Source as in ``read_requests`` whose entries have a field ``text``; a file of any other name, such as
            ``.txt``, which is one document; or a list of these. Of a data set of the hub, the split ``train`` is read.

    Yields:
        The parts of a text, in order; a file's text is read as they are taken.

    Raises:
        ConfigError: If there is no such source, it cannot be reached or read, or an entry has no text.
    """
    if isinstance(source, (list, tuple)):
        for part in source:
            yield from read_documents(part)
        return
    try:
        for index, entry in enumerate(_entries(source, None, texts=True)):
            text = entry.get("text") if isinstance(entry, Mapping) else None
            if isinstance(entry, Parts):
                yield entry
            elif isinstance(text, str):
                yield [text]
            else:
                remedy = "a corpus needs a field 'text' with a string in every entry"
                raise ConfigError(f"{_label(source)}: {Fault(index, 'text', text, remedy)}")
    except RequestError as error:
        raise ConfigError(f"{error.faults[0].remedy}; correct this line, or leave it out") from error


def _entries(source: Any, split: str | None, *, texts: bool = False) -> Iterable[Any]:
    if isinstance(source, (str, Path)) and source != "builtin":
        return _named(source, split, texts=texts)
    if _is_splits(source):
        return _one_split(source, split, "the data set")
    _refuse_split(split, source)
    if isinstance(source, str):
        return builtin_facts()
    if isinstance(source, (EditRequest, Mapping)):
        return [source]
    if isinstance(source, (bytes, bytearray)) or not isinstance(source, Iterable):
        raise ConfigError(f"a source is a name, a list or a data set, got {type(source).__name__}; {SOURCES}")
    return source


def _named(source: str | Path, split: str | None, *, texts: bool) -> Iterable[Any]:
    """Entries of a file, a folder, a URL or a data set of the hub; a path object is never one of the latter two."""
    name, path, remote = str(source), Path(source), isinstance(source, str)
    if name and exists(path) and path.is_dir():  # the path of an empty name is the current folder
        if not texts and has_images(path):
            _refuse_split(split, name)
            return read_image_folder(path)
        return _load_local(path, split)
    if remote and not exists(path) and _HUB_NAME.fullmatch(name) and not _FILE_NAME.fullmatch(name):
        return _load_hub(name, "train" if texts else split)
    _refuse_split(split, name)
    if remote and name.startswith(("http://", "https://")):
        return _read_file(_fetch(name), name, urlsplit(name).path, texts=texts)
    return _read_file(path, name, name, texts=texts)


def _read_file(path: Path, name: str, kind: str, *, texts: bool) -> Iterable[Any]:
    """Entries of a file, whose format the end of ``kind`` says: its path, or that of its URL."""
    if kind.endswith(".arrow") and path.is_file():
        return _load_local(path, None)
    kind = kind.removesuffix(".gz")
    if kind.endswith(".csv") and not texts:
        return with_folder(read_image_table(path), path.parent)
    if kind.endswith(".jsonl"):
        return with_folder(_json_lines(lines(path, name, whole=not texts), name), path.parent)
    if texts and not kind.endswith(".json"):
        return [Parts(path, name)]
    entries = parse_json(read_text(path, name), name)
    return with_folder(entries if isinstance(entries, list) else [entries], path.parent)


def _json_lines(texts: Iterable[str], name: str) -> Iterator[Any]:
    for number, line in enumerate(texts, 1):
        if line.strip():
            yield parse_json(line.removesuffix("\n"), name, number)


def _fetch(url: str) -> Path:
    """Download a URL into the cache of ``datasets``, again only if the server's ETag changed."""
    import datasets  # takes a second, and few sources need it

    try:
        return Path(datasets.DownloadManager(download_config=datasets.DownloadConfig(max_retries=0)).download(url))
    except Exception as error:
        reason = error.__cause__ or error
        raise ConfigError(f"{url} cannot be fetched: {reason}; check it, or download it and give the file") from error


def _load_local(path: Path, split: str | None) -> Iterable[Any]:
    """Load an Arrow file, a folder of ``save_to_disk``, or a folder that ``datasets`` can build a data set from."""
    import datasets

    try:
        if path.is_file():
            return datasets.Dataset.from_file(str(path))  # type: ignore[no-any-return]
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):  # of save_to_disk
            return _one_split(datasets.load_from_disk(str(path)), split, str(path))
        return _one_split(datasets.load_dataset(str(path), split=split), None, str(path))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{str(path)!r} cannot be read as a data set: {error}; {SOURCES}") from error


def _load_hub(name: str, split: str | None) -> Iterable[Any]:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        with suppress(OfflineModeIsEnabled):  # offline, only the cache can have it
            HfApi().dataset_info(name, timeout=HUB_TIMEOUT)  # load_dataset would retry for half a minute
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise ConfigError(
            f"no file or folder {name!r} here, and no data set of this name on the hub that loads: {error}; {SOURCES}. "
            "Without a network, HF_HUB_OFFLINE=1 reads what datasets has in its cache"
        ) from error
    return _one_split(loaded, None, name)


def _is_splits(source: Any) -> bool:
    """Return whether this is a ``DatasetDict``: a dictionary, but of data sets."""
    return isinstance(source, dict) and bool(source) and all(hasattr(part, "column_names") for part in source.values())


def _one_split(loaded: Any, split: str | None, name: str) -> Iterable[Any]:
    """Return a data set, its only split or the named one."""
    if not _is_splits(loaded):
        _refuse_split(split, name)
        return loaded  # type: ignore[no-any-return]
    if split is None and len(loaded) == 1:
        (split,) = loaded
    if split not in loaded:
        fault = "needs a split" if split is None else f"has no split {split!r}"
        raise ConfigError(f"{name} {fault}; choose one of {', '.join(map(str, loaded))}")
    return loaded[split]  # type: ignore[no-any-return]


def _refuse_split(split: str | None, source: Any) -> None:
    if split is not None:
        name = repr(source) if isinstance(source, (str, Path)) else _label(source)
        raise ConfigError(f"split={split!r}: {name} has no splits; leave it out")


def _label(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else f"a {type(source).__name__}"
