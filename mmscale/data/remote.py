"""Reading a file from http(s)://, or through fsspec from s3://, gs://, hf:// and its other schemes, from any offset."""

import base64
import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import fsspec

from mmscale.errors import UserError

REQUEST = 8 << 20  # bytes that are asked for at once where a file is read by ranges
STALL_S = 30.0  # a source that sends nothing for so long is taken for dead
_VERSIONS = ("ETag", "etag", "md5Hash", "mtime", "blob_id")  # S3, Google, sftp and the like, the Hub
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class RemoteError(Exception):
    """A transfer that failed. `final`: another try cannot help."""

    def __init__(self, reason: str, final: bool = False):
        super().__init__(reason)
        self.final = final


@dataclass
class Remote:
    """An open remote file that reads from `offset` on.

    size, checksum (hashlib's name of it, hex) and version (what changes with the content) are those of the whole, None
    where the source is silent.
    """

    offset: int
    size: int | None
    checksum: tuple[str, str] | None
    version: str | None
    file: BinaryIO

    def chunks(self, size: int) -> Iterator[bytes]:
        """Raises RemoteError."""
        try:
            while chunk := self.file.read(size):
                yield chunk
        except Exception as error:  # each filesystem has its own
            raise RemoteError(f"the transfer broke off: {str(error) or type(error).__name__}") from None


@contextmanager
def open_remote(url: str, offset: int = 0, version: str | None = None) -> Iterator[Remote]:
    """Opens a URL at `offset`, or at 0 where the source cannot start there or is no longer of that version.

    Raises RemoteError, UserError.
    """
    if version is None:
        offset = 0
    if url.startswith(("http://", "https://")):
        remote = _open_http(url, offset, version)
    else:
        remote = _open_fsspec(url, offset, version)
    try:
        yield remote
    finally:
        remote.file.close()


def _open_http(url: str, offset: int, version: str | None) -> Remote:
    request = urllib.request.Request(url, headers={"User-Agent": "mmscale", "Accept-Encoding": "identity"})
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        request.add_header("If-Range", version)
    try:
        response = urllib.request.urlopen(request, timeout=STALL_S)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # nothing lies after what is there already: begin again
                return _open_http(url, 0, None)
            final = 400 <= error.code < 500 and error.code not in (408, 425, 429)
            raise RemoteError(f"the server answered {error.code} {error.reason}", final) from None
    except (OSError, http.client.HTTPException) as error:
        raise RemoteError(f"no answer: {getattr(error, 'reason', error)}") from None
    headers = response.headers
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "")) if response.status == 206 else None
    if found:
        start, size = int(found[1]), None if found[2] == "*" else int(found[2])
    else:
        start, size = 0, int(headers["Content-Length"]) if headers.get("Content-Length", "").isdigit() else None
    version = headers.get("ETag") or headers.get("Last-Modified")
    return Remote(start, size, None if found else _http_checksum(headers), version, response)


def _http_checksum(headers: http.client.HTTPMessage) -> tuple[str, str] | None:
    """The MD5 of a whole body, from `Content-MD5` or Google's `x-goog-hash`."""
    encoded = headers.get("Content-MD5")
    for value in headers.get_all("x-goog-hash") or []:
        for item in value.split(","):
            if item.strip().startswith("md5="):
                encoded = item.strip()[4:]
    try:
        return ("md5", base64.b64decode(encoded, validate=True).hex()) if encoded else None
    except ValueError:
        return None


def _open_fsspec(url: str, offset: int, version: str | None) -> Remote:
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: reading it needs another package: {error}") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None
    try:
        facts = filesystem.info(path)
        file = filesystem.open(path, "rb", block_size=REQUEST, cache_type="readahead")
        current = next((str(facts[name]) for name in _VERSIONS if facts.get(name)), None)
        file.seek(offset if current == version and offset <= facts["size"] else 0)
    except FileNotFoundError:
        raise RemoteError("there is no such file", final=True) from None
    except Exception as error:  # each filesystem has its own
        final = isinstance(error, PermissionError)
        raise RemoteError(f"it cannot be opened: {' '.join(str(error).split())[:200]}", final) from None
    return Remote(file.tell(), facts["size"], _fsspec_checksum(facts), current, file)


def _fsspec_checksum(facts: dict) -> tuple[str, str] | None:
    """S3's ETag of an object that was put in one piece, Google's md5Hash, or the Hub's name of a large file."""
    etag = str(facts.get("ETag", "")).strip('"')  # of several pieces: digest-number
    if re.fullmatch(r"[0-9a-f]{32}", etag):
        return "md5", etag
    if facts.get("md5Hash"):
        return "md5", base64.b64decode(facts["md5Hash"]).hex()
    return ("sha256", facts["lfs"]["sha256"]) if facts.get("lfs") else None
