"""YAML texts: aliases may repeat a part, but not explode."""

import json

import pytest
import yaml

from cakeflow.storage.yaml_text import dump_yaml, read_yaml

BOMB = "\n".join([f"l{i}: &l{i} [{', '.join([f'*l{i - 1}' if i else 'x'] * 9)}]" for i in range(9)])


@pytest.mark.parametrize("text", [BOMB, json.dumps({"limit": BOMB}), "&a [*a]", "&a {b: [*a]}"])
def test_a_text_may_not_expand_without_bound(text):
    with pytest.raises(yaml.YAMLError, match=f"its aliases expand a text of {len(text)} characters"):
        read_yaml(text)


@pytest.mark.parametrize(
    "text",
    ["a: &a {x: 1}\nb: [*a, *a, {<<: *a, y: 2}]", "- " * 50 + "x", ("- " + "x" * 50_000 + "\n") * 3, "R&D *x", ""],
)
def test_other_texts_are_read_as_they_stand(text):
    assert read_yaml(text) == yaml.safe_load(text)


def test_a_text_that_is_no_yaml():
    with pytest.raises(yaml.YAMLError):
        read_yaml("{a: [")
    assert read_yaml("a: '[&x *y'") == {"a": "[&x *y"}


@pytest.mark.parametrize("text", ["a\nb\x85c", "a\u2028b", "München", "# no comment", "null", "0123", "x\ty\u00a0z"])
def test_what_is_written_is_read_again(text):
    assert read_yaml(dump_yaml({text: [text]})) == {text: [text]}
