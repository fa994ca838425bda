"""Progress of long work: a bar on a terminal, a plain line now and then otherwise."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

LINE_EVERY_S = 10.0


def track(items: Iterable[Item], total: int | None, what: str) -> Iterator[Item]:
    """Passes the items through; `total` is None where it is not known. Work that ends within a moment says nothing."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as bar

        yield from bar(items, what, total=total, console=Console(stderr=True), transient=True)
        return
    last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last > LINE_EVERY_S:
            last = time.monotonic()
            of = "" if total is None else f" of {total:,}"
            print(f"{what}: {done:,}{of}", file=sys.stderr, flush=True)
