"""Writes `open_clip_coca.safetensors`: outputs of the real open_clip on tiny random weights.

Run once, in an environment that has open_clip (which needs torchvision, so not this project's own):

    uv venv peer && uv pip install --python peer/bin/python torch==2.13.0 torchvision==0.28.0 open_clip_torch==3.3.0
    peer/bin/python tests/data/make_open_clip_reference.py

The file holds, for each of two sizes (`narrow`: the pooler is narrower than the image tower; `even`: as wide), the
state dict, pictures, texts, and what CoCa makes of them, with its default CLS mask (`text_features`) and with the
corrected one (`correct_text_features`). Versions and configurations are in the file's metadata.
"""

import json
from pathlib import Path

import open_clip
import torch
from open_clip.coca_model import CoCa
from safetensors.torch import save_file

TEXT = {"context_length": 12, "vocab_size": 64, "width": 24}
CONFIGS = {
    name: {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 24,
            "layers": 2,
            "width": width,
            "head_width": 8,
            "patch_size": 8,
            "attentional_pool": True,
            "attn_pooler_queries": 9,
            "attn_pooler_heads": 4,
            "output_tokens": True,
        },
        "text_cfg": TEXT | {"heads": 3, "layers": 2, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": TEXT | {"heads": 4, "layers": 2},
    }
    for name, width in (("narrow", 32), ("even", 24))
}


@torch.no_grad()
def main():
    tensors = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = CoCa(**config).eval()
        for parameter in model.parameters():  # norms and biases too, or a mistake with them would not show
            parameter.add_(torch.randn_like(parameter) * 0.1)
        # open_clip leaves its vocabulary head uninitialised
        torch.nn.init.normal_(model.text_decoder.text_projection, std=0.2)
        pictures = torch.randn(5, 3, 24, 24)
        texts = torch.randint(1, 64, (5, 12))
        for row, length in enumerate((3, 7, 10, 11, 12)):
            texts[row, length:] = 0
        output = model(pictures, texts)
        model.text.correct_cls_mask = True
        correct = model.encode_text(texts)
        found = {key: output[key] for key in ("image_features", "text_features", "logits", "logit_scale")}
        found |= {"correct_text_features": correct, "pictures": pictures, "texts": texts}
        found |= {f"state.{key}": value for key, value in model.state_dict().items()}
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in found.items()}
    metadata = {"open_clip": open_clip.__version__, "torch": torch.__version__, "configs": json.dumps(CONFIGS)}
    save_file(tensors, Path(__file__).with_name("open_clip_coca.safetensors"), metadata)


if __name__ == "__main__":
    main()
