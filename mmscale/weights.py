"""A checkpoint's tensors as the plain model has them: low-rank adapters are added to what they adapt.

An adapted linear layer `NAME` is stored as `NAME.base_layer.weight` (and `.bias`), `NAME.lora_A.default.weight`
[rank, in] and `NAME.lora_B.default.weight` [out, rank], as peft names them; it computes with W + alpha / rank * B A
(https://arxiv.org/abs/2106.09685, section 4.1).
"""

from torch import Tensor

from mmscale.checkpoint import Checkpoint

BASE, ADAPTER = ".base_layer.", ".lora_"
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


class ModelWeights:
    """Parameters and buffers of the model in a checkpoint, by the plain model's names, read one at a time.

    `ema`: the averaged weights, where the run kept them.
    """

    def __init__(self, checkpoint: Checkpoint, ema: bool = False):
        self._checkpoint, self._ema = checkpoint, ema
        self._stored = stored_names(checkpoint)
        self._buffers = checkpoint.names("buffer")

    def __iter__(self):
        yield from (*self._stored, *self._buffers)

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._stored:
            return self._checkpoint.shape(self._stored[name])
        return self._checkpoint.shape(name, "buffer")

    def read(self, name: str) -> Tensor:
        """A whole tensor, with its adapter added to it where it has one."""
        if name not in self._stored:
            return self._checkpoint.read(name, "buffer")
        stored = self._stored[name]
        tensor, layer = self._read(stored), stored.removesuffix(f"{BASE}weight")
        if layer != stored and self._checkpoint.has(layer + _A):
            lora = self._checkpoint.config["model"]["lora"]
            tensor = tensor + lora["alpha"] / lora["rank"] * (self._read(layer + _B) @ self._read(layer + _A))
        return tensor

    def load(self) -> dict[str, Tensor]:
        """All of them, fp32."""
        return {name: self.read(name) for name in self}

    def _read(self, name: str) -> Tensor:
        return self._checkpoint.read(name, "ema" if self._ema and self._checkpoint.has(name, "ema") else "param")


def stored_names(checkpoint: Checkpoint) -> dict[str, str]:
    """The plain model's parameters, and what each is called in the checkpoint."""
    return {name.replace(BASE, "."): name for name in checkpoint.names("param") if ADAPTER not in name}


def adapter_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The adapters alone, by the names that they have in the checkpoint."""
    return {name: checkpoint.read(name) for name in checkpoint.names("param") if ADAPTER in name}
