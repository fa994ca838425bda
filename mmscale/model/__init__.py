"""The model: self-contained Transformers code that travels with every export."""

from .configuration_mmscale import MMScaleConfig
from .modeling_mmscale import MMScaleModel, MMScaleOutput

__all__ = ["MMScaleConfig", "MMScaleModel", "MMScaleOutput"]
