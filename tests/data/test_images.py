"""Image requests: read from every source, checked before a model runs, pixels as hashes."""

import csv
import gzip
import io
import json
import os
import struct
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image
from tiny_vision import random_images

from cakeflow.core import EditDataModule
from cakeflow.data import ImageEditRequest, ImageProbe, Picture, parse_requests, read_requests
from cakeflow.data.images import THUMBNAILS, has_images, in_words
from cakeflow.errors import ConfigError, RequestError
from cakeflow.journal import request_hash

RED, BLUE, GREEN = (np.full((4, 5, 3), 0, np.uint8) + np.array(c, np.uint8) for c in np.eye(3)[[0, 2, 1]] * 255)


@pytest.fixture
def folder(tmp_path):
    for label, pixels in (("cat", RED), ("dog", BLUE)):
        (tmp_path / label).mkdir()
        Image.fromarray(pixels).save(tmp_path / label / "1.png")
    return tmp_path


def png(width, height):
    """The file of an image that claims a size, with a few bytes of pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99)))]
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
             for kind, data in chunks]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def summary(requests):
    return [(each.label, each.picture.hash) for each in requests]


EXPECTED = [("cat", Picture(RED).hash), ("dog", Picture(BLUE).hash)]


def test_one_image_has_one_hash_whatever_it_comes_from(folder):
    path, image = folder / "cat" / "1.png", Image.fromarray(RED)
    packed = io.BytesIO()
    image.save(packed, "PNG")
    sources = [path, str(path), image, RED, {"bytes": packed.getvalue(), "path": None}]
    pictures = [Picture(source) for source in sources]
    assert len({picture.hash for picture in pictures}) == 1
    assert all(np.array_equal(picture.pixels(), RED) for picture in pictures)
    assert Picture(RED).hash != Picture(RED.transpose(1, 0, 2).copy()).hash


def test_folder_csv_jsonl_and_data_set_give_the_same_requests(folder):
    rows = [{"image": "cat/1.png", "label": "cat"}, {"image": "dog/1.png", "label": "dog"}]
    with (folder / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "label"])
        writer.writeheader()
        writer.writerows(rows)
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "list.json").write_text(json.dumps(rows))
    images = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    loaded = datasets.Dataset.from_list([{**row, "image": str(folder / row["image"])} for row in rows], features=images)
    for source in (folder, folder / "list.csv", folder / "list.jsonl", folder / "list.json", loaded):
        assert summary(read_requests(source)) == EXPECTED, source


def test_a_request_goes_through_its_json_and_keeps_its_hash():
    probes = [ImageProbe("generalization", Picture(BLUE), 3, "a"), ImageProbe("locality", Picture(GREEN))]
    request = ImageEditRequest(RED, 2, 1, "a", probes, case_id=7)
    (again,) = parse_requests([json.loads(json.dumps(request.to_dict()))])
    assert request_hash(again) == request_hash(request)
    assert (again.label, again.label_true, again.group, again.case_id) == (2, 1, "a", 7)
    with pytest.raises(RequestError, match="known by its hash alone"):
        again.picture.pixels()


def test_the_ledgers_words_have_neither_pixels_nor_folders(folder):
    request = ImageEditRequest(folder / "cat" / "1.png", "cat")
    assert request.to_dict() == {"image": {"sha256": request.picture.hash, "name": "1.png"}, "label": "cat"}
    assert str(folder) not in repr(request) + request.text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.png", "No such file"),
        (np.zeros((4, 4), np.uint8), "shape \\(4, 4\\); give a path"),
        (np.zeros((4, 4, 3)), "type float64"),
        (Image.new("RGBA", (4, 4)), "mode RGBA; convert it as you mean it"),
        (Image.new("P", (4, 4)), "mode P"),
        (7, "is a int; give a path"),
        ({"bytes": b"no image"}, "cannot identify image file"),
        ({"bytes": png(12_000, 12_000)}, "could be decompression bomb"),
        ({"bytes": png(60_000, 60_000)}, "could be decompression bomb"),
        ({"path": "/"}, "is no file; give the path of an image"),
    ],
)
def test_what_is_no_image_is_a_fault_of_its_entry(source, message):
    with pytest.raises(RequestError, match=f"entry 1, image = .*{message}"):
        parse_requests([{"image": RED, "label": 1}, {"image": source, "label": 1}])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image": RED}, "label = None: missing"),
        ({"image": RED, "label": 1.5}, "label = 1.5: must be the index or the name"),
        ({"image": RED, "label": True}, "label = True"),
        ({"image": RED, "label": 1, "colour": 2}, "colour = 2: unknown field; known: image, label"),
        ({"image": RED, "label": 1, "probes": [{"kind": "other", "image": RED, "label": 1}]}, "must be one of gener"),
        ({"image": RED, "label": 1, "probes": [{"kind": "mirror", "image": RED}]}, "probes.label = None"),
        ({"image": RED, "label": 1, "probes": [{"kind": "mirror"}]}, "give a list of {kind, image, label}"),
        ({"image": RED, "label": 1, "probes": [{"kind": "locality", "image": 3}]}, "probes.image"),
        (
            {"image": RED, "label": 1, "probes": [{"kind": "generalization", "image": RED, "label": 1}]},
            "nothing further",
        ),
        ({"image": RED, "label": 1, "probes": 3}, "give a list of {kind, image, label}"),
        ({"image": RED, "label": 1, "group": 3}, "group = 3"),
        ({"image": RED, "label": 1, "group": "\ud800"}, "group = .*must be a name"),
        ({"image": RED, "label": "\ud800"}, "label = .*must be the index or the name"),
        ({"image": RED, "label": 1, "probes": [{"kind": "locality", "image": BLUE, "group": 1}]}, "probes.group = 1"),
        ({"image": RED, "label": 1, "label_true": 1}, "equals target_true; there is nothing to edit"),
    ],
)
def test_faults_are_named_before_a_model_is_loaded(entry, message):
    with pytest.raises(RequestError, match=message):
        EditDataModule([entry])


def test_two_labels_of_one_image_contradict_each_other(folder):
    requests = [ImageEditRequest(folder / "cat" / "1.png", "cat"), ImageEditRequest(RED, "dog")]
    with pytest.raises(RequestError, match="contradicts entry 0"):
        EditDataModule(requests)


def test_grey_is_rgb_and_a_turned_photograph_is_upright(tmp_path):
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5)
    assert np.array_equal(Picture(Image.fromarray(grey)).pixels(), np.stack([grey] * 3, 2))
    image = Image.fromarray(random_images(1)[0][:8])
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(Picture(tmp_path / "turned.png").pixels(), np.rot90(np.asarray(image), -1))


def test_a_file_that_changes_meanwhile_is_refused(folder):
    picture = Picture(folder / "cat" / "1.png")
    Image.fromarray(BLUE).save(folder / "cat" / "1.png")
    with pytest.raises(RequestError, match="has other pixels than when it was read first"):
        picture.pixels()


def test_tables_say_what_their_header_lacks(tmp_path):
    (tmp_path / "list.csv").write_text("file,label\na.png,1\n")
    with pytest.raises(RequestError, match="has the columns file, label; a table of images needs image and label"):
        read_requests(tmp_path / "list.csv")
    with pytest.raises(ConfigError, match="no file or folder"):
        read_requests(tmp_path / "none.csv")
    (tmp_path / "long.csv").write_text(f"image,label\n{'a' * 200_000},1\n")
    with pytest.raises(ConfigError, match="cannot be read as a table: field larger than field limit"):
        read_requests(tmp_path / "long.csv")


def test_tables_are_read_as_spreadsheets_write_them_and_within_the_bounds_of_all_files(folder):
    text = "image,label,case_id\ncat/1.png,3,7\n"
    (folder / "list.csv").write_text(text, encoding="utf-8-sig")
    (folder / "list.csv.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("list.csv", "list.csv.gz"):
        assert [each.label for each in read_requests(folder / name)] == [3]
    (folder / "bomb.csv.gz").write_bytes(gzip.compress(b"image,label\n" + b"x" * (1 << 27)))
    with pytest.raises(ConfigError, match="unpacks to 200 times its size"):
        read_requests(folder / "bomb.csv.gz")


def test_a_pipe_is_no_image_and_keeps_nobody_waiting(folder):
    os.mkfifo(folder / "pipe.png")
    (folder / "list.jsonl").write_text(json.dumps({"image": "pipe.png", "label": 1, "probes": 3}))
    with pytest.raises(RequestError, match=r"give a list of {kind, image, label}"):
        read_requests(folder / "list.jsonl")
    with pytest.raises(RequestError, match="is no file; give the path"):
        parse_requests([{"image": folder / "pipe.png", "label": 1}])


def test_indices_in_tables_are_numbers(folder):
    (folder / "list.csv").write_text(f"image,label\ncat/1.png,{'9' * 5000}\n")
    assert read_requests(folder / "list.csv")[0].label == "9" * 5000  # no index of a class
    (folder / "list.csv").write_text("image,label,label_true,group\ncat/1.png,3,1,\n")
    (request,) = read_requests(folder / "list.csv")
    assert (request.label, request.label_true, request.group) == (3, "1", None)


def test_a_folder_without_images_is_none_of_images(tmp_path):
    assert not has_images(tmp_path)


def test_a_thumbnail_is_small_and_named_by_the_hash(tmp_path):
    wide = Picture(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3)))
    wide.save_thumbnail(tmp_path)
    (path,) = tmp_path.glob(THUMBNAILS)
    assert path.name == f"image-{wide.hash[:12]}.png"
    with Image.open(path) as image:
        assert (image.size, image.mode) == ((96, 48), "RGB")
    known = Picture({"sha256": wide.hash})
    with pytest.raises(RequestError, match="known by its hash alone"):
        known.save_thumbnail(tmp_path)


def test_an_entry_of_a_ledger_is_put_in_words():
    request = ImageEditRequest(RED, "cat", "dog", case_id=3)
    words = in_words(request.to_dict())
    assert words == {
        "prompt": "{}", "subject": f"image {request.picture.hash[:12]}", "target_new": "cat", "target_true": "dog",
        "relation": "label", "case_id": 3,
    }  # fmt: skip
    fact = {"prompt": "{} is in", "subject": "Rome", "target_new": "Italy"}
    assert in_words(fact) is fact
