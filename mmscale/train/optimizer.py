"""Which parameters are trained, in which groups, by which optimizer."""

import re

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


def is_hidden_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """True for what Muon steps: matrices inside a tower's blocks, not those that read pictures or write words."""
    return decays(name, shape) and len(shape) == 2 and re.search(r"\.\d+\.", name) is not None


def parameter_groups(module: nn.Module, optim: OptimConfig) -> list[dict]:
    """The optimizer's groups: by weight decay, by depth where that matters, and by who steps them.

    `lr_scale` is a group's factor of the learning rate: that of its parameters, where they have an attribute of this
    name, and `layer_decay` once more for each block further down (https://arxiv.org/abs/2106.08254, section 3.1).
    `starts_at` is the number of samples from which on it learns at all (gradual unfreezing,
    https://arxiv.org/abs/1801.06146, section 3.3).
    """
    depths = layer_depths([bare_name(name) for name, _ in module.named_parameters()])
    by_depth = optim.layer_decay != 1.0 or optim.unfreeze_every is not None
    groups: dict[tuple[bool, bool, int, float], list[nn.Parameter]] = {}
    for long_name, parameter in module.named_parameters():
        if parameter.requires_grad:
            name, shape = bare_name(long_name), tuple(parameter.shape)
            muon = optim.name == "muon" and is_hidden_matrix(name, shape)
            depth = depths[name] if by_depth else 0
            scale = getattr(parameter, "lr_scale", 1.0)
            groups.setdefault((muon, decays(name, shape), depth, scale), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": optim.weight_decay if decayed else 0.0,
            "lr_scale": scale * optim.layer_decay**depth * (optim.muon_lr / optim.lr if muon else 1.0),
            "starts_at": depth * (optim.unfreeze_every or 0),
            "use_muon": muon,
        }
        for (muon, decayed, depth, scale), parameters in sorted(
            groups.items(), key=lambda item: (not item[0][0], not item[0][1], *item[0][2:])
        )
    ]


def layer_depths(names: list[str]) -> dict[str, int]:
    """name -> how many blocks lie between it and its tower's output, its own counted.

    A tower is what holds numbered blocks. What comes before its blocks (patch and token embeddings, positions) counts
    as one block below the first; everything else has the depth 0.
    """
    number = re.compile(r"^(.*?)\.(\d+)\.")
    blocks: dict[str, int] = {}
    for name in names:
        if found := number.match(name):
            blocks[found[1]] = max(blocks.get(found[1], 0), int(found[2]) + 1)
    depths = {}
    for name in names:
        found = number.match(name)
        if found:
            depth = blocks[found[1]] - int(found[2])
        else:
            tower = next((stack for stack in blocks if stack.rpartition(".")[0] == name.split(".")[0]), None)
            depth = blocks[tower] + 1 if tower and re.search(r"patch|embed|position|token|norm_pre", name) else 0
        depths[name] = depth
    return depths


def build_optimizer(module: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """PyTorch's AdamW, which needs no compiler and keeps the same state in every stage; or Muon for the hidden matrices
    (https://kellerjordan.github.io/posts/muon, in DeepSpeed's implementation) with AdamW for everything else.

    The learning rate starts at 0, because some of DeepSpeed's stages make a dummy update while they are built.
    """
    groups = parameter_groups(module, optim)
    if optim.name == "adamw":
        # On a CPU the fused update goes through memory once instead of about ten times, without copies of its state.
        on_cpu = all(parameter.device.type == "cpu" for parameter in module.parameters())
        return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps, fused=on_cpu or None)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        group["lr"] = 0.0
        group |= {"momentum": optim.muon_momentum} if group["use_muon"] else {"betas": optim.betas, "eps": optim.eps}
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]  # DeepSpeed asks the parameter
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW)
