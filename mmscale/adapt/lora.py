"""Low-rank adapters through peft: put into a model, and written in peft's own format."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from mmscale.checkpoint import Checkpoint
from mmscale.config import LoraConfig
from mmscale.errors import UserError
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.weights import ADAPTER, adapter_tensors


def add_adapters(model: MMScaleModel, lora: LoraConfig) -> list[str]:
    """Puts an adapter beside every linear layer whose name ends in one of `lora.targets`; returns the new parameters.

    The weights that were there are then called `NAME.base_layer.weight`. Raises UserError: peft is missing, or no
    layer has such a name.
    """
    try:
        import peft
    except ImportError:
        raise UserError("model.lora: needs peft; pip install 'mmscale[adapt]'") from None
    layers = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not name.startswith("heads.")
    }
    if unknown := set(lora.targets) - layers:
        raise UserError(f"model.lora.targets: no linear layer is called `{unknown.pop()}`; there are {sorted(layers)}")
    peft.inject_adapter_in_model(_peft_config(lora), model)
    return [name for name, _ in model.named_parameters() if ADAPTER in name]


def write_peft(checkpoint: Checkpoint, lora: LoraConfig, folder: Path, base: str) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, which `PeftModel.from_pretrained` takes."""
    tensors = {
        f"base_model.model.{name.replace('.default', '')}": tensor.contiguous()
        for name, tensor in adapter_tensors(checkpoint).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _peft_config(lora).to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _peft_config(lora: LoraConfig):
    import peft

    # A pattern rather than names: a task head's layers share these names, and are trained whole.
    pattern = rf"(?!heads\.).*\.({'|'.join(lora.targets)})"
    return peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=pattern)
