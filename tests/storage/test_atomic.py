"""Files are written whole or not at all."""

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from stops import STOPS

from cakeflow.errors import ConfigError
from cakeflow.storage import atomic


def test_text_round_trip_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    for text in ("first", "日本 🙂\n"):
        atomic.write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_content_and_no_debris(tmp_path, error):
    path = tmp_path / "c.txt"
    atomic.write_text(path, "old")

    def half(temporary):
        temporary.write_text("ne")
        raise error

    with pytest.raises(error):
        atomic.write_whole(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_visible_until_it_is_whole(tmp_path):
    path = tmp_path / "c.txt"

    def write(temporary):
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent  # on the same file system, so that renaming is atomic

    atomic.write_whole(path, write)
    assert path.read_text() == "new"


def test_tensors_round_trip_with_views_and_metadata(tmp_path):
    path = tmp_path / "t.safetensors"
    whole = torch.arange(12.0, dtype=torch.float64).reshape(3, 4).requires_grad_()
    atomic.write_tensors(path, {"turned": whole.T, "part": whole[1], "half": whole.half()}, {"note": "x"})
    found = load_file(path)
    assert torch.equal(found["turned"], whole.detach().T)
    assert torch.equal(found["part"], whole.detach()[1])
    assert found["half"].dtype == torch.float16
    with safe_open(path, "pt") as handle:
        assert handle.metadata() == {"note": "x"}


def test_lines_are_added_whole_or_not_at_all(tmp_path):
    path = tmp_path / "lines"
    atomic.append_line(path, b"one")
    with pytest.raises(OSError, match="full"), STOPS.at(1, FullError):
        atomic.append_line(path, b"two")
    assert [moment[1] for moment in STOPS.seen] == ["append", "appended"]
    assert path.read_bytes() == b"one\n"
    atomic.append_line(path, b"two")
    atomic.truncate(path, 4)
    assert path.read_bytes() == b"one\n"


class FullError(OSError):
    def __init__(self):
        super().__init__("the disk is full")


def fill(text):
    return lambda folder: (folder / "a.txt").write_text(text)


def test_a_folder_appears_whole_and_replaces_nothing_unasked(tmp_path):
    path = tmp_path / "out"
    atomic.write_folder(path, fill("first"))
    with pytest.raises(ConfigError, match="exists already"):
        atomic.write_folder(path, fill("second"))
    assert (path / "a.txt").read_text() == "first"

    def half(folder):
        fill("half")(folder)
        raise FullError

    with pytest.raises(OSError, match="full"):
        atomic.write_folder(path, half, overwrite=True)
    assert (path / "a.txt").read_text() == "first"
    atomic.write_folder(path, fill("second"), overwrite=True)
    assert (path / "a.txt").read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="choose another place"):
        atomic.write_folder(tmp_path / "file", fill("x"), overwrite=True)


@pytest.mark.usefixtures("ctrl_c")
def test_a_mount_point_is_refused_before_anything_is_written():
    with pytest.raises(ConfigError, match=r"/ is a mount point.*a folder inside it"):
        atomic.check_free(Path("/"), overwrite=True)


def test_ctrl_c_is_held_back(tmp_path):
    done = []

    def interrupted():
        with atomic.uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("whole")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["whole"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    thread = threading.Thread(
        target=lambda: done.append(atomic.uninterrupted().__enter__())
    )  # nothing to hold back there
    thread.start()
    thread.join()
    assert done == ["whole", None]
