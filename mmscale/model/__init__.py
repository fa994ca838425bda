"""The model: self-contained Transformers code that travels with every export.

Registering the classes makes `save_pretrained` put this code and its `auto_map` beside the weights.
"""

from .configuration_mmscale import MMScaleConfig
from .modeling_mmscale import MMScaleModel, MMScaleOutput
from .processing_mmscale import MMScaleImageProcessor, MMScaleProcessor

MMScaleConfig.register_for_auto_class()
MMScaleModel.register_for_auto_class("AutoModel")
MMScaleImageProcessor.register_for_auto_class()
MMScaleProcessor.register_for_auto_class()

__all__ = ["MMScaleConfig", "MMScaleImageProcessor", "MMScaleModel", "MMScaleOutput", "MMScaleProcessor"]
