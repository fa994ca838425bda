"""A sample's captions: which member or JSON field they come from, and what makes one unusable."""

import json

from mmscale.config import Paths


class SampleError(Exception):
    """A sample that cannot be used; the message is the reason."""


class CaptionFields:
    """The fields that data.text_key names.

    An entry is a member (`txt`), a field of the JSON (`json.caption`, a text or a list of texts), or alternatives of
    these, the first that is there (`txt;json.caption`). Of several entries each sample's caption is drawn from one.
    """

    def __init__(self, text_key: Paths, max_bytes: int):
        entries = [text_key] if isinstance(text_key, str) else text_key
        self._fields = [[part.strip() for part in entry.split(";")] for entry in entries]
        self._max_bytes = max_bytes
        self.kinds = {"json" if _is_json(part) else part.lower() for field in self._fields for part in field}

    def read(self, parts: dict[str, bytes], record: dict) -> list[list[str]]:
        """Of each field that has any, its texts. Raises SampleError when no field has a usable one."""
        found, reasons = [], []
        for field in self._fields:
            try:
                texts = self._texts(field, parts, record)
            except SampleError as error:
                reasons.append(error)
            else:
                found += [texts] if texts else []
        if not found:
            raise reasons[0] if reasons else SampleError("the sample has no caption")
        return found

    def _texts(self, field: list[str], parts: dict[str, bytes], record: dict) -> list[str]:
        for key in field:
            if _is_json(key):
                value = record
                for name in key.split(".")[1:]:
                    value = value.get(name) if isinstance(value, dict) else None
                encoded = [
                    text.encode("utf-8", "surrogatepass")
                    for text in (value if isinstance(value, list) else [value])
                    if isinstance(text, str)
                ]
            else:
                encoded = [parts[key.lower()]] if key.lower() in parts else []
            if encoded:
                return [self._checked(text) for text in encoded]
        return []

    def _checked(self, encoded: bytes) -> str:
        if len(encoded) > self._max_bytes:
            raise SampleError(
                f"the caption has {len(encoded):,} bytes, more than data.max_caption_bytes ({self._max_bytes:,})"
            )
        try:
            text = encoded.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise SampleError("the caption is not UTF-8") from None
        if not text:
            raise SampleError("the caption is empty")
        return text


def json_object(data: bytes) -> dict:
    """A .json member as a dictionary, empty for other JSON values. Raises SampleError."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise SampleError("the .json member is not JSON") from None
    return value if isinstance(value, dict) else {}


def _is_json(key: str) -> bool:
    return key.startswith("json.")
