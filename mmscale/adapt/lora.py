"""Low-rank adapters (https://arxiv.org/abs/2106.09685) in a model, through peft."""

from torch import nn

from mmscale.config import LoraConfig
from mmscale.errors import UserError
from mmscale.export.peft import peft_config
from mmscale.model.linear import Linear
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.weights import ADAPTER

PLAIN = (nn.Linear, Linear)  # whose output is linear in their input, unlike those of a kind of their own


def add_adapters(model: MMScaleModel, lora: LoraConfig) -> list[str]:
    """Puts an adapter beside every linear layer whose name ends in one of `lora.targets`; returns the new parameters.

    The weights that were there are then called `NAME.base_layer.weight`. Raises UserError: peft is missing, or no
    layer has such a name.
    """
    linear = [name for name, module in model.named_modules() if type(module) in PLAIN and not name.startswith("heads.")]
    kinds = {name.rpartition(".")[2] for name in linear}
    if unknown := set(lora.targets) - kinds:
        raise UserError(f"model.lora.targets: no linear layer is called `{unknown.pop()}`; there are {sorted(kinds)}")
    config = peft_config(lora, [name for name in linear if name.rpartition(".")[2] in lora.targets])
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model)
    return [name for name, _ in model.named_parameters() if ADAPTER in name]
