"""Image requests: a picture that a classifier gets wrong, its right label, and the pictures that probe the result."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import UInt8

from cakeflow.data.files import exists, lines
from cakeflow.data.request import EditRequest
from cakeflow.errors import ConfigError, Fault, RequestError, has_surrogate
from cakeflow.storage.atomic import write_whole

ImageProbeKind = Literal["generalization", "locality", "mirror"]
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
"""Ends of the names of image files in a folder."""
FIELDS = ("image", "label", "label_true", "group", "probes", "case_id")
"""Fields of an image request in a file."""
THUMBNAILS = "image-*.png"
"""Files of a run folder that are the edited pictures made small; the star is the first digits of their hash."""
LONGEST_INDEX = 18
"""Most digits of the index of a class; more are a name."""
SIDE = 96
"""Longest side of a thumbnail in pixels."""
PIXELS = "give a path, an uint8 array of height x width x 3, or a PIL image"


def _pillow(name: str) -> Any:
    """A module of Pillow, which is needed for image files only.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return importlib.import_module(f"PIL.{name}")
    except ImportError as error:
        raise ConfigError("image files are read by Pillow; install it: pip install 'cakeflow[vision]'") from error


class Picture:
    """The pixels of one image, read when they are needed, and their hash, which stands for them everywhere else.

    Attributes:
        name: Name of the file without its folder; empty if there is none.
        hash: SHA-256 of size and pixels; empty if they cannot be read.
        fault: Why they cannot be read, with a remedy; empty if they can.

    Args:
        source: A path, an array, a PIL image, a mapping with ``bytes`` and ``path`` (of ``datasets``), or one with
            ``sha256`` and ``name``, as a ledger has it: then the pixels are not there.
    """

    __slots__ = ("_source", "fault", "hash", "name")

    def __init__(self, source: Any) -> None:
        self._source = source
        recorded = isinstance(source, Mapping) and "sha256" in source
        self.name, self.hash, self.fault = _name_of(source), str(source["sha256"]) if recorded else "", ""
        if not recorded:
            try:
                self.hash = _hash(_read(source))
            except ConfigError:  # Pillow is not there
                raise
            except Exception as error:  # for damaged files, Pillow's decoders raise errors of many types
                self.fault = str(error) or type(error).__name__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and (self.hash, self.name) == (other.hash, other.name)

    def __hash__(self) -> int:
        return hash((self.hash, self.name))

    def __repr__(self) -> str:
        return f"Picture({self.name!r}, {self.hash[:12]})"

    def pixels(self) -> UInt8[np.ndarray, "height width 3"]:
        """Read the pixels.

        Raises:
            RequestError: If they are not there, cannot be read, or are not those that were hashed.
        """
        if self.fault or (isinstance(self._source, Mapping) and "sha256" in self._source):
            remedy = self.fault or "is known by its hash alone, as ledgers have no pixels; give the image itself"
            raise RequestError([Fault(0, "image", self.name or self.hash[:12], remedy)])
        pixels = _read(self._source)
        if _hash(pixels) != self.hash:
            remedy = "has other pixels than when it was read first; leave its file alone while it is edited"
            raise RequestError([Fault(0, "image", self.name or self.hash[:12], remedy)])
        return pixels

    def save_thumbnail(self, folder: Path) -> None:
        """Write the picture, made small, as a PNG file that has the first digits of its hash as its name.

        Args:
            folder: The folder, which is there.

        Raises:
            RequestError: If the pixels cannot be read.
        """
        image = _pillow("Image").fromarray(self.pixels())
        image.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        content = buffer.getvalue()
        write_whole(folder / THUMBNAILS.replace("*", self.hash[:12]), lambda temporary: temporary.write_bytes(content))

    def to_dict(self) -> dict[str, str]:
        """Hash and name; never pixels or a folder."""
        return {"sha256": self.hash, **({"name": self.name} if self.name else {})}


def _name_of(source: Any) -> str:
    if isinstance(source, Mapping):
        return Path(str(source.get("name") or source.get("path") or "")).name
    return Path(str(source if isinstance(source, (str, Path)) else getattr(source, "filename", ""))).name


def _hash(pixels: UInt8[np.ndarray, "height width 3"]) -> str:
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def _read(source: Any) -> UInt8[np.ndarray, "height width 3"]:
    if isinstance(source, Mapping):
        source = io.BytesIO(source["bytes"]) if source.get("bytes") else source.get("path")
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise ValueError(f"is an array of type {source.dtype} and shape {source.shape}; {PIXELS}")
        return source
    if isinstance(source, (str, Path)) and exists(Path(source)) and not Path(source).is_file():  # a pipe would wait
        raise ValueError("is no file; give the path of an image")
    if isinstance(source, (str, Path, io.BytesIO)):
        image, bomb = _pillow("Image"), _pillow("Image").DecompressionBombWarning
        with warnings.catch_warnings():
            warnings.simplefilter("error", bomb)
            with image.open(source) as opened:
                return _rgb(opened)
    if hasattr(source, "convert") and hasattr(source, "mode"):
        return _rgb(source)
    raise TypeError(f"is a {type(source).__name__}; {PIXELS}")


def _rgb(image: Any) -> UInt8[np.ndarray, "height width 3"]:
    """Return the pixels of a PIL image, upright; grey becomes RGB, which loses nothing."""
    if image.mode not in ("RGB", "L"):
        raise ValueError(f"has the mode {image.mode}; convert it as you mean it: image.convert('RGB')")
    return np.asarray(_pillow("ImageOps").exif_transpose(image).convert("RGB"), np.uint8)


@dataclass(frozen=True, slots=True)
class ImageProbe:
    """A picture that measures what an edit did beyond its own.

    Attributes:
        kind: ``generalization`` (of the same group, should now get the right label), ``locality`` (should keep the
            label that it gets) or ``mirror`` (of the group with the opposite error, should stay as good).
        picture: The picture.
        label: Its right label; a locality probe needs none.
        group: Name of its group.
    """

    kind: ImageProbeKind
    picture: Picture
    label: int | str | None = None
    group: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data without empty fields."""
        values = {"kind": self.kind, "image": self.picture.to_dict(), "label": self.label, "group": self.group}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, init=False)
class ImageEditRequest(EditRequest):
    """One picture whose label is to be corrected.

    For journal, policy and reports it is a request like any other: its subject is the picture, by its hash, and its
    target the right label.

    Attributes:
        picture: The picture.
        label: The right label, an index or a name of the model's classes.
        label_true: The label that it gets at present, if that is known.
        group: Name of its group, such as ``sandal_sneaker`` (right and present label).
        image_probes: Pictures for evaluation only.

    Args:
        image: A path, an array, a PIL image or a ``Picture``.
        label: The right label.
        label_true: The present label.
        group: Name of the group.
        probes: Pictures for evaluation.
        case_id: Id of the record in its data set.

    Example:
        >>> request = ImageEditRequest(np.zeros((2, 2, 3), np.uint8), "cat", "dog")
        >>> request.target_new, request.text
        ('cat', 'image 93d26e15f25c')
    """

    picture: Picture = field(init=False)
    label: int | str = field(init=False)
    label_true: int | str | None = field(init=False)
    group: str | None = field(init=False)
    image_probes: tuple[ImageProbe, ...] = field(init=False)

    def __init__(
        self,
        image: Any,
        label: int | str,
        label_true: int | str | None = None,
        group: str | None = None,
        probes: Iterable[ImageProbe] = (),
        case_id: int | str | None = None,
    ) -> None:
        picture = image if isinstance(image, Picture) else Picture(image)
        name = picture.name.replace("{", "(").replace("}", ")")
        EditRequest.__init__(
            self,
            prompt=f"{{}} ({name})" if name else "{}",
            subject=f"image {picture.hash[:12]}".strip(),
            target_new=str(label),
            target_true=None if label_true is None else str(label_true),
            relation="label",
            case_id=case_id,
        )
        values = (picture, label, label_true, group, tuple(probes))
        for name, value in zip(("picture", "label", "label_true", "group", "image_probes"), values, strict=True):
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data without pixels and empty fields; ``parse_requests`` reads it back."""
        values = {
            "image": self.picture.to_dict(),
            "label": self.label,
            "label_true": self.label_true,
            "group": self.group,
            "probes": [probe.to_dict() for probe in self.image_probes],
            "case_id": self.case_id,
        }
        return {name: value for name, value in values.items() if value not in (None, [])}


def image_faults(request: ImageEditRequest, index: int) -> list[Fault]:
    """Return all faults of the pictures and labels of a request.

    Args:
        request: The request.
        index: Position of the request in its list.
    """
    return [Fault(index, *fault) for fault in _faults(request)]


def _faults(request: ImageEditRequest) -> Iterator[tuple[str, object, str]]:
    """Yield (field, value, remedy) of each fault."""
    if request.picture.fault:
        yield "image", request.picture.name or None, request.picture.fault
    yield from _label_faults("label", request.label)
    if request.label_true is not None:
        yield from _label_faults("label_true", request.label_true)
    yield from _group_faults("group", request.group)
    for probe in request.image_probes:
        yield from _probe_faults(probe)
        if probe.picture.hash and probe.picture.hash == request.picture.hash:
            yield "probes.image", probe.picture.name or None, "is the edited image, which shows nothing further"


def _label_faults(name: str, label: object) -> Iterator[tuple[str, object, str]]:
    if (
        isinstance(label, bool)
        or not isinstance(label, (int, str))
        or (isinstance(label, str) and has_surrogate(label))
    ):
        yield name, label, "must be the index or the name of a class"


def _group_faults(name: str, group: object) -> Iterator[tuple[str, object, str]]:
    if group is not None and (not isinstance(group, str) or has_surrogate(group)):
        yield name, group, "must be a name, or left out"


def _probe_faults(probe: ImageProbe) -> Iterator[tuple[str, object, str]]:
    if probe.kind not in get_args(ImageProbeKind):
        yield "probes.kind", probe.kind, f"must be one of {', '.join(get_args(ImageProbeKind))}"
    if probe.picture.fault:
        yield "probes.image", probe.picture.name or None, probe.picture.fault
    if probe.label is not None or probe.kind != "locality":
        yield from _label_faults("probes.label", probe.label)
    yield from _group_faults("probes.group", probe.group)


def image_request(entry: Mapping[str, Any]) -> ImageEditRequest:
    """Return the request of an entry with the fields of ``FIELDS``.

    Raises:
        KeyError: If image or label is missing.
        TypeError: If probes are no list of mappings.
    """
    values = dict(entry)
    probes = [
        ImageProbe(each["kind"], Picture(each["image"]), each.get("label"), each.get("group"))
        for each in values.pop("probes", None) or ()
    ]
    return ImageEditRequest(values.pop("image"), _label(values.pop("label")), probes=probes, **values)


def _label(value: Any) -> Any:
    """Return a label; an index that a CSV file or numpy gives becomes an integer."""
    if isinstance(value, str) and value.isdecimal() and len(value) <= LONGEST_INDEX:
        return int(value)
    return int(value) if isinstance(value, np.integer) else value


def in_words(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an entry of a ledger with prompt, subject and target: as it is, or, of a picture, those of its request."""
    if "image" not in entry:
        return entry
    request = image_request(entry)
    names = ("prompt", "subject", "target_new", "target_true", "relation", "case_id")
    return {name: getattr(request, name) for name in names}


def with_folder(entries: Iterable[Any], folder: Path) -> Iterator[Any]:
    """Yield entries of a file; the paths of pictures are taken from the file's folder."""
    for entry in entries:
        if isinstance(entry, Mapping) and isinstance(entry.get("image"), str):
            probes = entry.get("probes")
            probes = [*with_folder(probes, folder)] if isinstance(probes, (list, tuple)) else probes
            entry = {**entry, "image": folder / entry["image"], **({"probes": probes} if probes else {})}
        yield entry


def read_image_table(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a CSV file with a header that has the fields ``image`` and ``label``.

    Raises:
        ConfigError: If the file cannot be read as text.
        RequestError: If the header lacks a field or has unknown ones.
    """
    try:
        rows = list(csv.DictReader(lines(path, str(path))))
    except csv.Error as error:
        raise ConfigError(f"{str(path)!r} cannot be read as a table: {error}; give a CSV file in UTF-8") from error
    header = [name for name in (rows[0] if rows else {}) if name is not None]
    unknown = sorted(set(header) - (set(FIELDS) - {"probes"}))
    if unknown or not {"image", "label"} <= set(header):
        remedy = (
            f"{path.name} has the columns {', '.join(header) or 'none'}; a table of images needs image and label, and "
            "may have label_true, group and case_id; facts in texts come as .json or .jsonl"
        )
        raise RequestError([Fault(1, "line", ",".join(header), remedy)])
    return ({name: value for name, value in row.items() if value not in (None, "")} for row in rows)


def has_images(folder: Path) -> bool:
    """True if a folder has folders of image files, one per label."""
    return next(_files(folder), None) is not None


def read_image_folder(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield an entry for each image file ``LABEL/NAME`` in a folder, in the order of their names."""
    return ({"image": path, "label": path.parent.name} for path in sorted(_files(folder)))


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("*/*") if path.suffix.lower() in ENDINGS and path.is_file())
