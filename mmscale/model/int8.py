"""Weights in 8 bits: a quarter of the size, and several times the speed where the processor multiplies bytes.

A row of a weight is its largest magnitude / 127 times whole numbers from -127 to 127. The inputs of a layer are rounded
in the same way while it runs, each token with a scale of its own, so that what a token gives does not depend on what
else is in its batch. The product is oneDNN's, on CPUs with VNNI instructions; elsewhere (GPUs, older CPUs, and while
gradients are wanted) the weights are turned back into floating point for the moment.

Such a model is only ever loaded, never initialised or trained.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .feed_forward import ACTIVATIONS

ZERO = 128  # of the unsigned bytes that hold a layer's inputs


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, columns] as int8 of the same shape, and the scale of every row [rows]."""
    scale = weight.abs().amax(1).clamp(min=torch.finfo(weight.dtype).tiny) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer, of the activation of its input where `activation` names one."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.activation = getattr(linear, "activation", None)
        self.register_buffer("weight_int8", torch.empty_like(linear.weight, dtype=torch.int8, requires_grad=False))
        self.register_buffer("weight_scale", torch.empty_like(linear.weight[:, 0], requires_grad=False))
        self.bias = linear.bias
        self._packed: tuple | None = None  # the weight as oneDNN wants it, and what it was made from

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is not None:
            x = ACTIVATIONS[self.activation](x)
        if x.dtype == torch.float32 and not (torch.is_grad_enabled() and x.requires_grad) and _multiplies_bytes(x):
            return self._forward_int8(x)
        weight = self.weight_int8.to(x.dtype) * self.weight_scale.to(x.dtype)[:, None]
        return F.linear(x, weight, self.bias)

    def _forward_int8(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        scale = rows.abs().amax(1, keepdim=True).clamp_(min=1e-30) / 127
        rows = (rows / scale).round_().add_(ZERO).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            *(rows, 1.0, ZERO, self._weight_of_onednn(), self.weight_scale, torch.zeros_like(self.weight_scale).long()),
            *(None, 1.0, 0, torch.float32, "none", [], ""),
        )
        product = product * scale if self.bias is None else torch.addcmul(self.bias, product, scale)
        return product.view(*x.shape[:-1], self.out_features)

    def _weight_of_onednn(self) -> Tensor:
        made_from = (self.weight_int8.data_ptr(), self.weight_int8._version)
        if self._packed is None or self._packed[0] != made_from:
            self._packed = (made_from, torch.ops.onednn.qlinear_prepack(self.weight_int8, None))
        return self._packed[1]


class Int8Embedding(nn.Module):
    """A table of token embeddings."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.register_buffer("weight_int8", torch.empty_like(embedding.weight, dtype=torch.int8, requires_grad=False))
        self.register_buffer("weight_scale", torch.empty_like(embedding.weight[:, 0], requires_grad=False))

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight_int8[ids].to(self.weight_scale.dtype) * self.weight_scale[ids][..., None]


KINDS = {nn.Linear: Int8Linear, nn.Embedding: Int8Embedding}


def with_int8_layers(model: nn.Module) -> None:
    """Puts a layer of this module in the place of every linear layer and embedding; their weights are yet to be loaded.

    What is read as a bare parameter (positions, norms, the decoder's keys and values of pictures) stays as it is.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            for kind, replacement in KINDS.items():
                if isinstance(child, kind):
                    setattr(parent, name, replacement(child))


def int8_weights(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model of floating-point layers, by the names that they have in the same model in 8 bits."""
    layers = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, tuple(KINDS)) and name}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in layers:
            tensors[f"{name}_int8"], tensors[f"{name}_scale"] = quantize_rows(tensor.detach().float())
        else:
            tensors[name] = tensor.detach()
    return tensors


def _multiplies_bytes(x: Tensor) -> bool:
    return x.device.type == "cpu" and torch.cpu._is_vnni_supported()
