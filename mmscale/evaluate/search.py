"""Finding pictures by a text or by another picture, in an index of embeddings that is built once.

The index is exact (inner products of unit vectors) and lies in a folder of its own: `vectors.faiss`, `pictures.jsonl`
(one line each: name, source, place, caption) and `about.json`, which names the model and the files it was made from. It
is made anew when these have changed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmscale.data.paths import expand, is_remote
from mmscale.errors import UserError
from mmscale.evaluate.encoding import encode_own_texts, model_device
from mmscale.evaluate.pictures import batched, is_shards, read_pictures
from mmscale.pretrained import Pretrained

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "mmscale" / "search"


@dataclass(frozen=True)
class Entry:
    """A picture in the index: its name, where it is read again, and a caption if it has one.

    `place` is its number among the samples of the shards in `source`; None for a file or a URL.
    """

    name: str
    source: str
    place: int | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Found:
    """A picture that answers a query: its row in the index, and its cosine similarity."""

    row: int
    entry: Entry
    similarity: float


class PictureIndex:
    """The embeddings of a set of pictures, ready to be searched."""

    def __init__(self, index, entries: list[Entry]):
        self._index, self.entries = index, entries

    def __len__(self) -> int:
        return len(self.entries)

    def search(self, embeds: Tensor, top: int) -> list[list[Found]]:
        """The nearest pictures of each of `embeds` `[queries, dim]`, nearest first."""
        similarities, rows = self._index.search(embeds.cpu().float().numpy(), min(top, len(self.entries)))
        return [
            [Found(int(row), self.entries[row], float(similarity)) for similarity, row in zip(*pair, strict=True)]
            for pair in zip(similarities, rows, strict=True)
        ]


def open_index(
    pretrained: Pretrained,
    sources: Sequence[str],
    folder: str | Path | None = None,
    batch: int = 64,
    say: Callable[[str], None] = lambda line: None,
) -> PictureIndex:
    """The index of the pictures in `sources`, read from `folder` or built and kept there.

    Args:
        sources: as `read_pictures` takes them.
        folder: in the user's cache, by model and sources, unless given.

    Raises:
        UserError: no pictures, or faiss is not installed.
    """
    faiss = _import_faiss()
    about = {"model": _model_digest(pretrained), "sources": list(sources), "files": _files_digest(sources)}
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    folder = Path(folder) if folder else CACHE.expanduser() / key[:16]
    if (folder / "about.json").exists() and json.loads((folder / "about.json").read_text())["key"] == key:
        entries = [Entry(**json.loads(line)) for line in (folder / "pictures.jsonl").read_text("utf-8").splitlines()]
        return PictureIndex(faiss.read_index(str(folder / "vectors.faiss")), entries)
    say(f"building the index in {folder}")
    index, entries = faiss.IndexFlatIP(pretrained.model.config.embed_dim), []
    for pictures, pixel_values in batched(read_pictures(sources, pretrained), batch):
        index.add(embed_pictures(pretrained, pixel_values).cpu().numpy())
        entries += [Entry(p.name, p.source, p.place, p.captions[0] if p.captions else None) for p in pictures]
    if not entries:
        raise UserError(f"{', '.join(sources)}: no picture could be read, so there is nothing to search")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").unlink(missing_ok=True)  # written last: an index that was cut off is not used
    faiss.write_index(index, str(folder / "vectors.faiss"))
    lines = [json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in entries]
    (folder / "pictures.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "about.json").write_text(json.dumps(about | {"key": key}, indent=1), encoding="utf-8")
    return PictureIndex(index, entries)


@torch.no_grad()
def embed_pictures(pretrained: Pretrained, pixel_values: Tensor) -> Tensor:
    """`[batch, dim]` float32 of unit length, of `[batch, 3, height, width]` uint8."""
    return pretrained.model.get_image_features(pixel_values.to(model_device(pretrained.model))).float()


def embed_texts(pretrained: Pretrained, texts: Sequence[str], batch: int = 64) -> Tensor:
    """`[texts, dim]` float32 of unit length."""
    return encode_own_texts(pretrained.model, pretrained.tokenizer, texts, batch)


def _import_faiss():
    try:
        import faiss
    except ImportError:
        raise UserError("searching needs faiss: pip install faiss-cpu") from None
    return faiss


def _model_digest(pretrained: Pretrained) -> str:
    """Tells one image tower from another by the beginning of each of its tensors."""
    digest = hashlib.sha256()
    for name, tensor in pretrained.model.vision.state_dict().items():
        digest.update(name.encode() + tensor.flatten()[:1024].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _files_digest(sources: Sequence[str]) -> str:
    """Names, sizes and times of the files behind the sources; of a URL only its name."""
    digest = hashlib.sha256()
    for source in sources:
        paths = expand(source) if is_shards(source) else [source]
        for path in paths:
            files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]
            for file in [] if is_remote(path) else files:
                if file.is_file():
                    facts = file.stat()
                    digest.update(f"{file}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()
