"""The low-rank adapters of a run in peft's own format, for the export of the model that the run began with.

OUT/adapter_config.json         peft's settings
    adapter_model.safetensors   the adapters; `PeftModel.from_pretrained(base, OUT)` loads them
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmscale.checkpoint import Checkpoint
from mmscale.config import LoraConfig
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.export.folder import whole_folder
from mmscale.model.configuration_mmscale import MMScaleConfig
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.pretrained import checkpoint_model_config, run_config
from mmscale.weights import ADAPTER, ModelWeights, adapter_tensors, stored_names

TOLERANCE = 1e-5


def peft_config(lora: LoraConfig, layers: list[str]):
    """peft's settings for `model.lora` on these linear layers. Raises UserError when peft is not installed."""
    try:
        import peft
    except ImportError:
        raise UserError("model.lora: needs peft; pip install 'mmscale[adapt]'") from None
    return peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=layers)


def export_peft(checkpoint: str | Path, out: str | Path, *, say: Callable[[str], None] = lambda line: None) -> Path:
    """Writes `out`, after peft has loaded it over the base's weights and gave what the run's model gives.

    Task heads are not among the adapters: they are in the Hub folder of the run itself, where adapters are merged.

    Raises:
        UserError: a run without adapters, nothing to export, or `out` is not empty.
    """
    source = Checkpoint.open(checkpoint)
    lora = run_config(source).model.lora
    if lora is None:
        raise UserError(f"{source.path}: this run has no adapters (model.lora); leave out --to peft")
    config = checkpoint_model_config(source, Tokenizer.load(source.tokenizer_path))
    layers = sorted({name.partition(ADAPTER)[0] for name in adapter_tensors(source)})
    adapters = {f"base_model.model.{name.replace('.default', '')}": t for name, t in adapter_tensors(source).items()}
    with whole_folder(out) as folder:
        save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = peft_config(lora, layers).to_dict() | {"inference_mode": True}
        settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        difference = _difference(source, config, folder)
        assert difference <= TOLERANCE, difference
    say(f"{len(adapters)} tensors of {source.path}; peft over the base gives the same to {difference:.1g}")
    return Path(out)


@torch.no_grad()
def _difference(source: Checkpoint, config: MMScaleConfig, folder: Path) -> float:
    """The largest difference of embeddings and logits between peft's model and the one with merged adapters."""
    from peft import PeftModel

    merged, bare = MMScaleModel(config).eval(), MMScaleModel(_without_heads(config)).eval()
    merged.load_state_dict(ModelWeights(source).load())
    stored = stored_names(source)
    bare.load_state_dict({name: source.read(stored[name]) for name in bare.state_dict()})
    adapted = PeftModel.from_pretrained(bare, str(folder)).eval()
    size, context = config.vision_config.image_size, config.text_config.context_length
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.rand(2, 3, size, size, generator=generator)
    input_ids = torch.randint(4, config.vocab_size, (2, min(8, context)), generator=generator)
    wanted, found = (model(input_ids=input_ids, pixel_values=pixel_values) for model in (merged, adapted))
    names = [name for name in ("image_embeds", "text_embeds", "logits") if wanted[name] is not None]
    return max(_relative(found[name], wanted[name]) for name in names)


def _without_heads(config: MMScaleConfig) -> MMScaleConfig:
    config = copy.deepcopy(config)
    config.heads = {}
    return config


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))
