"""Files are written whole or not at all."""

import os
import signal
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from stops import STOPS

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
    result = load_file(path)
    assert torch.equal(result["turned"], whole.detach().T)
    assert torch.equal(result["part"], whole.detach()[1])
    assert result["half"].dtype == torch.float16
    with safe_open(path, "pt") as handle:
        assert handle.metadata() == {"note": "x"}


def test_equal_tensors_and_texts_give_equal_bytes(tmp_path):
    """safetensors writes the texts in an order that differs from write to write."""
    texts = {f"ключ-{i}": f'a "quoted"\n\x01 text {i}' for i in range(30)}
    files = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for path in files:
        atomic.write_tensors(path, {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.float64)}, texts)
    assert len({path.read_bytes() for path in files}) == 1
    assert torch.equal(load_file(files[0])["b"], torch.ones(3))
    with safe_open(files[0], "pt") as handle:
        assert handle.metadata() == texts


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


def test_an_append_that_did_not_end_is_marked_until_it_does(tmp_path):
    path, offsets = tmp_path / "lines", []
    atomic.append_line(path, b"one")
    assert atomic.unfinished(path) is None

    class LookError(Exception):
        def __init__(self):
            offsets.append(atomic.unfinished(path))

    for place in (0, 1):
        with pytest.raises(LookError), STOPS.at(place, LookError):
            atomic.append_line(path, b"two")
    assert offsets == [4, 4]
    assert [each.name for each in tmp_path.iterdir()] == ["lines"]
    (tmp_path / ".lines.append").write_text("damaged")
    assert atomic.unfinished(path) is None


def test_lines_are_not_added_through_a_link(tmp_path):
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "lines").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="lines"):
        atomic.append_line(tmp_path / "lines", b"one")
    assert (tmp_path / "elsewhere").read_text() == ""


def test_new_folders_are_flushed_with_the_names_in_them(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(atomic, "flush", lambda path: flushed.append(path))
    atomic.write_text(tmp_path / "a" / "b" / "c.txt", "x")
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= set(flushed)
    flushed.clear()
    atomic.make_folder(tmp_path / "a" / "b")
    assert flushed == []


def test_temporary_names_are_never_those_of_another_process(tmp_path):
    names = set()
    for _ in range(50):
        atomic.write_whole(tmp_path / "x", lambda temporary: (names.add(temporary.name), temporary.touch()))
    assert len(names) == 50
    assert all(name.startswith(".x.") for name in names)


def test_a_file_of_no_tensors_can_be_read(tmp_path):
    atomic.write_tensors(tmp_path / "t.safetensors", {})
    assert load_file(tmp_path / "t.safetensors") == {}


@pytest.mark.usefixtures("ctrl_c")
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


class LateError(Exception):
    pass


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGTERM, signal.SIGUSR1])
def test_the_handler_of_any_signal_is_held_back(number):
    def handler(*_):
        calls.append("handler")
        raise LateError

    def work():
        with atomic.uninterrupted():
            with atomic.uninterrupted():
                signal.raise_signal(number)
            calls.append("body")

    calls, usual = [], signal.signal(number, handler)
    try:
        with pytest.raises(LateError):
            work()
        assert calls == ["body", "handler"]
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, usual)


@pytest.mark.usefixtures("ctrl_c")
def test_no_signal_is_lost_when_the_handler_of_another_raises():
    def work():
        with atomic.uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)

    calls, usual = [], signal.signal(signal.SIGTERM, lambda *_: calls.append("SIGTERM"))
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert calls == ["SIGTERM"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, usual)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_rights_are_passed_on_inside_the_folder_only(tmp_path):
    folder, own = tmp_path / "run", tmp_path / "own.txt"
    folder.mkdir(mode=0o700)
    own.write_text("mine")
    own.chmod(0o644)
    (folder / "a.txt").write_text("a")
    (folder / "link").symlink_to(own)
    atomic.pass_on_rights(folder, folder.iterdir())
    assert (folder / "a.txt").stat().st_mode & 0o777 == 0o600
    assert own.stat().st_mode & 0o777 == 0o644
