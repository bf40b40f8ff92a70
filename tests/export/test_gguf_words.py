"""Tokenizers of GGUF files."""

import copy

import pytest
from gguf import GGUFReader, GGUFWriter
from tokenizers import Regex, pre_tokenizers

from cakeflow.errors import ExportError
from cakeflow.export.gguf_words import LLAMA3, QWEN2, add_tokenizer, require_known

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]), "smollm"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]), "llama-bpe"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), BYTES]), "qwen2"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("a"), "isolated"), BYTES]), None),
        (pre_tokenizers.Whitespace(), None),
    ],
)
def test_a_pre_tokenizer_has_its_name_or_is_refused(lm, steps, name):
    lm = copy.deepcopy(lm)
    lm.tokenizer.backend_tokenizer.pre_tokenizer = steps
    if name:
        assert require_known(lm) == name
    else:
        with pytest.raises(ExportError, match="no name in llama"):
            require_known(lm)


def test_every_token_has_its_number(lm, tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    add_tokenizer(writer, lm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = GGUFReader(tmp_path / "a.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == len(lm.embedding)
    assert all(tokens[index] == token for token, index in lm.tokenizer.get_vocab().items())
    assert fields["tokenizer.ggml.token_type"].contents()[0] == 3
