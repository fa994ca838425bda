"""A task that trains in milliseconds: a small regression on a stream that is a function of the position."""

from dataclasses import dataclass, field

import torch
from torch import nn

from mmscale.config import validate


@dataclass
class TinyBatch:
    x: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    input_ids: torch.Tensor
    bad: list = field(default_factory=list)


class TinyStream:
    def __init__(self, config, processes):
        self.config, self.processes = config, processes

    def batches(self, samples):
        train, rank, world_size = self.config.train, self.processes.rank, self.processes.world_size
        while True:
            positions = torch.arange(samples, samples + train.global_batch)[rank::world_size]
            rows = [torch.randn(6, generator=torch.Generator().manual_seed(int(p))) for p in positions]
            lengths = torch.ones(len(positions), dtype=torch.int64)
            yield [TinyBatch(torch.stack(rows), positions, lengths, lengths[:, None])]
            samples += train.global_batch

    def state(self, samples):
        return {"samples": samples, "fingerprint": "tiny"}

    def check_state(self, state):
        assert state["fingerprint"] == "tiny"

    def epoch(self, samples):
        return samples / 100

    def close(self):
        pass


class TinyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 11)
        self.norm = nn.LayerNorm(11)
        self.dropout = nn.Dropout(0.1)
        self.down = nn.Linear(11, 1)

    def forward(self, x):
        hidden = torch.tanh(self.norm(self.up(x.to(self.norm.weight.dtype))))
        return self.down(self.dropout(hidden)).float()


class TinyObjective(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = TinyModel()

    def forward(self, x, scale):
        return ((self.model(x) - x.sum(1, keepdim=True)) ** 2).sum() * scale


def forward_backward(module, micro_batches, backward):
    world_size = torch.distributed.get_world_size()
    total = torch.zeros(())
    rows = sum(len(batch.x) for batch in micro_batches) * world_size
    for batch in micro_batches:
        loss = module(batch.x, world_size / rows)
        backward(loss)
        total += loss.detach() / world_size
    torch.distributed.all_reduce(total)
    return {"loss": total}


def build_tiny(config, processes):
    from mmscale.train.task import Task

    torch.manual_seed(config.run.seed)
    return Task(TinyObjective(), forward_backward, TinyStream(config, processes), tokenizer=None)


def tiny_config(folder, **sections):
    """Sections are merged over a run of 20 steps of 8 samples, saved every 4 steps."""
    raw = {
        "run": {"dir": str(folder), "save_every": 32},
        "optim": {"lr": 0.01},
        "train": {"samples": 160, "global_batch": 8, "zero_stage": 1},
        "log": {"every": 1},
    }
    for name, values in sections.items():
        raw[name] = raw.get(name, {}) | values
    return validate(raw)
