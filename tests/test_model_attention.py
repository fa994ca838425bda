"""The two ways to attend to a picture are one function, and so are the kernels of self-attention."""

import pytest
import torch
from torch.nn import functional as F

from mmscale.model.layers import PictureKeyValue, attend, few_queries, split_heads


@pytest.mark.parametrize("queries", [1, 7])
def test_attention_without_keys_and_values_equals_attention_with_them(queries):
    torch.manual_seed(0)
    module = PictureKeyValue(width=12, context_width=20, heads=3).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    context, query = torch.randn(2, 9, 20).double().requires_grad_(), torch.randn(2, queries, 12).double()
    query.requires_grad_()
    key, value = module(context)
    expected, _ = attend(split_heads(query, 3), key, value, None, False, "sdpa")
    found = module(context, query)
    assert torch.allclose(found, expected, rtol=1e-10)
    leaves, upstream = (context, query, *module.parameters()), torch.randn_like(found)
    for ours, plain in zip(*(torch.autograd.grad(x, leaves, upstream) for x in (found, expected)), strict=True):
        assert torch.allclose(ours, plain, rtol=1e-9, atol=1e-9 * plain.abs().max().clamp(min=1))


def test_the_layer_norm_that_is_folded_in_is_a_layer_norm():
    torch.manual_seed(0)
    module = PictureKeyValue(width=12, context_width=20, heads=3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    tokens = torch.randn(2, 9, 20) * 3 + 1
    normed = F.layer_norm(tokens, (20,), module.norm_weight, module.norm_bias)
    expected = split_heads(F.linear(normed, module.weight, module.bias).chunk(2, dim=-1)[0], 3)
    assert torch.allclose(module(F.layer_norm(tokens, (20,)))[0], expected, atol=1e-4)


def test_short_captions_are_few_queries_and_full_ones_are_not():
    sizes = {"keys": 255, "width": 512, "context_width": 512, "heads": 8}
    assert few_queries(queries=24, **sizes)
    assert not few_queries(queries=76, **sizes)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("queries", [1, 3, 6])
def test_causal_attention_behind_a_cached_prefix_is_the_end_of_the_whole(implementation, queries):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 6, 4)
    whole, _ = attend(query, key, value, None, True, "sdpa")
    found, weights = attend(query[:, :, -queries:], key, value, None, True, implementation)
    assert torch.allclose(found, whole[:, -queries:], atol=1e-6)
    assert (weights is None) == (implementation == "sdpa")
