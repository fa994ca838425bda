"""A split of 23 noisy pictures in one shard, with captions, classes and questions."""

import io
import json
import tarfile

import numpy as np
from checkpoints import WORDS
from PIL import Image

NUM_SAMPLES, BAD = 23, 7


def write_shard(path):
    """23 pictures, of which one is broken and two show the same scene; every other one has a class."""
    draw = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(NUM_SAMPLES):
            image = io.BytesIO()
            colour = draw.integers(0, 255, 3)
            noise = draw.integers(-40, 40, (40, 48, 3))
            Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(image, "JPEG")
            scene = 3 if number == 11 else number
            captions = [f"{WORDS[scene % 13]} {WORDS[scene // 2]} {scene}", f"the scene {scene}", f"number {scene}"][
                : 2 + scene % 2
            ]
            record = {"captions": captions}
            if number % 3:
                record["questions"] = [
                    {"question": "what is it", "answers": ["circle"] * 3},
                    {"question": "what colour", "answers": [{"answer": "red"}] * 10, "candidates": WORDS[:5]},
                ][: number % 3]
            if number % 2:
                record["class_name"] = ["circle", "square", "red"][number % 3]
            members = {"jpg": image.getvalue(), "txt": captions[0].encode(), "json": json.dumps(record).encode()}
            if number == BAD:
                members["jpg"] = members["jpg"][:60]
            for kind, content in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
