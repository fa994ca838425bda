"""The stream beside the usual pipeline: the same photographs, the same crops, the same kind of batch.

    python -m benchmarks.loader [--quick] [--output FILE.json]

The peer is webdataset + PIL with the structure of open_clip's training pipeline: resampled shards, a shuffle buffer,
PIL's decoder, RandomResizedCrop (bicubic), normalised float tensors, and torch's DataLoader. When open_clip and
torchvision can be imported, open_clip's own pipeline joins; when MosaicML's `streaming` can, a StreamingDataset of the
same samples as MDS shards, with the peer's picture steps. CPU times are of one process (0 workers) on one thread; wall
times are with 1 and 2 workers (threads here, processes there).
"""

import io
import math
import random
import resource
import tarfile
import tempfile
import time
import tracemalloc
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from benchmarks.common import Report, paired, parser, ratios
from mmscale.config import DataConfig
from mmscale.data import images, jpeg
from mmscale.data.index import build_index
from mmscale.data.loader import TrainStream
from mmscale.data.order import MixtureOrder, StreamOrder
from mmscale.data.samples import iter_captions, uniform_draws
from mmscale.data.tokenizer import Tokenizer, train_tokenizer

SIZE = 224
BATCH = 64
CONTEXT = 76
READ_AHEAD = 4  # batches: two of each DataLoader worker, where there are two; three of ours
REST_S = 0.5  # in which what is read ahead is completed
SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WORDS = (
    "a",
    "the",
    "of",
    "on",
    "with",
    "red",
    "blue",
    "small",
    "man",
    "woman",
    "street",
    "house",
    "dog",
    "photo",
    "view",
)


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__.splitlines()[0]).parse_args(argv)
    torch.set_num_threads(1)
    report = Report("loader")
    report.add("our own JPEG decoder, for fast", "built", [float(jpeg.AVAILABLE)], better="neither")
    with tempfile.TemporaryDirectory() as folder:
        shards = write_photos(Path(folder), num_shards=4, num_samples=50 if args.quick else 250)
        tokenizer = train_tokenizer(iter_captions(shards, DataConfig()), f"{folder}/tokenizer.model", 300)
        measure_quality(report, shards)
        measure_cpu(report, shards, tokenizer, rounds=10 if args.quick else 50)
        for workers in (2,) if args.quick else (1, 2):
            measure_wall(report, shards, tokenizer, workers, rounds=6 if args.quick else 25)
        measure_stages(report, shards, tokenizer, rounds=10 if args.quick else 50)
        measure_memory(report, Path(folder), tokenizer, num_samples=20_000 if args.quick else 200_000)
    measure_order(report, rounds=3 if args.quick else 20)
    report.finish(args.output)


def pipelines(shards: list[str], tokenizer: Tokenizer, workers: int) -> dict[str, Callable[[], Iterator]]:
    """Name -> what starts an endless iterator over batches of BATCH samples."""
    found = {
        "mmscale exact": lambda: ours(shards, tokenizer, workers, "exact"),
        "mmscale fast": lambda: ours(shards, tokenizer, workers, "fast"),
        "webdataset + PIL": lambda: usual(shards, tokenizer, workers),
    }
    with suppress(ImportError):
        import open_clip  # noqa: F401
        from open_clip_train.data import get_wds_dataset  # noqa: F401

        found["open_clip"] = lambda: open_clips(shards, workers)
    with suppress(ImportError):
        import streaming  # noqa: F401

        found["MosaicML Streaming + PIL"] = lambda: mosaics(shards, tokenizer, workers)
    return found


def ours(shards: list[str], tokenizer: Tokenizer, workers: int, decode: str) -> Iterator:
    stream = TrainStream(
        DataConfig(train=shards, workers=workers, decode=decode, crop_scale=SCALE, crop_ratio=RATIO),
        tokenizer,
        image_size=SIZE,
        context_length=CONTEXT,
        seed=0,
        global_batch=BATCH,
        micro_batch=BATCH,
        rank=0,
        world_size=1,
    )
    return stream.batches(0)


def usual(shards: list[str], tokenizer: Tokenizer, workers: int) -> Iterator:
    """webdataset and PIL, in the structure of open_clip's training pipeline."""

    pipeline = wds.DataPipeline(
        wds.ResampledShards(shards),
        wds.tarfile_to_samples(),
        wds.shuffle(bufsize=5000, initial=1000),
        wds.select(lambda sample: "txt" in sample and "jpg" in sample),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=pil_transform, text=lambda text: padded_ids(tokenizer, text)),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH, partial=False),
    )
    return iter(wds.WebLoader(pipeline, batch_size=None, num_workers=workers))


def padded_ids(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    ids = tokenizer.encode(text, CONTEXT)
    return torch.tensor(ids + [tokenizer.pad_id] * (CONTEXT - len(ids)))


def mosaics(shards: list[str], tokenizer: Tokenizer, workers: int) -> Iterator:
    """MosaicML's StreamingDataset over the same samples, shuffled, with the picture steps of `usual`."""
    from streaming import MDSWriter, Stream, StreamingDataset

    # A folder of its own each time: a dataset holds on to its folder as long as the process lives.
    folder = tempfile.mkdtemp(dir=Path(shards[0]).parent)
    with MDSWriter(out=folder, columns={"jpg": "bytes", "txt": "str"}) as writer:
        for shard in shards:
            for data, text in zip(jpegs(shard), iter_captions(shard, DataConfig()), strict=True):
                writer.write({"jpg": data, "txt": text})

    class Pairs(StreamingDataset):
        def __getitem__(self, number: int):
            sample = super().__getitem__(number)
            with Image.open(io.BytesIO(sample["jpg"])) as image:
                picture = image.convert("RGB")
            return pil_transform(picture), padded_ids(tokenizer, sample["txt"])

    dataset = Pairs(streams=[Stream(local=folder, repeat=100)], batch_size=BATCH, shuffle=True)
    return iter(torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=workers))


def open_clips(shards: list[str], workers: int) -> Iterator:
    """open_clip's own pipeline, transform and tokenizer."""
    import open_clip
    from open_clip_train.data import get_wds_dataset

    arguments = Namespace(
        train_data="::".join(shards),
        train_data_upsampling_factors=None,
        train_num_samples=10**9,
        dataset_resampled=True,
        seed=0,
        workers=workers,
        batch_size=BATCH,
        world_size=1,
    )
    transform = open_clip.image_transform(SIZE, is_train=True, mean=MEAN, std=STD)
    info = get_wds_dataset(arguments, transform, is_train=True, tokenizer=open_clip.get_tokenizer("coca_ViT-B-32"))
    return iter(info.dataloader)


def pil_transform(image: Image.Image) -> torch.Tensor:
    """RandomResizedCrop (bicubic), then a normalised float tensor [3, SIZE, SIZE], step by step as torchvision does."""
    box = images.training_crop(image.height, image.width, SCALE, RATIO, [random.random() for _ in range(10)])
    image = pil_crop(image, box)
    pixels = torch.from_numpy(np.array(image, np.uint8, copy=True)).permute(2, 0, 1).contiguous()
    tensor = pixels.to(torch.float32).div(255)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return tensor.clone().sub_(mean).div_(std)


def pil_crop(image: Image.Image, box: images.Box) -> Image.Image:
    part = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    return part.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def measure_cpu(report: Report, shards: list[str], tokenizer: Tokenizer, rounds: int) -> None:
    """CPU time a sample, one process."""
    running = {name: start() for name, start in pipelines(shards, tokenizer, workers=0).items()}
    cases = {name: lambda batches=batches: next(batches) for name, batches in running.items()}
    readings = paired(cases, rounds, clock=time.process_time)
    for name, seconds in readings.items():
        report.add(name, "us CPU/sample", [1e6 * s / BATCH for s in seconds], workers=0)
    add_ratios(report, readings, "CPU", workers=0)


def measure_wall(report: Report, shards: list[str], tokenizer: Tokenizer, workers: int, rounds: int) -> None:
    """Wall time a sample, the pipelines in turn: those that wait have read ahead what they may, and stand still."""
    running = {name: start() for name, start in pipelines(shards, tokenizer, workers).items()}
    readings: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, batches in running.items():
            for _ in range(READ_AHEAD):
                next(batches)
            # Several batches a reading: the workers' batches come in bursts.
            begun = time.perf_counter()
            for _ in range(2 * workers):
                next(batches)
            readings[name].append((time.perf_counter() - begun) / (2 * workers))
            time.sleep(REST_S)
    for name, batches in running.items():
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()
        else:
            batches.close()
        report.add(name, "us/sample", [1e6 * s / BATCH for s in readings[name]], workers=workers)
    add_ratios(report, readings, "wall", workers=workers)


def add_ratios(report: Report, readings: dict[str, list[float]], what: str, **facts) -> None:
    for peer in ("webdataset + PIL", "open_clip", "MosaicML Streaming + PIL"):
        for mode in ("exact", "fast"):
            if peer in readings:
                report.add(
                    f"{what} {mode} : {peer}", "ratio", ratios(readings[f"mmscale {mode}"], readings[peer]), **facts
                )


def measure_quality(report: Report, shards: list[str]) -> None:
    """PSNR to PIL's bicubic on the same crop.

    The fast mode widens a crop to whole pixels of what it decodes, here even ones of the picture. `as drawn` compares
    with the crop before that.
    """
    psnr: dict[str, list[float]] = {"exact": [], "fast": [], "fast, crop as drawn": []}
    for number, data in enumerate(jpegs(shards[0])[:50]):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        drawn = images.training_crop(image.height, image.width, SCALE, RATIO, uniform_draws(0, number))
        top, left = drawn.top // 2 * 2, drawn.left // 2 * 2
        bottom, right = drawn.top + drawn.height + 1, drawn.left + drawn.width + 1
        widened = images.Box(top, left, bottom // 2 * 2 - top, right // 2 * 2 - left)
        for case, box, fast in zip(psnr, (drawn, widened, drawn), (False, True, True), strict=True):
            expected = np.asarray(pil_crop(image, box), dtype=np.float64)
            view = images.training_view(data, lambda *_, box=box: box, SIZE, 10**8, fast=fast)
            psnr[case].append(10 * math.log10(255**2 / np.mean((view - expected) ** 2)))
    for case, readings in psnr.items():
        report.add(f"PSNR {case} to PIL bicubic", "dB", readings, better="higher")


def measure_stages(report: Report, shards: list[str], tokenizer: Tokenizer, rounds: int) -> None:
    """What a sample's CPU time goes into."""
    data = jpegs(shards[0])[:BATCH]
    pixels = [images.decode(item, 10**8) for item in data]
    boxes = [images.training_crop(*p.shape[:2], SCALE, RATIO, uniform_draws(0, n)) for n, p in enumerate(pixels)]
    halves = [images.decode_scaled(item, 10**8, SIZE * 3 // 4)[0] for item in data]
    half_boxes = [images.training_crop(*p.shape[:2], SCALE, RATIO, uniform_draws(0, n)) for n, p in enumerate(halves)]
    order = StreamOrder([10_000] * 1000, seed=0)
    captions = list(iter_captions(shards[:1], DataConfig()))[:BATCH]
    cases = {
        "index a shard": lambda: build_index(shards[0]),
        "locate": lambda: [order.locate(position) for position in range(BATCH)],
        "decode exact": lambda: [images.decode(item, 10**8) for item in data],
        "decode fast": lambda: [images.decode_scaled(item, 10**8, SIZE * 3 // 4) for item in data],
        "crop and resize exact": lambda: [
            images.crop_and_resize(p, box, SIZE) for p, box in zip(pixels, boxes, strict=True)
        ],
        "crop and resize fast": lambda: [
            images.crop_and_resize(p, box, SIZE, "bilinear") for p, box in zip(halves, half_boxes, strict=True)
        ],
        "PIL decode": lambda: [Image.open(io.BytesIO(item)).convert("RGB") for item in data],
        "tokenize": lambda: [tokenizer.encode(caption, CONTEXT) for caption in captions],
    }
    for name, seconds in paired(cases, rounds, clock=time.process_time).items():
        samples = len(build_index(shards[0])) if name == "index a shard" else BATCH
        report.add(f"stage: {name}", "us CPU/sample", [1e6 * s / samples for s in seconds])


def measure_order(report: Report, rounds: int) -> None:
    """5 billion samples in 500,000 shards: to build, to go on at a random position, to draw; and the memory held."""
    rng = np.random.default_rng(0)
    counts = rng.integers(9_000, 11_000, 500_000)
    build, resume, draw = [], [], []
    for _ in range(rounds):
        begun = time.perf_counter()
        order = StreamOrder(counts, seed=0)
        order.locate(0)
        build.append(time.perf_counter() - begun)
        position = int(rng.integers(3 * order.num_samples))
        begun = time.perf_counter()
        order = StreamOrder(counts, seed=0)
        for offset in range(order.lanes):
            order.locate(position + offset)
        resume.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        for offset in range(200_000):
            order.locate(position + offset)
        draw.append((time.perf_counter() - begun) / 200_000)
    tracemalloc.start()
    order = StreamOrder(counts, seed=0)
    for offset in range(200_000):
        order.locate(position + offset)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    report.add("order of 5e9 samples: build", "s", build)
    report.add("order of 5e9 samples: resume anywhere", "s", resume)
    report.add("order of 5e9 samples: draw", "us/sample", [1e6 * s for s in draw])
    report.add("order of 5e9 samples: peak memory", "MiB", [peak / 2**20])
    mixture = MixtureOrder([counts[:250_000], counts[250_000:]], [3, 1], seed=0)
    begun = time.perf_counter()
    for position in range(200_000):
        mixture.locate(position)
    report.add("mixture of two sources: draw", "us/sample", [1e6 * (time.perf_counter() - begun) / 200_000])


def measure_memory(report: Report, folder: Path, tokenizer: Tokenizer, num_samples: int) -> None:
    """Growth of the resident memory over many samples, after the first fifth of them."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    shards = write_shards(folder / "small", [encode_jpeg(pixels, 80)], num_shards=40, num_samples=500)
    batches = ours_small(shards, tokenizer)
    readings = []
    for number in range(num_samples // 200):
        next(batches)
        if number % (num_samples // 10_000) == 0:
            readings.append(resident_mib())
    batches.close()
    fifth = len(readings) // 5
    growth = float(np.mean(readings[-fifth:]) - np.mean(readings[fifth : 2 * fifth]))
    report.add(f"resident memory during {num_samples:,} samples", "MiB", readings, better="neither")
    report.add("growth of it, from the second fifth to the last", "MiB", [growth])


def ours_small(shards: list[str], tokenizer: Tokenizer) -> Iterator:
    stream = TrainStream(
        DataConfig(train=shards, workers=2), tokenizer, image_size=32, context_length=CONTEXT, seed=0,
        global_batch=200, micro_batch=200, rank=0, world_size=1,
    )  # fmt: skip
    return stream.batches(0)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def jpegs(shard: str) -> list[bytes]:
    with tarfile.open(shard) as tar:
        return [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]


def write_photos(folder: Path, num_shards: int, num_samples: int) -> list[str]:
    """Pictures with the spectrum of photographs, 512 x 384, about 47 KB each."""
    photos = [encode_jpeg(photo(number), 76) for number in range(min(num_shards * num_samples, 100))]
    return write_shards(folder / "photos", photos, num_shards, num_samples)


def photo(number: int, width: int = 512, height: int = 384) -> np.ndarray:
    """A random field whose amplitude falls with frequency as photographs' does, three correlated channels."""
    rng = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / width) ** 1.3
    fields = [
        np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), s=(height, width)) for _ in range(3)
    ]
    pixels = np.stack([fields[0] + 0.35 * field for field in fields], axis=-1)
    pixels = (pixels - pixels.mean()) / pixels.std() * 55 + 120
    return pixels.clip(0, 255).astype(np.uint8)


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_shards(folder: Path, pictures: list[bytes], num_shards: int, num_samples: int) -> list[str]:
    folder.mkdir(parents=True)
    rng, paths = random.Random(0), []
    for shard in range(num_shards):
        paths.append(str(folder / f"{shard:05d}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for number in range(shard * num_samples, (shard + 1) * num_samples):
                caption = " ".join(rng.choice(WORDS) for _ in range(12)).encode()
                for kind, data in (("jpg", pictures[number % len(pictures)]), ("txt", caption)):
                    info = tarfile.TarInfo(f"{number:09d}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return paths


if __name__ == "__main__":
    main()
