"""The cache folder, and keys that differ exactly where contents do."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.core.statistics import Statistics
from cakeflow.errors import ConfigError
from cakeflow.forward.corpus import sampled_corpus
from cakeflow.models import Site
from cakeflow.storage import cache_folder, content_key, require_writable
from cakeflow.tracing.result import TraceCache

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
PARTS = st.recursive(
    SCALARS | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CAKEFLOW_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    for empty in (lambda: monkeypatch.setenv("CAKEFLOW_CACHE", ""), lambda: monkeypatch.delenv("CAKEFLOW_CACHE")):
        empty()
        assert cache_folder() == Path.home() / ".cache" / "cakeflow"


def test_a_key_is_the_hash_of_canonical_json():
    text = json.dumps(["a", 1, {"b": [1.5, None], "c": True}], sort_keys=True, separators=(",", ":"))
    key = content_key("a", 1, {"c": True, "b": (1.5, None)})
    assert key == hashlib.sha256(text.encode()).hexdigest()
    assert len(key) == 64


def typed(part):
    """A part so that Python's equality tells 1, 1.0 and True apart, and neither lists from tuples nor fields' order."""
    if isinstance(part, dict):
        return {name: typed(value) for name, value in part.items()}
    return [typed(value) for value in part] if isinstance(part, list) else (type(part), repr(part))


@given(st.lists(PARTS, max_size=3), st.lists(PARTS, max_size=3))
def test_keys_are_equal_where_parts_are(first, second):
    assert (content_key(*first) == content_key(*second)) == (typed(first) == typed(second))


@given(st.dictionaries(st.text(max_size=3), PARTS, max_size=4))
def test_the_sequence_of_fields_makes_no_difference(fields):
    assert content_key(fields) == content_key(dict(reversed(fields.items())))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("ab",), ("a", "b")), (("a", ""), ("a",)), ((1,), ("1",)), ((1,), (1.0,)), ((1,), (True,)), ((b"a",), ("a",)),
        (([1, 2],), (1, 2)), ((), (None,)), ((b"",), (None,)), ((0.1 + 0.2,), (0.3,)),
    ],
)  # fmt: skip
def test_what_reads_alike_has_different_keys(first, second):
    assert content_key(*first) != content_key(*second)


@pytest.mark.parametrize("part", [object(), {1, 2}, Path("a"), 1j])
def test_parts_without_one_text_are_refused(part):
    with pytest.raises(TypeError, match=type(part).__name__):
        content_key("a", {"b": [part]})


def test_keys_are_those_of_another_process():
    code = "from cakeflow.storage import content_key; print(content_key('é', 0.1, {'b': b'x', 'a': [2]}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == content_key("é", 0.1, {"a": [2], "b": b"x"})


def test_a_cache_that_cannot_be_written_is_named_before_the_work(lm, tmp_path, monkeypatch):
    """A file in its place stands for a folder without rights, which root would not notice."""
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("CAKEFLOW_CACHE", str(tmp_path / "taken"))
    passes = []
    lm.model.register_forward_pre_hook(lambda *_: passes.append(1))
    texts = [{"text": "The Elbe flows into the sea. " * 400}]
    for work in (
        lambda: require_writable(tmp_path / "taken" / "x"),
        lambda: Statistics(texts, tokens=1000, window=32).collect(lm, [Site(1, "mlp_out")]),
        lambda: sampled_corpus(lm, 640),
        lambda: TraceCache.of(lm, {}, None).add([], []),
    ):
        with pytest.raises(ConfigError, match=r"taken.* cannot be written: .*; set CAKEFLOW_CACHE"):
            work()
    assert not passes


def test_a_folder_that_can_be_written_is_left_empty(tmp_path):
    assert require_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not list((tmp_path / "a" / "b").iterdir())
