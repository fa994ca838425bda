"""The losses against the formulas as they are written, in double precision, and what they hold in memory."""

import pytest
import torch
from torch.nn import functional as F

from mmscale.model.head import VocabularyHead
from mmscale.objectives.contrastive import contrastive_loss


def plain_contrastive(kind, image, text, scale_bias, valid):
    image, text = image[valid], text[valid]
    logits = scale_bias[0] * image @ text.T + scale_bias[1]
    target = torch.arange(len(logits))
    if kind == "clip":
        both = F.cross_entropy(logits, target, reduction="sum") + F.cross_entropy(logits.T, target, reduction="sum")
        return both / 2
    return -F.logsigmoid(logits * (2 * torch.eye(len(logits), dtype=logits.dtype) - 1)).sum()


def differentiate(loss, *tensors):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("kind, scale_bias", [("clip", (100.0, 0.0)), ("siglip", (10.0, -10.0)), ("clip", (14.3, 0.0))])
@pytest.mark.parametrize("tile", [(1, 1), (7, 5), (64, 64)])
def test_contrastive_loss_and_gradient_equal_the_formula(kind, scale_bias, tile):
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(23, 12, dtype=torch.float64), dim=1) for _ in range(2))
    scale_bias = torch.tensor(scale_bias, dtype=torch.float64)
    valid = torch.rand(23) < 0.8
    assert 0 < valid.sum() < 23
    value, gradients = differentiate(
        lambda *t: contrastive_loss(kind, *t, valid, tile=tile) / valid.sum(), image, text, scale_bias
    )
    expected, plain = differentiate(
        lambda *t: plain_contrastive(kind, *t, valid) / valid.sum(), image, text, scale_bias
    )
    assert abs(value - expected) <= 1e-9 * abs(expected)
    if kind == "clip":  # the formula's gradient of the bias is rounding around 0; ours must be none that matters
        assert abs(gradients[2][1]) < 1e-12
    for ours, theirs in zip(gradients[:2], plain[:2], strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()
    assert (gradients[2] - plain[2]).abs().max() <= 1e-9 * plain[2].abs().max()


def test_no_valid_pair_gives_zero_loss_and_gradient():
    image = F.normalize(torch.randn(6, 4), dim=1).requires_grad_()
    for kind in ("clip", "siglip"):
        loss = contrastive_loss(kind, image, image.detach(), torch.tensor([10.0, 0.0]), torch.zeros(6, dtype=bool))
        assert loss == 0
        assert not torch.autograd.grad(loss, image)[0].any()


def plain_captioning(hidden, weight, labels, label_smoothing, z_loss):
    logits = hidden @ weight.T
    plain = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    return plain + z_loss * logits.logsumexp(1).square().sum()


@pytest.mark.parametrize("label_smoothing, z_loss", [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.1, 1e-2)])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_captioning_loss_and_gradient_equal_the_formula(label_smoothing, z_loss, rows):
    torch.manual_seed(0)
    head = VocabularyHead(8, 30).double()
    head.chunk_elements = rows * 30
    hidden, labels = torch.randn(11, 8, dtype=torch.float64), torch.randint(0, 30, (11,))
    value, (d_hidden,) = differentiate(lambda h: 3 * head(h, labels, label_smoothing, z_loss), hidden)
    (d_weight,) = torch.autograd.grad(3 * head(hidden, labels, label_smoothing, z_loss), head.weight)
    expected, plain = differentiate(
        lambda h, w: 3 * plain_captioning(h, w, labels, label_smoothing, z_loss), hidden, head.weight
    )
    assert abs(value - expected) <= 1e-9 * abs(expected)
    for ours, theirs in zip((d_hidden, d_weight), plain, strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


def test_captioning_loss_of_no_token_is_zero_and_reaches_the_head():
    head = VocabularyHead(8, 30)
    head(torch.randn(0, 8), torch.zeros(0, dtype=torch.int64)).backward()
    assert not head.weight.grad.any()


def test_captioning_loss_follows_autocast():
    torch.manual_seed(0)
    head, hidden, labels = VocabularyHead(32, 50), torch.randn(20, 32), torch.randint(0, 50, (20,))
    expected, (plain,) = differentiate(lambda h: head(h, labels), hidden)
    with torch.autocast("cpu", torch.bfloat16):
        value, (d_hidden,) = differentiate(lambda h: head(h, labels), hidden)
    assert value.dtype == torch.float32
    assert torch.isclose(value, expected, rtol=1e-2)
    assert (d_hidden - plain).abs().max() < 0.05 * plain.abs().max()
    assert not torch.equal(d_hidden, plain)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_contrastive_loss_never_holds_more_than_a_tile_of_logits(kind):
    image, text = (F.normalize(torch.randn(512, 8), dim=1).requires_grad_() for _ in range(2))
    with LargestTensor() as largest:
        loss = contrastive_loss(kind, image, text, torch.tensor([10.0, 0.0]), torch.ones(512, dtype=bool), (64, 32))
        loss.backward()
    assert largest.elements == 512 * 8  # the embeddings; the logits would be 512 * 512, a tile is 64 * 32


def test_captioning_loss_never_holds_the_logits_of_all_tokens():
    head = VocabularyHead(4, 1000)
    head.chunk_elements = 16 * 1000
    hidden = torch.randn(512, 4).requires_grad_()
    with LargestTensor() as largest:
        head(hidden, torch.zeros(512, dtype=torch.int64)).backward()
    assert largest.elements == 16 * 1000
