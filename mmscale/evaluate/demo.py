"""A local web page to try a model: captions, class scores and nearest pictures of a picture; pictures of a text.

Nothing but the standard library serves it, and it listens on the loopback unless told otherwise.
"""

import base64
import io
import json
import sys
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmscale.data import images
from mmscale.errors import UserError
from mmscale.evaluate.captioning import generate_captions
from mmscale.evaluate.demo_page import DEMO_PAGE
from mmscale.evaluate.encoding import model_device
from mmscale.evaluate.pictures import read_again
from mmscale.evaluate.search import Found, PictureIndex, embed_pictures, embed_texts, open_index
from mmscale.evaluate.zeroshot import DEFAULT_TEMPLATES, class_embeddings
from mmscale.pretrained import Pretrained, load_pretrained

MAX_REQUEST_BYTES = 48 * 1024 * 1024
MAX_NAMES = 200
BEAMS = 4


def demo_command(
    model: str | Path,
    data: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    index: str | Path | None = None,
    tokenizer: str | Path | None = None,
    ema: bool = False,
    device: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serves the page until it is interrupted.

    Args:
        model: a run, a checkpoint or an exported folder.
        data: pictures to search in (files, folders, `.tar` shards); without them there is no search.
        host, port: where to listen; port 0 takes a free one.
        index: a folder for the embeddings; in the user's cache unless given.

    Raises:
        UserError: no such model or data; a port that is taken.
    """
    pretrained = load_pretrained(model, device=device, tokenizer=tokenizer, ema=ema)
    pictures = open_index(pretrained, data, index, say=say) if data else None
    with start_demo(Demo(pretrained, pictures), host, port) as server:
        say(f"open http://{host}:{server.server_port} in a browser; Ctrl-C ends it")
        sys.stdout.flush()  # also where the output goes to a file
        server.serve_forever()


class Demo:
    """What the page asks for, as plain objects ready for JSON. One request at a time uses the model."""

    def __init__(self, pretrained: Pretrained, pictures: PictureIndex | None = None):
        self.pretrained, self.pictures = pretrained, pictures
        self._lock = threading.Lock()

    def about(self) -> dict:
        """The model's name, whether it writes captions, and how many pictures can be searched."""
        model = self.pretrained.model
        return {
            "model": str(self.pretrained.path),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "captions": model.config.decoder_config.layers > 0,
            "pictures": len(self.pictures) if self.pictures else 0,
        }

    def describe(self, request: dict) -> dict:
        """Captions, class scores and nearest pictures of the picture in `image` (base64) or in the index (`place`)."""
        with self._lock:
            pixels = self._pixels(request)
            embeds = embed_pictures(self.pretrained, pixels[None])
            return {
                "image": data_url(pixels),
                "captions": self._captions(pixels),
                "classes": self._classes(embeds, _names(request)),
                "nearest": self._nearest(embeds),
            }

    def search(self, request: dict) -> dict:
        """The pictures nearest to `text`."""
        text = request.get("text")
        if not isinstance(text, str) or not text.strip():
            raise UserError("type what to search for")
        with self._lock:
            return {"nearest": self._nearest(embed_texts(self.pretrained, [text]))}

    def _pixels(self, request: dict) -> Tensor:
        place = request.get("place")
        if isinstance(place, int) and self.pictures and 0 <= place < len(self.pictures):
            entry = self.pictures.entries[place]
            return read_again(entry.source, entry.place, self.pretrained).pixels
        try:
            content = base64.b64decode(request["image"], validate=True)
            pixels = images.decode(content, self.pretrained.data.max_pixels)
        except (KeyError, TypeError, ValueError, images.ImageError) as error:
            raise UserError(f"this is not a picture: {error}") from None
        return torch.from_numpy(images.center_view(pixels, self.pretrained.image_size).copy()).permute(2, 0, 1)

    def _captions(self, pixels: Tensor) -> list[str]:
        model, tokenizer = self.pretrained.model, self.pretrained.tokenizer
        if not model.config.decoder_config.layers:
            return []
        batch = pixels[None].to(model_device(model))
        written = [generate_captions(model, tokenizer, batch, num_beams=beams)[0] for beams in (1, BEAMS)]
        return list(dict.fromkeys(written))

    @torch.no_grad()
    def _classes(self, embeds: Tensor, names: list[str]) -> list[dict]:
        if not names:
            return []
        model = self.pretrained.model
        classes = class_embeddings(model, self.pretrained.tokenizer, names, DEFAULT_TEMPLATES, 64)
        scale, _ = model.logit_scale().unbind()
        shares = (embeds @ classes.T * scale).softmax(dim=1)[0].tolist()
        return sorted(
            ({"name": name, "share": share} for name, share in zip(names, shares, strict=True)),
            key=lambda entry: -entry["share"],
        )

    def _nearest(self, embeds: Tensor, top: int = 12) -> list[dict]:
        found = self.pictures.search(embeds, top)[0] if self.pictures else []
        return [self._answer(answer) for answer in found]

    def _answer(self, answer: Found) -> dict:
        entry = answer.entry
        return {
            "place": answer.row,
            "name": entry.name,
            "caption": entry.caption or "",
            "similarity": answer.similarity,
            "image": data_url(read_again(entry.source, entry.place, self.pretrained).pixels),
        }


def start_demo(demo: Demo, host: str, port: int) -> ThreadingHTTPServer:
    """A server that is listening but not yet serving. Raises UserError when the port is taken."""
    try:
        return ThreadingHTTPServer((host, port), type("Handler", (_Handler,), {"demo": demo}))
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None


def data_url(pixels: Tensor) -> str:
    """uint8 `[3, height, width]` as a PNG that an `<img>` can carry."""
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


class _Handler(BaseHTTPRequestHandler):
    demo: Demo
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if not self._is_meant():
            return
        path = urlsplit(self.path).path
        if path == "/":
            self._send(HTTPStatus.OK, DEMO_PAGE.encode(), "text/html; charset=utf-8")
        elif path == "/api/about":
            self._send_json(HTTPStatus.OK, self.demo.about())
        else:
            self._send_json(HTTPStatus.NOT_FOUND, {"error": "no such page"})

    def do_POST(self) -> None:
        if not self._is_meant():
            return None
        answer = {"/api/describe": self.demo.describe, "/api/search": self.demo.search}.get(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if answer is None or length > MAX_REQUEST_BYTES:
            self.close_connection = True
            status = HTTPStatus.NOT_FOUND if answer is None else HTTPStatus.REQUEST_ENTITY_TOO_LARGE
            return self._send_json(status, {"error": status.phrase})
        body = self.rfile.read(length)
        # Another site's page cannot send this type without asking first, so it cannot use the model behind one's back.
        if self.headers.get_content_type() != "application/json":
            return self._send_json(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, {"error": "send application/json"})
        try:
            request = json.loads(body)
            if not isinstance(request, dict):
                raise UserError("the request is not a JSON object")
            self._send_json(HTTPStatus.OK, answer(request))
        except (UserError, json.JSONDecodeError, UnicodeDecodeError) as error:
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": str(error)})

    def _is_meant(self) -> bool:
        """Refuses a request made under another site's name that was pointed here: that site's page could read it."""
        listening = self.server.server_address[0]
        asked = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if ip_address(listening).is_loopback and asked not in ("localhost", listening):
            self.close_connection = True
            self._send_json(HTTPStatus.FORBIDDEN, {"error": f"this page is at {listening}, not at {asked}"})
            return False
        return True

    def _send_json(self, status: HTTPStatus, content: dict) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header(
            "Content-Security-Policy", "default-src 'self'; img-src data: blob:; style-src 'unsafe-inline'; "
            "script-src 'unsafe-inline'"
        )  # fmt: skip
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass  # a line for every request would bury the address


def _names(request: dict) -> list[str]:
    names = request.get("names") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError("`names` is a list of class names")
    return list(dict.fromkeys(name.strip() for name in names if name.strip()))[:MAX_NAMES]
