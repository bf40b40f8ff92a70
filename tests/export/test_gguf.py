"""GGUF files of edited models, as transformers reads them again."""

import copy
import json

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize
from tiny_runs import LAYERS, content, editor_of, name_of
from transformers import AutoConfig, AutoModelForCausalLM

from cakeflow.errors import ExportError
from cakeflow.export import Manifest, gguf
from cakeflow.export.gguf import FILE, modelfile
from cakeflow.export.gguf_layout import tensor_name
from cakeflow.export.gguf_words import add_tokenizer
from cakeflow.journal import WeightChange
from cakeflow.models.language import LanguageModel
from cakeflow.models.loading import gguf_source, load_model
from cakeflow.solvers import Update

from .conftest import logits

WIDTH = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
FAMILIES = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
}
"""Family -> what its config has beside widths; Qwen2 has biases of queries, keys and values, Qwen3 norms of heads."""
BLOCK = ("attn_k.weight", "attn_norm.weight", "attn_output.weight", "attn_q.weight", "attn_v.weight", "ffn_down.weight",
         "ffn_gate.weight", "ffn_norm.weight", "ffn_up.weight")  # fmt: skip
FURTHER = {
    "llama": (),
    "qwen2": ("attn_k.bias", "attn_q.bias", "attn_v.bias"),
    "qwen3": ("attn_k_norm.weight", "attn_q_norm.weight"),
}
"""Family -> tensors of a block beside ``BLOCK``."""
NUMBERS = {
    "block_count": 4,
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    "rope.freq_base": 5e4,
}
"""What llama.cpp's converter writes of a config of ``WIDTH``, below the name of the architecture."""


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def llama(_models, tmp_path):
    """Makes a random Llama or Qwen whose queries have more heads than its keys, in a folder."""

    def make(dtype=torch.float32, family="llama", **config):
        torch.manual_seed(0)
        tokenizer = _models["llama"].tokenizer
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 0, "max_position_embeddings": 512}
        chosen = {**WIDTH, **heads, "vocab_size": len(tokenizer), "rope_theta": 5e4, **FAMILIES[family], **config}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.split()[0], **chosen)).to(dtype).eval()
        with torch.no_grad():  # biases are drawn as zeros and norms as ones, whose order nobody could see
            for weight in model.parameters():
                if weight.dim() == 1:
                    weight += 0.1 * torch.randn(weight.shape)
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


def edited(base, requests, quiet, **settings):
    editor = editor_of(load_model(base, dtype="auto"), quiet, **settings)
    editor.fit(requests[:4], 2, evaluate=False)
    return editor


def as_read(folder, dtype, **options):
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=dtype, **options)


UNREAD = pytest.mark.filterwarnings("ignore:transformers does not find")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
@UNREAD
def test_a_new_file_gives_the_same_logits(llama, dtype, requests, quiet, ids, tmp_path, family, tied):
    editor = edited(llama(dtype, family, tie_word_embeddings=tied), requests, quiet)
    before = editor.module.lm.fingerprint()
    editor.export(tmp_path / "out", "gguf")
    assert editor.module.lm.fingerprint() == before
    assert sorted(content(tmp_path / "out")) == ["Modelfile", "README.md", "manifest.json", "model.gguf"]
    alone = family in ("llama", "qwen2")  # of the others transformers does not find all that llama.cpp does
    loaded = as_read(tmp_path / "out", dtype, **({} if alone else {"config": editor.model.config}))
    assert torch.equal(logits(loaded, ids), logits(editor.model, ids))
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.tolerance == 0
    assert set(manifest.files) == {FILE}
    assert manifest.details["types"] == (["BF16", "F32"] if dtype == torch.bfloat16 else ["F32"])


def test_an_export_is_written_and_read_again_without_a_word(llama, requests, quiet, tmp_path, capfd):
    editor = edited(llama(), requests, quiet)
    capfd.readouterr()
    editor.export(tmp_path / "out", "gguf")
    assert capfd.readouterr() == ("", "")


def test_rows_of_queries_stand_in_pairs(llama, requests, quiet, tmp_path):
    """llama.cpp rotates neighbouring rows, transformers the halves of a head."""
    editor = edited(llama(), requests, quiet)
    editor.export(tmp_path / "out", "gguf")
    tensors = {each.name: each.data for each in GGUFReader(tmp_path / "out" / FILE).tensors}
    for kind, heads in (("q", 4), ("k", 2)):
        rows = editor.model.get_submodule(f"model.layers.1.self_attn.{kind}_proj").weight.detach().numpy()
        for head in range(heads):
            for pair in range(8):
                for side in (0, 1):
                    row = tensors[f"blk.1.attn_{kind}.weight"][head * 16 + 2 * pair + side]
                    assert np.array_equal(row, rows[head * 16 + side * 8 + pair])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FURTHER)
@UNREAD
def test_a_new_file_has_what_the_converter_writes(llama, requests, quiet, tmp_path, family, tied):
    """Names, shapes, types and numbers as of ``convert_hf_to_gguf.py`` of llama.cpp (compared with it in 2026)."""
    editor = edited(llama(family=family, rms_norm_eps=1e-6, tie_word_embeddings=tied), requests, quiet)
    editor.export(tmp_path / "out", "gguf")
    reader = GGUFReader(tmp_path / "out" / FILE)
    expected = {f"blk.{layer}.{name}" for layer in range(4) for name in (*BLOCK, *FURTHER[family])}
    expected |= {"token_embd.weight", "output_norm.weight"} | (set() if tied else {"output.weight"})
    tensors = {each.name: each for each in reader.tensors}
    assert set(tensors) == expected
    assert {each.tensor_type.name for each in reader.tensors} == {"F32"}
    head = 32 if family == "qwen3" else 16
    assert [*map(int, tensors["blk.0.attn_q.weight"].shape)] == [64, 4 * head]  # the width that is read comes first
    assert [*map(int, tensors["blk.0.attn_k.weight"].shape)] == [64, 2 * head]
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == family
    assert fields["general.file_type"] == 0
    assert {name: fields[f"{family}.{name}"] for name in NUMBERS} == NUMBERS
    assert fields[f"{family}.attention.key_length"] == fields[f"{family}.attention.value_length"] == head
    assert (fields["general.type"], fields["tokenizer.ggml.model"]) == ("model", "gpt2")


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@UNREAD
def test_rows_and_biases_of_qwen_stand_as_they_are(llama, requests, quiet, tmp_path, family):
    """llama.cpp rotates the halves of its heads, as transformers does; only Llama's rows are put in pairs."""
    editor = edited(llama(family=family), requests, quiet)
    editor.export(tmp_path / "out", "gguf")
    tensors = {each.name: each.data for each in GGUFReader(tmp_path / "out" / FILE).tensors}
    attention = editor.model.get_submodule("model.layers.1.self_attn")
    for letter in "qkv":
        for name, parameter in getattr(attention, f"{letter}_proj").named_parameters():
            assert np.array_equal(tensors[f"blk.1.attn_{letter}.{name}"], parameter.detach().numpy())
    if family == "qwen3":
        for letter in "qk":
            weight = getattr(attention, f"{letter}_norm").weight.detach().numpy()
            assert np.array_equal(tensors[f"blk.1.attn_{letter}_norm.weight"], weight)


@UNREAD
def test_biases_of_llama_stand_in_pairs_as_their_rows_do(llama, requests, quiet, tmp_path):
    editor = edited(llama(family="llama with biases"), requests, quiet)
    editor.export(tmp_path / "out", "gguf")
    tensors = {each.name: each.data for each in GGUFReader(tmp_path / "out" / FILE).tensors}
    bias = editor.model.get_submodule("model.layers.1.self_attn.k_proj").bias.detach().numpy()
    assert [*tensors["blk.1.attn_k.bias"][:4]] == [bias[0], bias[8], bias[1], bias[9]]


@pytest.mark.parametrize(("family", "config"), [("qwen2", {}), ("qwen3", {"head_dim": 128})])
def test_tensors_of_qwen_are_swapped_in_its_own_file(llama, requests, quiet, ids, tmp_path, family, config):
    """128 is the width that transformers takes for the heads of any Qwen3 file."""
    first = edited(llama(family=family, **config), requests, quiet)
    first.export(tmp_path / "base.folder", "gguf")
    base = (tmp_path / "base.folder" / FILE).rename(tmp_path / "base.gguf")
    editor = edited(str(base), requests, quiet)
    editor.export(tmp_path / "out", "gguf", source=str(base))
    assert torch.equal(logits(as_read(tmp_path / "out", torch.float32), ids), logits(editor.model, ids))


@pytest.mark.parametrize(
    ("family", "entries"), [("qwen3", "head_dim"), ("llama with biases", "attention_bias and mlp_bias")]
)
def test_what_transformers_does_not_find_is_said(llama, requests, quiet, tmp_path, family, entries):
    editor = edited(llama(family=family), requests, quiet)
    with pytest.warns(UserWarning, match=f"does not find {entries} in a GGUF file, as llama.cpp does"):
        editor.export(tmp_path / "out", "gguf")


@pytest.mark.parametrize("entry", ["num_key_value_heads", "rms_norm_eps", "rope_parameters", "num_hidden_layers"])
@UNREAD
def test_a_number_that_the_file_states_wrongly_is_noticed(llama, requests, quiet, tmp_path, monkeypatch, entry):
    editor, write = edited(llama(family="qwen3"), requests, quiet), gguf._add_numbers
    wrong = copy.deepcopy(editor.model.config)
    setattr(wrong, entry, {"rope_theta": 1e4} if entry == "rope_parameters" else 2 * getattr(wrong, entry))
    monkeypatch.setattr(gguf, "_add_numbers", lambda writer, architecture, _: write(writer, architecture, wrong))
    with pytest.raises(ExportError, match=r"does not load|is another one|logits differ"):
        editor.export(tmp_path / "out", "gguf")


@UNREAD
def test_tokens_of_other_numbers_are_noticed(llama, requests, quiet, tmp_path, monkeypatch):
    editor, write = edited(llama(), requests, quiet), GGUFWriter.add_token_list
    monkeypatch.setattr(GGUFWriter, "add_token_list", lambda self, words: write(self, [*words[:-2], *words[:-3:-1]]))
    with pytest.raises(ExportError, match="tokens are missing"):
        editor.export(tmp_path / "out", "gguf")


@pytest.fixture
def tokenizer(_models):
    return _models["llama"].tokenizer


def starcoder2_file(path, tokenizer):
    """A random StarCoder2 as a GGUF file: other names, biases everywhere, layer norms."""
    name, heads = "starcoder2", {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), **WIDTH, **heads)
    model, writer = AutoModelForCausalLM.from_config(config).float(), GGUFWriter(path, name)
    for key, entry in gguf.NUMBERS.items():
        writer.add_uint32(f"{name}.{key}", getattr(config, entry))
    writer.add_layer_norm_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    add_tokenizer(writer, LanguageModel.wrap(model, tokenizer))
    for each, tensor in model.state_dict().items():
        if each not in model.all_tied_weights_keys:
            writer.add_tensor(tensor_name(name, 4, each), tensor.numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def test_a_file_of_another_architecture_has_its_tensors_swapped(tokenizer, requests, quiet, ids, tmp_path):
    base = tmp_path / "base.gguf"
    starcoder2_file(base, tokenizer)
    editor = edited(str(base), requests, quiet)
    editor.export(tmp_path / "out", "gguf", source=str(base))
    assert torch.equal(logits(as_read(tmp_path / "out", torch.float32), ids), logits(editor.model, ids))
    editor.save_pretrained(tmp_path / "whole")
    again = edited(tmp_path / "whole", requests, quiet)
    with pytest.raises(ExportError, match="cannot have the layout of starcoder2"):
        again.export(tmp_path / "new", "gguf")


@pytest.fixture
def swapped(llama, requests, quiet, tmp_path):
    """A file that was an export, as the base of a further edit."""
    first = edited(llama(), requests, quiet)
    first.export(tmp_path / "base.folder", "gguf")
    base = (tmp_path / "base.folder" / FILE).rename(tmp_path / "base.gguf")
    return base, edited(str(base), requests, quiet)


@pytest.mark.filterwarnings("ignore:stored so")  # four bits are few for a random model
@pytest.mark.parametrize("kind", ["exact", "F16", "Q8_0", "Q4_1"])
def test_only_the_edited_tensors_are_swapped(swapped, ids, tmp_path, kind):
    base, editor = swapped
    names = {f"blk.{layer}.ffn_down.weight" for layer in LAYERS}
    editor.export(tmp_path / "out", "gguf", tensor_type=kind, source=str(base))
    one, other = GGUFReader(base), GGUFReader(tmp_path / "out" / FILE)
    size = one.tensors[0].field.offset
    assert bytes(one.data[:size]) == bytes(other.data[:size])
    assert [each.name for each in one.tensors] == [each.name for each in other.tensors]
    for a, b in zip(one.tensors, other.tensors, strict=True):
        assert (a.data.tobytes() == b.data.tobytes()) == (a.name not in names)
    assert {each.tensor_type.name for each in other.tensors if each.name in names} == {
        "F32" if kind == "exact" else kind
    }
    manifest, loaded = Manifest.read(tmp_path / "out"), as_read(tmp_path / "out", torch.float32)
    off = (logits(loaded, ids) - logits(editor.model, ids)).abs().max() / logits(editor.model, ids).abs().max()
    assert (off == 0) == (kind == "exact")
    for each in other.tensors:
        if each.name in names:
            name = name_of(editor.module.lm, int(each.name.split(".")[1]))
            weight = editor.model.get_parameter(name).detach().double().numpy()
            error = np.linalg.norm(dequantize(each.data, each.tensor_type) - weight) / np.linalg.norm(weight)
            assert manifest.details["weights"][name]["error"] == pytest.approx(error, rel=1e-6)


@pytest.mark.filterwarnings("ignore:stored so")
def test_the_same_types_leave_every_other_byte(swapped, tmp_path):
    base, editor = swapped
    editor.export(tmp_path / "out", "gguf", tensor_type="same", source=str(base))
    old, new = base.read_bytes(), (tmp_path / "out" / FILE).read_bytes()
    reader = GGUFReader(base)
    spans = [(each.data_offset, each.n_bytes) for each in reader.tensors if "ffn_down" in each.name]
    kept = [spans[layer] for layer in LAYERS]
    assert len(old) == len(new)
    differ = np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))
    assert all(any(start <= place < start + size for start, size in kept) for place in differ)
    assert len(differ)


def test_rows_that_stand_in_pairs_are_swapped_in_pairs(swapped, requests, quiet, ids, tmp_path):
    """An edit of what the file has in another order: the order is measured on the unedited weight."""
    base, _ = swapped
    lm = load_model(str(base))
    editor = editor_of(lm, quiet)
    name = "model.layers.1.self_attn.q_proj.weight"
    with editor.journal.batch(requests[:1]) as step:
        update = Update(torch.randn(1, 64).double(), torch.randn(1, 64).double())
        editor.journal.apply(step, WeightChange(name, update), {})
    editor.export(tmp_path / "out", "gguf", source=str(base))
    loaded = as_read(tmp_path / "out", torch.float32)
    assert torch.equal(loaded.get_parameter(name), editor.model.get_parameter(name))
    assert torch.equal(logits(loaded, ids), logits(editor.model, ids))


def test_a_file_of_another_model_is_refused(swapped, tmp_path):
    base, editor = swapped
    other = tmp_path / "other.gguf"
    data = bytearray(base.read_bytes())
    place = next(each for each in GGUFReader(base).tensors if each.name == f"blk.{LAYERS[0]}.ffn_down.weight")
    data[place.data_offset + 2] ^= 64
    other.write_bytes(bytes(data))
    before = content(tmp_path)
    for source, words in ((other, "not the unedited"), (tmp_path / "base" / "config.json", "no GGUF file")):
        with pytest.raises(ExportError, match=words):
            editor.export(tmp_path / "out", "gguf", source=str(source))
    for kind, words in (("Q3_X", "expected exact, same"), ("Q4_K", "no quantizer|cannot be stored")):
        with pytest.raises(ExportError, match=words):
            editor.export(tmp_path / "out", "gguf", source=str(base), tensor_type=kind)
    assert content(tmp_path) == before


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_what_gguf_does_not_know_is_refused_before_anything_is_written(one, llama, requests, quiet, tmp_path, dtype):
    _, gpt2 = one
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match=r"cannot have the layout of gpt2.*convert_hf_to_gguf"):
        gpt2.export(tmp_path / "empty" / "out", "gguf")
    linear = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    scaled = edited(llama(**linear), requests, quiet)
    with pytest.raises(ExportError, match="positions of type 'linear'"):
        scaled.export(tmp_path / "empty" / "out", "gguf")
    biased = edited(llama(family="qwen3", attention_bias=True), requests, quiet)
    with pytest.raises(ExportError, match=r"biases of a qwen3, which llama\.cpp has none of"):
        biased.export(tmp_path / "empty" / "out", "gguf")
    scaled.model.config.model_type = "unheard_of"
    with pytest.raises(ExportError, match="GGUF knows no architecture 'unheard_of'"):
        scaled.export(tmp_path / "empty" / "out", "gguf")
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_modelfile_stops_where_the_model_does(llama, requests, quiet):
    lm = load_model(llama())
    text = modelfile(lm)
    assert "FROM ./model.gguf\n" in text
    assert 'PARAMETER stop "<|endoftext|>"' in text


@pytest.mark.real
def test_the_real_file_keeps_everything_but_the_edits(real_editor, tmp_path):
    editor = real_editor("memit", layers=[8, 9], targets={"steps": 2})
    request = {"prompt": "{} is a city in the country of", "subject": "Lyon", "target_new": "Germany"}
    editor.fit([request], evaluate=False)
    base = gguf_source("smollm2-135m")
    editor.export(tmp_path / "out", "gguf", source=str(base))
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.tolerance == 0
    assert json.dumps(manifest.details["types"]) == '["F32"]'
    one, other = GGUFReader(base), GGUFReader(tmp_path / "out" / FILE)
    differ = {a.name for a, b in zip(one.tensors, other.tensors, strict=True) if a.tensor_type != b.tensor_type}
    assert differ == {f"blk.{layer}.ffn_down.weight" for layer in editor.module.layers}
