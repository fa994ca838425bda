"""Under DeepSpeed too, every ZeRO stage and accumulation gives one process's gradient on the whole global batch."""

import pytest
import torch

from mmscale.config import validate
from mmscale.objectives.pretraining import forward_backward
from tests.ranks import run_ranks
from tests.test_objectives_invariance import GLOBAL_BATCH, MASKED, global_batch, new_objective, plain_gradients, rows

CASES = [(stage, accumulation, "clip") for stage in range(4) for accumulation in (1, 2)] + [(3, 4, "siglip")]

# Nothing of a tiny model would ever be released otherwise, and what reads a parameter at the wrong time would pass.
RELEASE_EVERYTHING = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def norms_of_the_cases(folder: str) -> dict:
    from mmscale.train.engine import Engine, start_processes

    processes = start_processes()
    found = {}
    for stage, accumulation, contrastive in CASES:
        objective = new_objective({"contrastive": contrastive})
        micro_batch = GLOBAL_BATCH // processes.world_size // accumulation
        settings = {
            "run": {"dir": folder},
            "train": {
                "samples": GLOBAL_BATCH,
                "global_batch": GLOBAL_BATCH,
                "micro_batch": micro_batch,
                "zero_stage": stage,
                "grad_clip": 0.0,
            },
            "deepspeed": {"zero_optimization": RELEASE_EVERYTHING} if stage == 3 else {},
        }
        engine = Engine(objective, forward_backward, validate(settings), processes)
        batch = global_batch(MASKED)
        mine = torch.arange(processes.rank, GLOBAL_BATCH, processes.world_size)
        micro_batches = [rows(batch, part) for part in mine.split(micro_batch)]
        update = engine.step(micro_batches, lr=0.0, part_norms=True)
        assert update.applied
        norms = {name: float(norm) for name, norm in update.part_norms.items()}
        found[stage, accumulation, contrastive] = norms | {"loss": float(update.values["loss"])}
    return found


@pytest.mark.slow
def test_every_zero_stage_and_accumulation_gives_the_same_gradient(tmp_path):
    for found in run_ranks(2, norms_of_the_cases, str(tmp_path)):
        for (stage, accumulation, contrastive), norms in found.items():
            plain = plain_gradients({"contrastive": contrastive}, MASKED)
            expected = {"loss": float(plain["reported.loss"])}
            for part in ("vision", "text", "decoder", "logit_scale"):
                of_part = [x.double().norm() for name, x in plain.items() if name.startswith(f"{part}.")]
                expected[part] = float(torch.stack(of_part).norm())
            assert norms == pytest.approx(expected, rel=1e-5), (stage, accumulation, contrastive)
