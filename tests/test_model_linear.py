"""Linear layers by oneDNN are the plain ones, and are left out where its operator has no rule."""

import pytest
import torch
from torch.nn import functional as F

from mmscale.model import linear as module
from mmscale.model.feed_forward import ActivatedLinear
from mmscale.model.head import VocabularyHead
from mmscale.model.layers import PictureKeyValue
from mmscale.model.linear import Linear, linear, multiplier, packed_weights
from tests.test_objectives_invariance import MASKED, assert_same, gradients, new_objective

has_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this build of PyTorch has no oneDNN",
)


@pytest.fixture
def onednn(monkeypatch) -> list:
    """Every product by oneDNN, whatever the processor and the size; what it was asked for is in the list."""
    asked, plain = [], module._onednn_linear
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(module, "ONEDNN_MIN_ELEMENTS", 0)
    monkeypatch.setattr(module, "_onednn_linear", lambda *args: asked.append(args) or plain(*args))
    return asked


@has_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_onednns_layer_has_the_outputs_and_gradients_of_the_plain_one(onednn, bias):
    torch.manual_seed(0)
    layer, x, upstream = Linear(12, 7, bias=bias), torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 5, 7)
    leaves = (x, *layer.parameters())
    found, plain = layer(x), F.linear(x, layer.weight, layer.bias)
    assert len(onednn) == 1
    assert torch.allclose(found, plain, atol=1e-6)
    both = (torch.autograd.grad(output, leaves, upstream) for output in (found, plain))
    for ours, expected in zip(*both, strict=True):
        assert torch.allclose(ours, expected, atol=1e-5)
    assert len(onednn) == 3
    with torch.no_grad():
        assert torch.equal(layer(x), found)
    layer.weight.requires_grad_(False)  # a frozen layer passes the gradient on and makes none of its own
    layer(x).backward(upstream)
    assert len(onednn) == 6 and layer.weight.grad is None and x.grad is not None


@has_onednn
def test_onednn_changes_no_gradient_of_the_model(onednn, monkeypatch):
    found = {}
    for faster in (False, True):
        monkeypatch.setattr(module, "onednn_is_faster", lambda faster=faster: faster)
        found[faster] = gradients(2, {}, MASKED)
        assert bool(onednn) == faster
    assert_same(found[True], found[False])


@has_onednn
@pytest.mark.parametrize("make", [lambda: ActivatedLinear(6, 4, "gelu"), lambda: VocabularyHead(6, 40)])
def test_the_layers_with_a_backward_pass_of_their_own_multiply_by_onednn_too(onednn, make):
    layer, x = make(), torch.randn(8, 6, requires_grad=True)
    labels = [torch.zeros(8, dtype=torch.int64)] if isinstance(layer, VocabularyHead) else []
    layer(x, *labels).sum().backward()
    assert len(onednn) == 3


def test_what_onednns_operator_has_no_rule_for_is_computed_plainly(onednn):
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, weight = torch.randn(4, 6), torch.randn(3, 6)
    assert multiplier(x, weight) is module._onednn_linear
    assert multiplier(x.double(), weight.double()) is F.linear
    assert multiplier(x.bfloat16(), weight.bfloat16()) is F.linear
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with FakeTensorMode():
        assert multiplier(torch.randn(4, 6), torch.randn(3, 6)) is F.linear
    graphs = [torch.export.export(Linear(6, 3), (x,)).graph]
    torch.compile(Linear(6, 3), backend=lambda module, _: graphs.append(module.graph) or module)(x)
    assert len(graphs) == 2
    assert not any("mkldnn" in str(node.target) or "OneDNN" in str(node.target) for g in graphs for node in g.nodes)


@has_onednn
@torch.no_grad()
def test_decoding_multiplies_by_packed_weights_and_writes_the_same(onednn, monkeypatch):
    model, pictures = new_objective({}).model.eval(), torch.randn(3, 3, 16, 16)
    model.text.tokens.weight.mul_(40)  # captions of a fresh model repeat one token, which would hide mistakes
    settings = {"do_sample": False, "max_new_tokens": 9, "return_dict_in_generate": True, "output_logits": True}
    found = {}
    for faster in (False, True):
        monkeypatch.setattr(module, "onednn_is_faster", lambda faster=faster: faster)
        found[faster] = model.generate(pixel_values=pictures, **settings)
    packed = [weight.is_mkldnn for _, weight, *_ in onednn]
    layers = [layer for part in (model.text, model.decoder) for layer in part.modules() if isinstance(layer, Linear)]
    assert sum(packed) == 9 * (len(layers) - 1)  # all but the projection of CLS
    assert torch.equal(found[True].sequences, found[False].sequences)
    for ours, plain in zip(found[True].logits, found[False].logits, strict=True):
        assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert all(getattr(layer, "packed", None) is None for layer in model.modules())


@has_onednn
def test_packed_weights_are_given_up_after_a_failure_and_never_trained_with(onednn):
    layer, x = Linear(6, 3), torch.randn(4, 6)
    with pytest.raises(KeyError), packed_weights(layer):
        layer(x).sum().backward()
        assert layer.weight.grad is not None and not any(args[1].is_mkldnn for args in onednn)
        raise KeyError
    assert layer.packed is None
    picture = PictureKeyValue(8, 6, 2)
    picture.reset_parameters()
    with packed_weights(picture):
        sum(part.sum() for part in picture(torch.randn(1, 4, 6))).backward()
    assert picture.norm_weight.grad is not None and picture.packed is None


@has_onednn
def test_what_stays_packed_over_many_captions_is_packed_once(onednn):
    model, pictures = new_objective({}).model.eval(), torch.randn(2, 3, 16, 16)
    layers = [layer for part in (model.text, model.decoder) for layer in part.modules() if hasattr(layer, "packed")]
    with model.packed_for_generation():
        before = [layer.packed for layer in layers]
        model.generate(pixel_values=pictures, do_sample=False, max_new_tokens=2)
        assert all(layer.packed is packed is not None for layer, packed in zip(layers, before, strict=True))
    assert all(layer.packed is None for layer in layers)


def test_no_rows_at_all_are_multiplied_too(onednn):
    """The texts of a micro-batch in which every sample is bad."""
    x = torch.randn(0, 6, requires_grad=True)
    for layer in (Linear(6, 3), ActivatedLinear(6, 3, "gelu")):
        layer(x).sum().backward()
        assert layer.weight.grad.shape == (3, 6) and not layer.weight.grad.any()


def test_small_weights_are_left_to_the_plain_library(monkeypatch):
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    assert multiplier(torch.randn(4, 128), torch.randn(128, 128)) is F.linear
    assert multiplier(torch.randn(4, 512), torch.randn(512, 512)) is not F.linear
