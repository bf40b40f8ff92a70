"""Projections that are no plain linear maps: refused before an edit, or dequantized where that is wanted."""

import copy

import pytest
import torch
from conftest import random_model
from tiny_runs import module_of, name_of
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from cakeflow import Editor
from cakeflow.errors import ArchitectureError, ConfigError, NumericalError
from cakeflow.export import apply_delta
from cakeflow.models import Site
from cakeflow.models.language import LanguageModel
from cakeflow.models.projections import check_projections, dequantize

EDITED = [1, 3]
SMALL = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}


class Scaled8Bit(nn.Linear):
    """Eight-bit floats and one scale."""

    def __init__(self, old):
        super().__init__(old.in_features, old.out_features, bias=False)
        scale = old.weight.abs().max() / 448
        self.weight = nn.Parameter((old.weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


class Packed4Bit(nn.Module):
    """Two numbers of four bits in a byte, and a scale for each row; no ``nn.Linear``, and no weight."""

    def __init__(self, old):
        super().__init__()
        self.in_features, self.out_features = old.in_features, old.out_features
        scale = old.weight.abs().amax(1, keepdim=True) / 7
        numbers = ((old.weight / scale).round() + 8).to(torch.uint8)
        self.register_buffer("packed", numbers[:, ::2] * 16 + numbers[:, 1::2])
        self.register_buffer("scale", scale)

    def forward(self, x):
        numbers = torch.stack([self.packed // 16, self.packed % 16], 2).flatten(1).to(x.dtype) - 8
        return functional.linear(x, numbers * self.scale.to(x.dtype))


class Int8(nn.Linear):
    """A float weight whose whole numbers mean nothing without the scale."""

    def __init__(self, old):
        super().__init__(old.in_features, old.out_features, bias=False)
        self.scale = float(old.weight.abs().max()) / 127
        self.weight = nn.Parameter((old.weight / self.scale).round(), requires_grad=False)

    def forward(self, x):
        return functional.linear(x, self.weight) * self.scale


class Marked(nn.Parameter):
    """A parameter of a library's own class, as packed weights have."""


def dynamic(old):
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(old), {nn.Linear}, dtype=torch.qint8)[0]


def of_own_class(old):
    old.weight = Marked(old.weight.detach(), requires_grad=False)
    return old


QUANTIZED = {"8 bits": Scaled8Bit, "4 bits": Packed4Bit, "scaled": Int8, "dynamic": dynamic}
COMPUTED = {
    "normed": parametrizations.weight_norm,
    "pruned": lambda old: prune.l1_unstructured(old, "weight", 0.5),
    "own class": of_own_class,
}
QUIETLY = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture
def llama(_models):
    lm = copy.deepcopy(_models["llama"])
    lm.model.float()
    return lm


def replaced(lm, change, layers=EDITED):
    for layer in layers:
        place = lm.architecture.path(Site(layer, "mlp_out"))
        with torch.no_grad():
            lm.model.set_submodule(place, change(lm.model.get_submodule(place)))
    return LanguageModel.wrap(lm.model, lm.tokenizer)


@QUIETLY
@pytest.mark.parametrize("change", [*QUANTIZED.values(), *COMPUTED.values()], ids=[*QUANTIZED, *COMPUTED])
def test_what_is_no_plain_linear_map_is_recognized_and_refused(llama, change):
    plain = llama.architecture
    lm = replaced(llama, change)
    assert lm.architecture == plain
    before = {name: copy.deepcopy(each) for name, each in lm.model.state_dict().items()}
    with pytest.raises(ArchitectureError, match=r"model\.layers\.1\.mlp\.down_proj: .*dequantize=True"):
        module_of(lm)
    module_of(lm, layers=[2], moments={2: torch.eye(lm.key_width(Site(2, "mlp_out"))).double()})  # that one is plain
    assert all(torch.equal(each, before[name]) for name, each in lm.model.state_dict().items() if torch.is_tensor(each))


@pytest.mark.parametrize("change", [Scaled8Bit, Packed4Bit, Int8])
def test_the_edited_layers_alone_are_dequantized(llama, requests, quiet, tmp_path, change):
    lm, ids = replaced(llama, change, range(1, llama.depth)), torch.tensor([[5, 9, 3, 77]])
    other = copy.deepcopy(lm)
    before = lm(input_ids=ids).logits.detach()
    module = module_of(lm, dequantize=True)
    after = lm(input_ids=ids).logits.detach()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    kinds = [type(lm.module(Site(layer, "mlp_out"))) is nn.Linear for layer in range(lm.depth)]
    assert kinds == [layer in {0, *EDITED} for layer in range(lm.depth)]
    editor = Editor(module, quiet)
    editor.fit(requests[:2], evaluate=False)
    editor.export(tmp_path / "delta", "delta")
    dequantize(other, [Site(layer, "mlp_out") for layer in EDITED])
    apply_delta(other, tmp_path / "delta")
    assert torch.equal(other(input_ids=ids).logits, lm(input_ids=ids).logits)
    editor.rollback()
    assert torch.equal(lm(input_ids=ids).logits, after)


@QUIETLY
def test_weights_that_cannot_be_hashed_are_named(llama, requests):
    """The old quantization of torch keeps them as tuples, which the hash of the model cannot take."""
    lm, ids = replaced(llama, dynamic), torch.tensor([[5, 9, 3, 77]])
    before = lm(input_ids=ids).logits
    dequantize(lm, [Site(1, "mlp_out")])
    assert float((lm(input_ids=ids).logits - before).norm() / before.norm()) < 0.05
    with pytest.raises(ArchitectureError, match=r"3\.mlp\.down_proj\.\S* is a \w+, no plain tensor"):
        lm.fingerprint()


def test_plain_projections_stay_as_they_are(llama):
    before = [llama.module(Site(layer, "mlp_out")) for layer in EDITED]
    module_of(llama, dequantize=True)
    assert [llama.module(Site(layer, "mlp_out")) for layer in EDITED] == before


def test_layers_that_are_not_known_yet_cannot_be_dequantized(llama):
    with pytest.raises(ConfigError, match="layers='auto'"):
        module_of(llama, layers="auto", dequantize=True)


def test_a_module_that_is_no_linear_map_is_not_dequantized(llama):
    class Squared(Scaled8Bit):
        def forward(self, x):
            return super().forward(x) ** 2

    lm = replaced(llama, Squared)
    with pytest.raises(ArchitectureError, match="Squared is no linear map"):
        module_of(lm, dequantize=True)


def test_a_weight_of_two_layers_is_refused(lm):
    lm.module(Site(4, "mlp_out")).weight = lm.module(Site(1, "mlp_out")).weight
    check_projections(lm, [Site(2, "mlp_out")])
    with pytest.raises(ArchitectureError, match=r"h\.1\.mlp\.c_proj\.weight is also transformer\.h\.4\.mlp"):
        module_of(lm)


def test_a_model_that_sees_later_tokens_is_refused(lm):
    both = random_model("bert", lm.tokenizer, **SMALL, **GATED, initializer_range=0.2)
    with pytest.raises(ArchitectureError, match=r"depend on later ones.*is_decoder=True"):
        check_projections(both, [Site(1, "mlp_out")])
    check_projections(random_model("bert", lm.tokenizer, **SMALL, **GATED, is_decoder=True), [Site(1, "mlp_out")])


def test_several_states_for_each_token_are_refused(lm):
    several = random_model(
        "gemma3n_text", lm.tokenizer, **SMALL, **GATED, vocab_size_per_layer_input=600, hidden_size_per_layer_input=8,
        num_kv_shared_layers=0, laurel_rank=4,
    )  # fmt: skip
    assert several.architecture.mlp_out == "model.layers.{}.mlp.down_proj"
    with pytest.raises(ArchitectureError, match=r"hidden states of shape \(4, 1, 8, 32\).*several states per token"):
        check_projections(several, [Site(1, "mlp_out")])


def test_numbers_that_overflow_are_named_where_they_do(llama):
    with torch.no_grad():
        llama.module(Site(1, "mlp.up_proj")).weight.mul_(60000)
    llama.model.half()
    with pytest.raises(NumericalError, match=r"1\.mlp\.down_proj: its input is not finite in torch\.float16.*float32"):
        module_of(llama)


def test_a_weight_that_is_not_finite_is_named(lm):
    with torch.no_grad():
        lm.model.get_parameter(name_of(lm, 2))[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=rf"not finite: {name_of(lm, 2)};.*another copy"):
        LanguageModel.wrap(lm.model, lm.tokenizer)
