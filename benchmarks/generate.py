"""Captions per second: greedy decoding with a cache, beside a loop over open_clip's own forward.

    python -m benchmarks.generate [--quick] [--output FILE.json]

B/32, batch 8, 20 tokens a picture, the same weights on both sides; ours stay packed from batch to batch, as in an
evaluation. open_clip has no cache: its `generate` calls the whole model on all tokens so far at every step, with the
picture encoded once. That loop stands here in its place, because the real one does not run with Transformers 5. Without
open_clip the peer is the same loop over our forward.
"""

from collections.abc import Callable

import torch

from benchmarks.common import Report, paired, parser, ratios
from benchmarks.model import SIZES, VOCABULARY, has_open_clip
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.model.presets import build_model_config

BATCH = 8
TOKENS = 20


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--sizes", default="", help="small, b32; small alone when quick")
    options.add_argument("--rounds", type=int, help="captions of the same pictures by each side")
    args = options.parse_args(argv)
    report = Report("generate")
    for size in (args.sizes or ("small" if args.quick else "small,b32")).split(","):
        measure(report, size, rounds=args.rounds or (5 if args.quick else 20))
    report.finish(args.output)


@torch.no_grad()
def measure(report: Report, size: str, rounds: int) -> None:
    torch.manual_seed(0)
    model = MMScaleModel(build_model_config(SIZES[size], VOCABULARY)).eval()
    pictures = torch.randn(BATCH, 3, 224, 224)
    # An end mark that is no token, so that every caption is as long as in the loop of the peer.
    kwargs = {"do_sample": False, "max_new_tokens": TOKENS, "eos_token_id": VOCABULARY}
    tokens = model.encode_image(pictures)[1]
    cases: dict[str, Callable[[], torch.Tensor]] = {
        "decoding: mmscale": lambda: model.generate(image_tokens=tokens, **kwargs),
        "with encoding: mmscale": lambda: model.generate(pixel_values=pictures, **kwargs),
    }
    peer, encode, step = ("open_clip", *open_clips(model)) if has_open_clip() else ("no cache", *uncached(model))
    encoded = encode(pictures)
    cases[f"decoding: {peer}"] = lambda: loop(step, encoded, model.config.bos_token_id)
    cases[f"with encoding: {peer}"] = lambda: loop(step, encode(pictures), model.config.bos_token_id)
    with model.packed_for_generation():
        readings = paired(cases, rounds=rounds, warmup=1)
    facts = {"size": size, "batch": BATCH, "tokens": TOKENS, "threads": torch.get_num_threads()}
    for name, seconds in readings.items():
        report.add(name, "tokens/s", [BATCH * TOKENS / s for s in seconds], "higher", **facts)
    for what in ("decoding", "with encoding"):
        times = ratios(readings[f"{what}: {peer}"], readings[f"{what}: mmscale"])
        report.add(f"{what}: mmscale / {peer}", "ratio", times, "higher", **facts)


def loop(step: Callable, encoded: object, start: int) -> torch.Tensor:
    """Greedy decoding that computes every token again at every step."""
    ids = torch.full((BATCH, 1), start)
    for _ in range(TOKENS):
        ids = torch.cat([ids, step(ids, encoded).argmax(-1, keepdim=True)], dim=1)
    return ids


def open_clips(model: MMScaleModel) -> tuple[Callable, Callable]:
    """What encodes pictures, and what gives the next token's logits, by open_clip's CoCa with our weights."""
    from open_clip.coca_model import CoCa

    from mmscale.export.open_clip import open_clip_config, to_open_clip

    settings = open_clip_config(model.config)
    settings.pop("custom_text")
    theirs = CoCa(**settings).eval()
    theirs.load_state_dict(to_open_clip(model.state_dict(), model.config))

    def encode(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return theirs._encode_image(pictures)

    def step(ids: torch.Tensor, encoded: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        latent, tokens = encoded
        return theirs(None, ids, image_latent=latent, image_embs=tokens, output_labels=False)["logits"][:, -1]

    return encode, step


def uncached(model: MMScaleModel) -> tuple[Callable, Callable]:
    """The same loop over our own model."""

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        return model.encode_image(pictures)[1]

    def step(ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        _, states = model.encode_text(ids, lengths=torch.full((len(ids),), ids.shape[1]))
        return model.decoder.head(model.decode(states, tokens))[:, -1]

    return encode, step


if __name__ == "__main__":
    main()
