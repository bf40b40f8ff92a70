"""A GGUF file of the edited model, for llama.cpp and Ollama.

Where the model came from a GGUF file, the edited tensors are swapped in it, and all other bytes stay. Any other model
is laid out as llama.cpp's ``convert_hf_to_gguf.py`` does, if it has Llama's structure.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from cakeflow.errors import ExportError
from cakeflow.export.gguf_file import EXACT, Packed, architecture_in, open_gguf, packed, stored, write_swapped
from cakeflow.export.gguf_layout import architecture_code, layout_of, measured_layout, tensor_name
from cakeflow.export.gguf_words import REMEDY, add_tokenizer, require_known
from cakeflow.export.manifest import Manifest
from cakeflow.export.options import ExportOptions
from cakeflow.export.questions import answers_of, difference, questions
from cakeflow.journal.journal import Journal
from cakeflow.models.language import LanguageModel
from cakeflow.models.loading import gguf_source, without_progress_bars

FILE, MODELFILE = "model.gguf", "Modelfile"
LLAMA_STYLE = ("llama", "qwen2", "qwen3")
"""Architectures of GGUF that a new file can be written for."""
NUMBERS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
"""Key of GGUF -> entry of a config."""
UNREAD = ("head_dim", "attention_bias", "mlp_bias")
"""Entries of a config that transformers may not take from a file."""


@dataclass(frozen=True)
class Draft:
    """A GGUF file to be written.

    Attributes:
        tensors: Name in the file -> tensor: the edited ones, or all of a new file.
        values: Name of each edited weight -> what a reader of the file gets, in the model's layout and type.
        write: Writes the file.
    """

    tensors: Mapping[str, Packed]
    values: Mapping[str, Tensor]
    write: Callable[[Path], None]


def write_gguf(journal: Journal, manifest: Manifest, options: ExportOptions) -> tuple[Manifest, Callable[[Path], None]]:
    """The manifest with what the file's types cost, and a function that fills a folder; see ``export``.

    Raises:
        ExportError: If GGUF does not know the architecture or a type, or the original file is another model.
    """
    lm = journal.model
    if not isinstance(lm, LanguageModel):
        raise ExportError(f"a {type(lm).__name__} cannot be written as a language model")
    source = Path(options.source) if options.source else gguf_source(journal.policies.name)
    draft = _swapped(journal, lm, source, manifest, options) if source else _converted(lm, manifest, options)
    details = {"source": source.name if source else "", **_stated(draft, lm, journal)}
    details["answers"], loss = _asked(lm, draft, journal)
    manifest = manifest.model_copy(update={"details": details, "tolerance": loss})

    def fill(folder: Path) -> None:
        draft.write(folder / FILE)
        (folder / MODELFILE).write_text(modelfile(lm), encoding="utf-8", newline="\n")

    return manifest, fill


def modelfile(lm: LanguageModel) -> str:
    """Return an Ollama Modelfile beside the GGUF file: ``ollama create NAME -f Modelfile``."""
    ends = lm.model.generation_config.eos_token_id if lm.model.can_generate() else None
    ends = [ends] if isinstance(ends, int) else ends or []
    texts = [lm.tokenizer.convert_ids_to_tokens(end) for end in ends]
    stops = [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in dict.fromkeys(texts) if text]
    return "\n".join(["# the chat template is in the file", f"FROM ./{FILE}", *stops, ""])


def _swapped(journal: Journal, lm: LanguageModel, source: Path, manifest: Manifest, options: ExportOptions) -> Draft:
    """The original file with the edited tensors in it."""
    reader = open_gguf(source)
    architecture = architecture_in(reader, source)
    entries = {each.name: each for each in reader.tensors}
    tensors, values = {}, {}
    for name in manifest.weights:
        place = tensor_name(architecture, lm.depth, name)
        if place not in entries:
            raise ExportError(f"{source.name} has no tensor for {name}; give the model's own file as source")
        original = lm.oriented(name, journal.original(name)[name])
        layout = measured_layout(lm, original, stored(entries[place]))
        if layout is None:
            raise ExportError(f"{source.name}, {place}: not the unedited {name}; give the model's own file as source")
        weight = lm.oriented(name)
        kind = entries[place].tensor_type.name if options.tensor_type == "same" else _kind(options, weight)
        tensors[place] = packed(name, layout(weight.cpu()), kind)
        values[name] = _read_back(weight, layout, tensors[place])
    return Draft(tensors, values, lambda path: write_swapped(reader, path, tensors))


def _read_back(weight: Tensor, layout: Callable[[Tensor], Tensor], tensor: Packed) -> Tensor:
    """Return what a reader gets of a weight, with its rows back in the model's order."""
    rows = layout(torch.arange(len(weight)))
    values = torch.empty_like(tensor.values)
    values[rows] = tensor.values
    return values.to(weight.dtype)


def _kind(options: ExportOptions, weight: Tensor) -> str:
    exact = EXACT.get(weight.dtype, "F32")
    return exact if options.tensor_type in ("exact", "same") else options.tensor_type


def _converted(lm: LanguageModel, manifest: Manifest, options: ExportOptions) -> Draft:
    """A new file."""
    architecture = _architecture(lm)
    tensors, values = {}, {}
    tied = lm.model.all_tied_weights_keys
    for name, tensor in lm.model.state_dict().items():
        place = tensor_name(architecture, lm.depth, name)
        if name in tied:
            continue
        if place is None:
            raise ExportError(f"GGUF's {architecture} has no tensor for {name}; {REMEDY}")
        edited, matrix = name in manifest.weights, tensor.dim() > 1
        kind = _kind(options, tensor) if edited else EXACT.get(tensor.dtype, "F32") if matrix else "F32"
        layout = layout_of(lm, architecture, place)
        tensors[place] = packed(name, layout(tensor.cpu()), kind)
        if edited:
            values[name] = _read_back(tensor, layout, tensors[place])
    return Draft(tensors, values, lambda path: _write_new(lm, architecture, tensors, path))


def _architecture(lm: LanguageModel) -> str:
    """The architecture of a new file.

    Raises:
        ExportError: If GGUF does not know it, or it cannot be laid out here.
    """
    config = lm.config
    name = str(config.model_type)
    architecture_code(name)
    rope = getattr(config, "rope_parameters", None) or {}
    faults = {
        f"the layout of {name}": name not in LLAMA_STYLE,
        f"positions of type {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default",
        "biases of a qwen3, which llama.cpp has none of,": name == "qwen3"
        and bool(getattr(config, "attention_bias", 0)),
        "sliding windows": bool(getattr(config, "use_sliding_window", False)),
        f"the activation {getattr(config, 'hidden_act', None)!r}": getattr(config, "hidden_act", "silu") != "silu",
    }
    if missing := [each for each, fault in faults.items() if fault]:
        raise ExportError(f"a new GGUF file cannot have {' and '.join(missing)} here; {REMEDY}")
    require_known(lm)
    return name


def _write_new(lm: LanguageModel, architecture: str, tensors: Mapping[str, Packed], path: Path) -> None:
    writer = GGUFWriter(path, architecture)
    writer.add_type("model")
    _add_numbers(writer, architecture, lm.config)
    add_tokenizer(writer, lm)
    writer.add_quantization_version(2)
    kinds = {torch.float16: 1, torch.bfloat16: 32}
    writer.add_file_type(kinds.get(lm.dtype, 0))
    for name, tensor in tensors.items():
        shape = tensor.values.shape
        data = memoryview(tensor.data)
        array = torch.frombuffer(bytearray(data), dtype=torch.uint8).numpy().reshape(*shape[:-1], -1)
        writer.add_tensor(name, array, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_numbers(writer: GGUFWriter, architecture: str, config: Any) -> None:
    """Add what decides the model beside its tensors."""
    for key, entry in NUMBERS.items():
        writer.add_uint32(f"{architecture}.{key}", int(getattr(config, entry)))
    head = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        writer.add_uint32(f"{architecture}.{key}", head)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", float(config.rms_norm_eps))
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_float32(f"{architecture}.rope.freq_base", float(rope.get("rope_theta", 10000.0)))


def _stated(draft: Draft, lm: LanguageModel, journal: Journal) -> dict[str, Any]:
    """Return type and error of every edited weight: relative to the weight, and to the change of it."""
    kinds = {kind.kind.name for kind in draft.tensors.values()}
    rows = {}
    for name, value in draft.values.items():
        weight, original = lm.oriented(name).cpu().double(), lm.oriented(name, journal.original(name)[name]).double()
        error = torch.linalg.matrix_norm(value.double() - weight)
        rows[name] = {
            "error": float(error / torch.linalg.matrix_norm(weight)),
            "error_of_change": float(error / torch.linalg.matrix_norm(weight - original)),
        }
    return {"types": sorted(kinds), "weights": rows}


@contextmanager
def _rounded(lm: LanguageModel, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Have what a reader of the file gets in the model, for a while."""
    kept = {name: lm.weight(name).detach().clone() for name in values}
    try:
        with torch.no_grad():
            for name, value in values.items():
                lm.oriented(name).copy_(value)
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                lm.weight(name).copy_(value)


def _asked(lm: LanguageModel, draft: Draft, journal: Journal) -> tuple[str, float]:
    """Return how many next tokens stay as they are in the file's types, and the largest difference of logits."""
    texts = questions(journal)
    expected = answers_of(lm, texts)
    with _rounded(lm, draft.values):
        answers = answers_of(lm, texts)
    same = sum(bool(a[0, -1].argmax() == b[0, -1].argmax()) for a, b in zip(answers, expected, strict=True))
    if same < len(texts):
        warnings.warn(
            f"stored so, {len(texts) - same} of {len(texts)} asked prompts have another next token than the edited "
            "model gives; choose tensor_type='exact' or Q8_0",
            stacklevel=4,
        )
    return f"{same} of {len(texts)}", difference(answers, expected)


def _config_of(lm: LanguageModel, folder: Path) -> Any:
    """The config that the file of an export states, and for what transformers does not find there that of the model."""
    stated: Any = AutoConfig.from_pretrained(folder, gguf_file=FILE)
    missing = [name for name in UNREAD if getattr(stated, name, None) != getattr(lm.config, name, None)]
    if missing:
        warnings.warn(
            f"transformers does not find {' and '.join(missing)} in a GGUF file, as llama.cpp does; it loads this one "
            "with the config of the base model only: from_pretrained(FOLDER, gguf_file=..., config=...)",
            stacklevel=6,
        )
    config = copy.deepcopy(lm.config)
    for name in (*NUMBERS.values(), "rms_norm_eps", "rope_parameters", "tie_word_embeddings"):
        setattr(config, name, getattr(stated, name))
    return config


def load_gguf(lm: LanguageModel, folder: Path) -> LanguageModel:
    """Load the file of an export as transformers does.

    Args:
        lm: The edited model, for its class and type.
        folder: The export.
    """
    implementation = lm.model.config._attn_implementation
    options: dict[str, Any] = {"attn_implementation": implementation} if implementation else {}
    if lm.config.model_type in LLAMA_STYLE:
        options["config"] = _config_of(lm, folder)
    with without_progress_bars():
        model = type(lm.model).from_pretrained(folder, gguf_file=FILE, dtype=lm.dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    return replace(lm, model=model.eval(), tokenizer=tokenizer, masters={})
