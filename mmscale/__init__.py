"""mmscale: pretrain contrastive-plus-captioning vision-language models on sharded image-text streams."""

__version__ = "0.1.0"
