"""Gradients and weights on their way between ranks, and what a step on the CPU does not pay for."""

import resource

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_task import build_tiny, forward_backward, tiny_config

from mmscale.train import direct
from mmscale.train.engine import Engine, start_processes
from mmscale.train.gradients import norm_of

RUNS = [(0, 0, 5000), (2, 5000, 5001), (1, 5001, 12000), (0, 12000, 12345)]


def exchanged() -> tuple[float, list[float], dict[str, int]]:
    processes = start_processes()
    direct.PIECE = 1000
    rank, world_size = processes.rank, processes.world_size
    each = [torch.randn(12345, generator=torch.Generator().manual_seed(r)) for r in range(world_size)]
    averaged, mean = each[rank].clone(), torch.stack(each).double().mean(0)
    direct.average(averaged, RUNS)
    off = max(float((averaged - mean)[begin:end].abs().max()) for owner, begin, end in RUNS if owner == rank)
    whole = torch.zeros(world_size * 700)
    direct.all_gather(whole, torch.full((700,), float(rank)))
    return off, whole.view(world_size, -1).mean(1).tolist(), calls_of_a_step(processes)


def calls_of_a_step(processes) -> dict[str, int]:
    """How often ZeRO-1 exchanges directly in one step."""
    calls = {}
    for name in ("average", "all_gather"):
        plain = getattr(direct, name)

        def counted(*args, plain=plain, name=name, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return plain(*args, **kwargs)

        setattr(direct, name, counted)
    one_step(processes, zero_stage=1)
    return calls


def one_step(processes, zero_stage: int) -> bool:
    """True when it also moved a parameter that has no gradient, by its decay."""
    train = {"global_batch": 2 * processes.world_size, "zero_stage": zero_stage}
    config = tiny_config("unused", train=train, optim={"lr": 0.1, "weight_decay": 0.5})
    task = build_tiny(config, processes)
    unused = torch.nn.Linear(3, 3)
    task.objective.model.unused = unused
    engine = Engine(task.objective, forward_backward, config, processes)
    before = unused.weight.detach().clone()
    assert engine.step(next(task.stream.batches(0)), lr=0.1).applied
    return bool((unused.weight != before).all())


@pytest.mark.slow
def test_ranks_average_their_own_runs_and_gather_everyones():
    for off, gathered, calls in run_ranks(3, exchanged):
        assert off < 1e-6
        assert gathered == [0.0, 1.0, 2.0]
        assert calls["average"] >= 1 and calls["all_gather"] >= 1


def alone() -> tuple[int, int, bool]:
    processes = start_processes()
    reduced = []
    plain = dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **kwargs: (reduced.append(tensor.numel()), plain(tensor, *args, **kwargs))
    moved = one_step(processes, zero_stage=0)
    dist.all_reduce = plain
    faults = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**25)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return max(reduced, default=0), faults[-1], moved


@pytest.mark.slow
def test_alone_a_step_copies_no_gradients_and_maps_no_memory_anew():
    ((reduced, faults, moved),) = run_ranks(1, alone)
    assert reduced <= 1  # the loss
    assert moved  # as on several ranks
    assert faults < 100  # 32,768 pages


def test_the_norm_is_accurate_for_large_tensors():
    torch.manual_seed(0)
    gradients = [torch.randn(2**21), torch.randn(300, 200).T * 1e-3, torch.randn(()), torch.randn(0)]
    exact = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    assert float(norm_of(gradients) / exact) == pytest.approx(1, abs=1e-6)
    assert float(norm_of([torch.tensor([1.0, torch.inf])])) == torch.inf
