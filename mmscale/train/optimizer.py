"""Which parameters are trained, in which groups, by which optimizer."""

import torch
from torch import nn

from mmscale.config import OptimConfig
from mmscale.errors import UserError
from mmscale.train.state import bare_name


def freeze(model: nn.Module, parts: list[str]) -> None:
    """Takes the named parts (`vision`, `text.blocks.0`, ...) out of training. Raises UserError for an unknown part."""
    modules = dict(model.named_modules())
    for part in parts:
        if not part or part not in modules:
            known = ", ".join(name for name, child in model.named_children() if any(True for _ in child.parameters()))
            raise UserError(f"train.freeze: the model has no part `{part}`; there are {known}, and what is inside them")
        modules[part].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"train.freeze: nothing is left to train without {', '.join(parts)}")


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """True for the matrices of linear, convolution and token embedding layers.

    Norms, biases and the logit scale are vectors; positions, class tokens and pooler queries are parameters of their
    own rather than a layer's `weight`. None of these is pulled towards zero.
    """
    return len(shape) >= 2 and name.endswith("weight") and "position" not in name


def parameter_groups(module: nn.Module, optim: OptimConfig) -> list[dict]:
    """Two groups for the optimizer: with weight decay and without, each in the module's order."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[decays(bare_name(name), tuple(parameter.shape))].append(parameter)
    return [
        {"params": parameters, "weight_decay": optim.weight_decay if decayed else 0.0}
        for decayed, parameters in groups.items()
        if parameters
    ]


def build_optimizer(module: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """PyTorch's AdamW: nothing to compile, and the same state in every stage.

    The learning rate starts at 0, because some of DeepSpeed's stages make a dummy update while they are built.
    """
    return torch.optim.AdamW(parameter_groups(module, optim), lr=0.0, betas=optim.betas, eps=optim.eps)
