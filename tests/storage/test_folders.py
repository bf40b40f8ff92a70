"""Folders appear whole, replace only what was checked, and belong to whoever made them."""

import os
import signal
import threading
from pathlib import Path

import pytest

from cakeflow.errors import ConfigError, LockedError, RunFolderError
from cakeflow.storage import folders
from cakeflow.storage.locks import locked

in_one_step_and_two = pytest.mark.parametrize("steps", [1, 2])


@pytest.fixture
def swaps(steps, monkeypatch):
    """Whether this system swaps folders in one step, or needs two."""
    if steps == 2:
        monkeypatch.setattr(folders, "_swapped", lambda one, other: False)


class FullError(OSError):
    def __init__(self):
        super().__init__("the disk is full")


def fill(text):
    return lambda folder: (folder / "a.txt").write_text(text)


def test_a_folder_appears_whole_and_replaces_nothing_unasked(tmp_path):
    path = tmp_path / "out"
    folders.write_folder(path, fill("first"))
    with pytest.raises(ConfigError, match="exists already"):
        folders.write_folder(path, fill("second"))
    assert (path / "a.txt").read_text() == "first"

    def half(folder):
        fill("half")(folder)
        raise FullError

    with pytest.raises(OSError, match="full"):
        folders.write_folder(path, half, overwrite=True)
    assert (path / "a.txt").read_text() == "first"
    folders.write_folder(path, fill("second"), overwrite=True)
    assert (path / "a.txt").read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="choose another place"):
        folders.write_folder(tmp_path / "file", fill("x"), overwrite=True)


@in_one_step_and_two
@pytest.mark.usefixtures("swaps")
def test_a_folder_that_changed_meanwhile_is_left_alone(tmp_path):
    path = tmp_path / "out"
    folders.write_folder(path, fill("first"))

    def change(folder):
        fill("second")(folder)
        (path / "notes.txt").write_text("of somebody else")

    with pytest.raises(ConfigError, match="changed while"):
        folders.write_folder(path, change, overwrite=True)
    assert (path / "a.txt").read_text() == "first"
    assert (path / "notes.txt").read_text() == "of somebody else"
    assert list(tmp_path.iterdir()) == [path]

    def vanish(folder):
        fill("second")(folder)
        path.rename(tmp_path / "moved")

    with pytest.raises(ConfigError, match="changed while"):
        folders.write_folder(path, vanish, overwrite=True)
    assert [each.name for each in tmp_path.iterdir()] == ["moved"]


@pytest.mark.parametrize("appear", [lambda path: path.mkdir(), lambda path: (path.mkdir(), fill("other")(path)),
                                    lambda path: path.write_text("other")], ids=["empty", "full", "file"])  # fmt: skip
def test_what_appears_meanwhile_is_never_written_into(tmp_path, appear):
    def write(folder):
        fill("mine")(folder)
        appear(path)

    path = tmp_path / "out"
    with pytest.raises(ConfigError, match="changed while"):
        folders.write_folder(path, write)
    assert list(tmp_path.iterdir()) == [path]
    assert path.is_file() or [each.read_text() for each in path.iterdir()] in ([], ["other"])


def killed_at_rename(path, number):
    """Replace a folder in a process that is killed at one of its renames."""
    child = os.fork()
    if child == 0:
        renames, usual = [], type(path).rename

        def rename(one, other):
            renames.append(one)
            if len(renames) > number:
                os.kill(os.getpid(), signal.SIGKILL)
            return usual(one, other)

        type(path).rename = rename
        folders.write_folder(path, fill("second"), overwrite=True)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("number", [0, 1])
@in_one_step_and_two
@pytest.mark.usefixtures("swaps")
def test_after_a_kill_the_next_attempt_finds_the_old_folder_and_cleans_up(tmp_path, steps, number):
    path = tmp_path / "out"
    folders.write_folder(path, fill("first"))
    (tmp_path / ".out.v2.0123456789abcdef.tmp").mkdir()  # of another folder, which is being written
    status = killed_at_rename(path, number)
    assert status == (signal.SIGKILL if steps == 2 else 0)
    with pytest.raises(ConfigError, match="exists already"):
        folders.write_folder(path, fill("third"))
    assert (path / "a.txt").read_text() == ("first" if steps == 2 else "second")
    assert sorted(each.name for each in tmp_path.iterdir()) == [".out.v2.0123456789abcdef.tmp", "out"]
    folders.write_folder(path, fill("third"), overwrite=True)
    assert (path / "a.txt").read_text() == "third"


def test_two_who_write_the_same_folder_do_not_meet(tmp_path):
    errors = []

    def second():
        try:
            folders.write_folder(tmp_path / "out", fill("second"), overwrite=True)
        except LockedError as error:
            errors.append(error)

    def write(folder):
        fill("first")(folder)
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    folders.write_folder(tmp_path / "out", write, overwrite=True)
    assert len(errors) == 1
    assert (tmp_path / "out/a.txt").read_text() == "first"


def test_of_many_who_claim_a_folder_each_gets_another_one(tmp_path):
    numbers, together = [], threading.Barrier(8)

    def claim():
        together.wait()
        numbers.append(folders.claim_folder(tmp_path / "runs" / "cakeflow", "version_"))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(8))
    (tmp_path / "runs/cakeflow/version_x").mkdir()
    (tmp_path / "runs/cakeflow/version_20").touch()
    assert folders.claim_folder(tmp_path / "runs" / "cakeflow", "version_") == 21


def test_links_do_not_lead_out_of_a_folder(tmp_path):
    inside, outside = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "file").touch()
    (inside / "near").symlink_to(inside / "file")
    (inside / "far").symlink_to(outside)
    (tmp_path / "alias").symlink_to(inside)
    for path in (inside / "file", inside / "near", tmp_path / "alias" / "file", inside / "not there"):
        assert folders.require_inside(path, path.parent) == path
    with pytest.raises(RunFolderError, match="leads out of"):
        folders.require_inside(inside / "far" / "file", inside)


def test_the_lock_leaves_nothing_beside_a_folder(tmp_path):
    with locked(tmp_path / "out"):
        assert sorted(each.name for each in tmp_path.iterdir()) == [".out.lock", ".out.owner"]
    assert list(tmp_path.iterdir()) == []


def test_a_mount_point_is_refused_before_anything_is_written():
    with pytest.raises(ConfigError, match=r"/ is a mount point.*a folder inside it"):
        folders.check_free(Path("/"), overwrite=True)
