"""Files are written whole or not at all."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cakeflow.files import write_tensors, write_text, write_whole


def test_text_round_trip_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    for text in ("first", "日本 🙂\n"):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_content_and_no_debris(tmp_path, error):
    path = tmp_path / "c.txt"
    write_text(path, "old")

    def half(temporary):
        temporary.write_text("ne")
        raise error

    with pytest.raises(error):
        write_whole(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_visible_until_it_is_whole(tmp_path):
    path = tmp_path / "c.txt"

    def write(temporary):
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent  # on the same file system, so that renaming is atomic

    write_whole(path, write)
    assert path.read_text() == "new"


def test_tensors_round_trip_with_views_and_metadata(tmp_path):
    path = tmp_path / "t.safetensors"
    whole = torch.arange(12.0, dtype=torch.float64).reshape(3, 4).requires_grad_()
    write_tensors(path, {"turned": whole.T, "part": whole[1], "half": whole.half()}, {"note": "x"})
    found = load_file(path)
    assert torch.equal(found["turned"], whole.detach().T)
    assert torch.equal(found["part"], whole.detach()[1])
    assert found["half"].dtype == torch.float16
    with safe_open(path, "pt") as handle:
        assert handle.metadata() == {"note": "x"}
