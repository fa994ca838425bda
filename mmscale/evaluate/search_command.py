"""What `mmscale search` does: pictures for a text, or for another picture."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmscale.data.paths import is_remote
from mmscale.evaluate.page import cards, page
from mmscale.evaluate.pictures import batched, read_again, read_pictures
from mmscale.evaluate.search import Found, embed_pictures, embed_texts, open_index
from mmscale.pretrained import Pretrained, load_pretrained


def search_command(
    model: str | Path,
    queries: Sequence[str],
    data: Sequence[str],
    *,
    top: int = 10,
    index: str | Path | None = None,
    html: str | Path | None = None,
    batch: int = 64,
    tokenizer: str | Path | None = None,
    ema: bool = False,
    device: str | None = None,
    say: Callable[[str], None] = print,
) -> list[list[Found]]:
    """Finds the pictures nearest to each query.

    Args:
        model: a run, a checkpoint or an exported folder.
        queries: texts; or pictures, given as files or URLs.
        data: image files, folders, URLs and `.tar` shards to search in.
        top: how many pictures of each.
        index: a folder for the embeddings; in the user's cache unless given.
        html: a file for a page with the pictures.
        batch: pictures at a time while the index is built.
        say: takes lines for people.

    Raises:
        UserError: no such model or data; faiss is not installed.
    """
    pretrained = load_pretrained(model, device=device, tokenizer=tokenizer, ema=ema)
    pictures = open_index(pretrained, data, index, batch, say)
    say(f"{len(pictures):,} pictures")
    results = [pictures.search(_embed(pretrained, query), top)[0] for query in queries]
    for query, found in zip(queries, results, strict=True):
        table = Table("similarity", "picture", "caption", title=query, title_justify="left")
        for answer in found:
            table.add_row(f"{answer.similarity:.3f}", answer.entry.name, answer.entry.caption or "")
        Console().print(table)
    if html is not None:
        sections = [_section(pretrained, query, found) for query, found in zip(queries, results, strict=True)]
        Path(html).write_text(page(f"Nearest of {len(pictures):,} pictures", *sections), encoding="utf-8")
    return results


def is_picture(query: str) -> bool:
    """Whether a query is a picture: a file that is there, or a URL."""
    return is_remote(query) or Path(query).is_file()


def _embed(pretrained: Pretrained, query: str):
    if not is_picture(query):
        return embed_texts(pretrained, [query])
    _, pixel_values = next(batched(read_pictures([query], pretrained), 1))
    return embed_pictures(pretrained, pixel_values)


def _section(pretrained: Pretrained, query: str, found: Sequence[Found]) -> str:
    entries = []
    for answer in found:
        lines = [("", f"{answer.similarity:.3f}"), ("", answer.entry.caption or ""), ("muted", answer.entry.name)]
        entries.append((read_again(answer.entry.source, answer.entry.place, pretrained).pixels, lines))
    return cards(query, entries)
