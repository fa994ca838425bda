"""Fetching remote shards before they are read."""

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from mmscale.data.recent import Recent

logger = logging.getLogger(__name__)

THREADS = 8
REMEMBERED = 8192


class Prefetch:
    """Calls `fetch(shard)` in the background for shards that will be wanted, each once."""

    def __init__(self, fetch: Callable[[int], object]):
        self._fetch = fetch
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="prefetch")
        self._asked: Recent[bool] = Recent(REMEMBERED)

    def want(self, shards: Iterable[int]) -> None:
        for shard in shards:
            if self._asked.get(shard) is None:
                self._asked.put(shard, True)
                self._pool.submit(self._try, shard)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _try(self, shard: int) -> None:
        try:
            self._fetch(shard)
        except Exception as error:  # whoever reads the shard meets the error again, and says so
            logger.debug("shard %d: %s", shard, error)
