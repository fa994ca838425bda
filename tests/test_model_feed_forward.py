"""The feed-forward layer that recomputes its activation gives the gradients of the plain composition."""

import pytest
import torch
from torch.nn import functional as F

from mmscale.model.feed_forward import ActivatedLinear, quick_gelu
from mmscale.model.layers import Packing

PLAIN = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "quick_gelu": quick_gelu}


@pytest.mark.parametrize("activation", PLAIN)
def test_gradients_equal_the_plain_composition(activation):
    torch.manual_seed(0)
    layer = ActivatedLinear(6, 4, activation).double()
    x, upstream = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 4).double()
    leaves = (x, layer.weight, layer.bias)
    plain = F.linear(PLAIN[activation](x), layer.weight, layer.bias)
    found = torch.autograd.grad(layer(x), leaves, upstream)
    for ours, expected in zip(found, torch.autograd.grad(plain, leaves, upstream), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(layer(x), plain)


def test_it_follows_autocast_and_keeps_gradients_in_the_weights_precision():
    torch.manual_seed(0)
    layer, x = ActivatedLinear(32, 16, "gelu"), torch.randn(8, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32
    expected = torch.autograd.grad(F.linear(F.gelu(x), layer.weight).sum(), x)[0]
    assert (x.grad - expected).abs().max() < 0.05 * expected.abs().max()


def test_only_the_input_is_kept_for_the_backward_pass():
    layer, kept = ActivatedLinear(6, 4, "gelu"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(torch.randn(3, 6, requires_grad=True))
    assert sorted(tuple(x.shape) for x in kept) == [(3, 6), (4, 6)]


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="relu"):
        ActivatedLinear(2, 2, "relu")


def test_packing_and_padding_undo_each_other_and_so_do_their_gradients():
    real = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)
    packing = Packing.of(real)
    padded = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    packed = packing.pack(padded)
    assert torch.equal(packed, padded[real])
    assert torch.equal(packing.pad(packed), padded * real[..., None])
    assert torch.autograd.gradcheck(packing.pack, padded)
    assert torch.autograd.gradcheck(packing.pad, packed.detach().requires_grad_())
