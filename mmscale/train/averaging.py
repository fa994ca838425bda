"""An exponential moving average of the weights, sharded as the optimizer's state is."""

import torch
from torch import Tensor

from mmscale.train.state import TrainState

KIND = "ema"


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, after every update (Polyak averaging).

    It lies along the flat fp32 tensors that this rank steps, so that it costs no communication and is saved, restored
    and resharded with them. Early on the decay is (1 + n) / (10 + n) after n updates, if that is less: the average
    forgets the initial weights.
    """

    def __init__(self, state: TrainState, decay: float):
        self._decay = decay
        self._averages: dict[Tensor, Tensor] = {flat: flat.detach().clone() for flat in state.flats}
        state.add_companion(KIND, self._averages)

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Takes in the weights after the run's update number `num_updates`."""
        decay = min(self._decay, (1 + num_updates) / (10 + num_updates))
        for flat, average in self._averages.items():
            average.lerp_(flat.detach(), 1 - decay)
