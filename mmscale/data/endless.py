"""Training rows from sources that cannot be indexed, through webdataset's own reader: pipes, endless streams.

Shards are drawn at random with replacement and samples through a shuffle buffer, another draw for every rank. A run
that resumes draws anew: it goes on with the same distribution, not with the same samples.
"""

import logging
import queue
import random
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import webdataset

from mmscale.config import DataConfig
from mmscale.data.batches import Row
from mmscale.data.captions import CaptionFields, SampleError, json_object
from mmscale.data.paths import PIPE, shard_name
from mmscale.data.samples import SampleReader
from mmscale.data.shards import RawSample
from mmscale.data.sources import digest_of, train_shards
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError

logger = logging.getLogger(__name__)

WAIT_S = 0.2


class EndlessSource:
    """Samples in the order in which they come; `places` hands them out, whatever the positions."""

    num_samples = 0

    def __init__(
        self, data: DataConfig, tokenizer: Tokenizer, image_size: int, context_length: int, seed: int, rank: int
    ):
        groups, weights = train_shards(data, pipes=data.allow_pipe)
        self._groups, self._weights = groups, weights
        self._captions = CaptionFields(data.text_key, data.max_caption_bytes)
        self._image_kinds = [kind.strip().lower() for kind in data.image_key.split(";")]
        self._reader = SampleReader(data, tokenizer, image_size, context_length)
        self._seed, self._rank, self._buffer = seed, rank, data.shuffle_buffer
        self._samples: queue.Queue = queue.Queue(maxsize=256)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._since_sample = 0
        self.fingerprint = digest_of(
            "stream", *[(weight, *group) for weight, group in zip(weights, groups, strict=True)]
        )
        self.summary = {"count": sum(len(group) for group in groups)}
        if rank == 0:
            logger.warning("data.mode: stream resumes only statistically: other samples, of the same distribution")

    def places(self, positions: Sequence[int]) -> list[dict]:
        """Raises UserError when the sources hold no samples."""
        if self._thread is None:
            # A resumed run begins elsewhere in the random draws.
            draw = random.Random(f"{self._seed}/{self._rank}/{positions[0]}")
            self._thread = threading.Thread(target=self._pump, args=(draw,), name="stream", daemon=True)
            self._thread.start()
        return [self._next() for _ in positions]

    def read(self, place: dict, position: int, out: np.ndarray) -> Row:
        name, key = shard_name(str(place.get("__url__", ""))), str(place.get("__key__", "?"))
        try:
            raw = self._raw(key, {kind: data for kind, data in place.items() if not kind.startswith("__")})
            return Row(name, key, self._reader.train(raw, self._seed, position, out))
        except SampleError as error:
            return Row(name, key, reason=str(error))

    def difference(self, summary: dict) -> str:
        return "the sources, or their weights, are others"

    def close(self) -> None:
        self._closed.set()

    def _raw(self, key: str, parts: dict[str, bytes]) -> RawSample:
        kind = next((kind for kind in self._image_kinds if kind in parts), None)
        if kind is None:
            raise SampleError("the sample has no image")
        record = json_object(parts["json"]) if "json" in self._captions.kinds & parts.keys() else {}
        return RawSample(key, parts[kind], self._captions.read(parts, record), record)

    def _next(self) -> dict:
        item = self._samples.get()
        if isinstance(item, Exception):
            raise item
        return item

    def _pump(self, draw: random.Random) -> None:
        """In a thread of its own: puts samples into the queue, and in the end the error that stopped it."""
        try:
            samples = webdataset.tarfile_to_samples(handler=self._complain)(self._urls(draw))
            initial = min(self._buffer, 1000)
            for sample in webdataset.shuffle(self._buffer, initial=initial, rng=draw)(self._counted(samples)):
                if not self._put(sample):
                    return
        except Exception as error:
            self._put(error)

    def _put(self, item: object) -> bool:
        while not self._closed.is_set():
            try:
                self._samples.put(item, timeout=WAIT_S)
                return True
            except queue.Full:
                continue
        return False

    def _urls(self, draw: random.Random) -> Iterator[dict]:
        most = 10 + 3 * sum(len(group) for group in self._groups)
        while not self._closed.is_set():
            self._since_sample += 1
            if self._since_sample > most:
                raise UserError(f"data.train: {most} shards in a row gave no sample; the last are named above")
            (group,) = draw.choices(self._groups, self._weights)
            yield {"url": draw.choice(group)}

    def _counted(self, samples: Iterator[dict]) -> Iterator[dict]:
        for sample in samples:
            self._since_sample = 0
            yield sample

    def _complain(self, error: Exception) -> bool:
        text = " ".join(str(error).split())
        logger.warning("a shard is left where it breaks off: %s", text.replace(PIPE, "")[:300])
        return True
