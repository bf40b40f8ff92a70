"""The tokenizer of a GGUF file: a byte-level BPE by its tokens, merges and the name of its pre-tokenizer."""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFWriter, TokenType

from cakeflow.errors import ExportError
from cakeflow.models.language import LanguageModel

REMEDY = "export as model, and convert that by llama.cpp's convert_hf_to_gguf.py"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
BYTES = ("ByteLevel", "")
NAMES = {
    (BYTES,): "gpt-2",
    (("Digits", ""), BYTES): "smollm",
    (("Split", LLAMA3), BYTES): "llama-bpe",
    (("Split", QWEN2), BYTES): "qwen2",
}
"""Steps of a pre-tokenizer, each with its pattern -> the name that llama.cpp has for them."""


def require_known(lm: LanguageModel) -> str:
    """Return llama.cpp's name of the pre-tokenizer of a model.

    Raises:
        ExportError: If the tokenizer is no byte-level BPE, or its pre-tokenizer has no name here.
    """
    tree = json.loads(lm.tokenizer.backend_tokenizer.to_str())
    steps = _steps(tree["pre_tokenizer"])
    if tree["model"]["type"] != "BPE" or steps not in NAMES or (tree["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        kind = "/".join(name for name, _ in steps) or "none"
        raise ExportError(
            f"the tokenizer ({tree['model']['type']}, pre-tokenizer {kind}) has no name in llama.cpp that is known "
            f"here; {REMEDY}"
        )
    return NAMES[steps]


def _steps(node: dict[str, Any] | None) -> tuple[tuple[str, str], ...]:
    if not node:
        return ()
    if node["type"] == "Sequence":
        return tuple(step for part in node["pretokenizers"] for step in _steps(part))
    pattern = node.get("pattern") or {}
    plain = not node.get("add_prefix_space") and node.get("individual_digits", True)
    return ((node["type"] if plain else f"{node['type']} with options", str(pattern.get("Regex", ""))),)


def add_tokenizer(writer: GGUFWriter, lm: LanguageModel) -> None:
    """Add a model's tokenizer and chat template to a file; see ``require_known``.

    Args:
        writer: The file.
        lm: The model.
    """
    tree, size = json.loads(lm.tokenizer.backend_tokenizer.to_str()), int(lm.embedding.shape[0])
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [TokenType.UNUSED] * size
    for token, index in tree["model"]["vocab"].items():
        tokens[index], kinds[index] = token, TokenType.NORMAL
    for each in tree["added_tokens"]:
        tokens[each["id"]] = each["content"]
        kinds[each["id"]] = TokenType.CONTROL if each["special"] else TokenType.USER_DEFINED
    merges = [each if isinstance(each, str) else " ".join(each) for each in tree["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(require_known(lm))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(bool(lm.front))
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id),
                      ("unk", writer.add_unk_token_id), ("pad", writer.add_pad_token_id)):  # fmt: skip
        if (token := getattr(lm.tokenizer, f"{name}_token_id")) is not None:
            add(token)
    if isinstance(lm.tokenizer.chat_template, str):
        writer.add_chat_template(lm.tokenizer.chat_template)
