"""The gradient of a global batch is the same for any number of processes and micro-batches."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from mmscale.config import DecoderSizes, ModelConfig, ObjectiveConfig, TextSizes, VisionSizes
from mmscale.model.logit_scale import _BoundedLog
from mmscale.model.presets import build_model, build_model_config
from mmscale.objectives.pretraining import PretrainingObjective, forward_backward
from tests.model_pool import process_pool

GLOBAL_BATCH = 16
VOCABULARY = 50
SIZES = ModelConfig(
    embed_dim=16,
    patch_dropout=0.25,
    vision=VisionSizes(image_size=16, patch_size=4, width=24, layers=2, heads=2, pooler_queries=5, pooler_heads=2),
    text=TextSizes(context_length=14, width=16, layers=2, heads=2),
    decoder=DecoderSizes(layers=1, heads=2),
)


def global_batch(masked: tuple[int, ...] = ()) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 15, (GLOBAL_BATCH,), generator=generator)
    input_ids = torch.randint(4, VOCABULARY, (GLOBAL_BATCH, 14), generator=generator)
    valid = torch.ones(GLOBAL_BATCH, dtype=torch.bool)
    valid[list(masked)] = False
    lengths[~valid] = 0
    input_ids[torch.arange(14) >= lengths[:, None]] = 0
    return SimpleNamespace(
        pixel_values=torch.randint(0, 256, (GLOBAL_BATCH, 3, 16, 16), generator=generator, dtype=torch.uint8),
        input_ids=input_ids,
        lengths=lengths,
        valid=valid,
        positions=torch.arange(100, 100 + GLOBAL_BATCH),
    )


def rows(batch: SimpleNamespace, index: torch.Tensor) -> SimpleNamespace:
    """Some rows as a micro-batch, trimmed to its own longest caption as the loader does."""
    part = SimpleNamespace(**{name: value[index] for name, value in vars(batch).items()})
    part.input_ids = part.input_ids[:, : max(2, int(part.lengths.max()))]
    return part


def new_objective(settings: dict) -> PretrainingObjective:
    objective = ObjectiveConfig(**settings)
    torch.manual_seed(0)
    model = build_model(build_model_config(SIZES, VOCABULARY, contrastive=objective.contrastive)).train()
    return PretrainingObjective(model, objective, seed=5)


def gradients(num_micro_batches: int, settings: dict, masked: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """This rank's part of the work; gradients averaged over ranks as DeepSpeed does, and the reported numbers."""
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    objective = new_objective(settings)
    batch = global_batch(masked)
    mine = torch.arange(rank, GLOBAL_BATCH, world_size)
    micro_batches = [rows(batch, part) for part in mine.chunk(num_micro_batches)]
    calls = []
    reported = forward_backward(objective, micro_batches, lambda loss: (calls.append(1), loss.backward()))
    assert len(calls) == num_micro_batches
    found = {name: p.grad for name, p in objective.model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    for gradient in found.values():
        if world_size > 1:
            dist.all_reduce(gradient)
            gradient /= world_size
    return found | {f"reported.{name}": value.float() for name, value in reported.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    names = [name for name in expected if not name.startswith("reported.")]
    largest = max(expected[name].abs().max() for name in names)
    worst = max((found[name] - expected[name]).abs().max() for name in names)
    assert worst <= 1e-5 * largest
    for name in set(expected) - set(names):
        assert torch.allclose(found[name], expected[name], rtol=1e-5), name


def plain_gradients(settings: dict, masked: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """By the formulas as they are written, on whole matrices and without the masked samples."""
    objective = new_objective(settings)
    model, weights = objective.model, objective.objective
    batch = global_batch(masked)
    batch = rows(batch, batch.valid.nonzero()[:, 0])
    keep = model.kept_patches(batch.positions, objective.seed)
    image, image_tokens = model.encode_image(batch.pixel_values, keep)
    text, text_tokens = model.encode_text(batch.input_ids, lengths=batch.lengths)
    scale, bias = model.logit_scale()
    logits = scale * image @ text.T + bias
    target = torch.arange(len(logits))
    if weights.contrastive == "clip":
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    else:
        contrastive = -F.logsigmoid(logits * (2 * torch.eye(len(logits)) - 1)).sum() / len(logits)
    scores = model.decoder.head(model.decode(text_tokens, image_tokens))[:, :-1]
    labels = batch.input_ids[:, 1:].masked_fill(torch.arange(1, 14) >= batch.lengths[:, None], -100)
    caption = F.cross_entropy(
        scores.flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=weights.label_smoothing
    )
    caption = caption + weights.z_loss * scores.logsumexp(-1)[labels >= 0].square().mean()
    loss = weights.contrastive_weight * contrastive + weights.caption_weight * caption
    loss.backward()
    found = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    return found | {
        "reported.loss": loss.detach(),
        "reported.loss_contrastive": contrastive.detach(),
        "reported.loss_caption": caption.detach(),
    }


MASKED = (3, 4, 12)


@pytest.mark.parametrize("contrastive", ["clip", "siglip"])
@pytest.mark.parametrize("masked", [(), MASKED])
def test_one_process_gives_the_plain_formulas_gradient(contrastive, masked):
    settings = {"contrastive": contrastive}
    assert_same(gradients(1, settings, masked), plain_gradients(settings, masked))


@pytest.mark.parametrize(
    "settings", [{"label_smoothing": 0.2}, {"z_loss": 0.01}, {"contrastive_weight": 3.0, "caption_weight": 0.5}]
)
def test_every_setting_of_the_objective_reaches_its_loss(settings):
    expected = plain_gradients(settings, MASKED)
    for num_micro_batches in (1, 2):
        assert_same(gradients(num_micro_batches, settings, MASKED), expected)


@pytest.mark.slow
def test_any_number_of_processes_and_micro_batches_gives_one_process_gradient(tmp_path):
    """W x A in {1, 2, 4} x {1, 2, 4}, both losses, with and without bad samples; in one of the cases a whole
    micro-batch is bad. Against the plain formulas, so that no shape is right only by its own measure.
    """
    with process_pool(4, tmp_path) as pool:
        for contrastive, masked in itertools.product(("clip", "siglip"), ((), MASKED, (0, 4, 8, 12))):
            settings = {"contrastive": contrastive}
            expected = plain_gradients(settings, masked)
            for world_size, num_micro_batches in itertools.product((1, 2, 4), (1, 2, 4)):
                if world_size == 1:
                    found = [gradients(num_micro_batches, settings, masked)]
                else:
                    found = pool.run(gradients, world_size, num_micro_batches, settings, masked)
                for rank in found:  # the reported numbers are equal on every rank too
                    assert_same(rank, expected)


@pytest.mark.parametrize("num_micro_batches", [1, 2, 4])
def test_what_stands_in_a_bad_samples_slot_changes_nothing(monkeypatch, num_micro_batches):
    expected = gradients(num_micro_batches, {}, MASKED)

    def other_rubbish(masked, whole=global_batch):
        batch = whole(masked)
        batch.pixel_values[~batch.valid] = 255
        batch.input_ids[~batch.valid] = 7  # a picture that cannot be read may have a caption that can
        batch.lengths[~batch.valid] = 14
        return batch

    monkeypatch.setitem(globals(), "global_batch", other_rubbish)
    assert_same(gradients(num_micro_batches, {}, MASKED), expected)


def test_a_batch_of_bad_samples_alone_gives_no_gradient():
    found = gradients(2, {}, tuple(range(GLOBAL_BATCH)))
    assert all(not gradient.any() for name, gradient in found.items() if name != "reported.logit_scale")


def test_micro_negatives_leave_out_the_other_micro_batches():
    settings = {"negatives": "micro", "caption_weight": 0.0}
    whole, halves = gradients(1, settings, ()), gradients(2, settings, ())
    assert halves["reported.loss_contrastive"] < whole["reported.loss_contrastive"]


@pytest.mark.parametrize(
    "settings, frozen",
    [
        ({"caption_weight": 0.0}, {"decoder"}),
        ({"contrastive_weight": 0.0}, {"vision.projection", "text.cls_token", "text.norm_final", "text.projection"}),
    ],
)
def test_a_loss_of_weight_zero_leaves_no_unused_parameter(settings, frozen):
    objective = new_objective(settings)
    forward_backward(objective, [global_batch()], lambda loss: loss.backward())
    without = {name for name, p in objective.model.named_parameters() if p.grad is None}
    assert without == {name for name, p in objective.model.named_parameters() if not p.requires_grad}
    assert all(any(name.startswith(part) for name in without) for part in frozen)


@pytest.mark.parametrize("settings", [{"caption_weight": 0.0}, {"contrastive_weight": 0.0}])
def test_a_loss_of_weight_zero_is_not_computed(settings, monkeypatch):
    objective = new_objective(settings)
    ran = []
    for part in (objective.model.decoder, objective.model.vision.projection, objective.model.text.projection):
        part.register_forward_hook(lambda module, *_: ran.append(module))
    objective.model.logit_scale.register_forward_hook(lambda module, *_: ran.append(module))
    forward_backward(objective, [global_batch()], lambda loss: loss.backward())
    assert (objective.model.decoder in ran) == ("caption_weight" not in settings)
    assert (len(ran) == 3) == ("caption_weight" in settings)


def test_the_logit_scale_stops_at_its_bound_and_comes_back():
    objective = new_objective({"caption_weight": 0.0})
    log_scale = objective.model.logit_scale.log_scale
    for value, sign in ((5.0, -1), (5.0, 1)):
        log_scale.data.fill_(value)
        log_scale.grad = None
        scale = objective.model.logit_scale()[0]
        (sign * scale).backward()
        assert scale.item() == pytest.approx(100.0, rel=1e-6)
        # A gradient step goes against the gradient: a negative one would push further out.
        assert log_scale.grad.item() == (0.0 if sign < 0 else pytest.approx(100.0, rel=1e-6))


def test_all_ranks_decide_alike_whether_the_logit_scale_may_leave_its_bound(monkeypatch):
    """Here the gradient would push out, on the other rank it pushes back harder, and back is where the mean points."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda gradient: gradient.add_(3.0))
    module = new_objective({}).model.logit_scale
    log_scale = module.log_scale
    log_scale.data.fill_(module.limit)
    _BoundedLog.apply(log_scale, module.limit).backward(torch.tensor([-1.0]))
    assert log_scale.grad.item() == 1.0
