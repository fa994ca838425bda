"""What `mmscale adapt` does: call the method that the configuration names."""

from importlib import import_module

from mmscale.adapt.config import METHODS, AdaptConfig


def adapt(config: AdaptConfig) -> int:
    """Runs one adaptation; returns the exit code. Raises UserError."""
    module, _, function = METHODS[config.adapt.method].partition(":")
    return getattr(import_module(module), function)(config)
