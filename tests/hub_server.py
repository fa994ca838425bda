"""A stand-in of the Hub's HTTP API on loopback: repositories, large files by LFS, commits. Enough to upload to,
and to read data sets from."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubServer:
    """Keeps what is uploaded. `broken_after` large files, uploads fail once with a dropped connection.

    Attributes:
        repos: name -> the request that made it.
        files: (repository, path) -> content that was committed.
        objects: sha256 -> content of large files, committed or not.
        uploads: sha256 of every large file that was sent, in order.
        requests: (offset, bytes) of every piece of a data set's file that was sent.
        digests: (repository, path) -> the digest that is told of a file in place of its own.
        tokens: what callers authorised themselves with.
    """

    def __init__(self, broken_after: int | None = None):
        self.repos, self.files, self.objects = {}, {}, {}
        self.uploads, self.tokens, self.requests, self.digests = [], set(), [], {}
        self.broken_after = broken_after
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        if found := re.fullmatch(r"/api/datasets/(.+)/tree/[^/?]+/?([^?]*)(?:\?.*)?", self.path):
            return self._answer([self._entry(name) for name in self.hub.files if name[0] == found[1]])
        if found := re.fullmatch(r"/datasets/(.+)/resolve/[^/]+/(.+)", self.path):
            return self._send_file(self.hub.files.get((found[1], found[2])))
        self._answer({"id": "me/data", "sha": "0" * 40, "siblings": []})

    def _entry(self, name: tuple[str, str]) -> dict:
        content = self.hub.files[name]
        digest = self.hub.digests.get(name, hashlib.sha256(content).hexdigest())
        lfs = {"oid": digest, "size": len(content), "pointerSize": 130}
        return {"type": "file", "path": name[1], "size": len(content), "oid": "2" * 40, "lfs": lfs}

    def _send_file(self, content: bytes | None):
        if content is None:
            return self._answer({"error": "Entry not found"}, status=404)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin, end = (int(wanted[1]), int(wanted[2] or len(content) - 1)) if wanted else (0, len(content) - 1)
        part = content[begin : end + 1]
        self.hub.requests.append((begin, len(part)))
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Range", f"bytes {begin}-{begin + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        digest = hashlib.sha256(content).hexdigest()
        if self.hub.broken_after is not None and len(self.hub.uploads) >= self.hub.broken_after:
            return self._answer({"error": "the disk of the stand-in is full"}, status=400)
        assert self.path.endswith(digest)
        self.hub.uploads.append(digest)
        self.hub.objects[digest] = content
        return self._answer({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization', 'me')}/{request['name']}"
            self.hub.repos.setdefault(name, request)
            return self._answer({"url": f"{self.hub.url}/{name}", "id": name, "name": name})
        if path.endswith("/objects/batch"):
            return self._answer(
                {"transfer": "basic", "objects": [self._instruct(o) for o in json.loads(body)["objects"]]}
            )
        if "/preupload/" in path:
            files = [self._mode(file) for file in json.loads(body)["files"]]
            return self._answer({"files": files})
        if "/commit/" in path:
            return self._commit(path.split("/")[3:5], body)
        return self._answer({})

    def _instruct(self, wanted: dict) -> dict:
        if wanted["oid"] in self.hub.objects:
            return wanted  # without an action: it is here
        return wanted | {"actions": {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}", "header": {}}}}

    def _mode(self, file: dict) -> dict:
        large = file["path"].endswith((".safetensors", ".model"))
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _commit(self, owner_and_name: list[str], body: bytes):
        repo = "/".join(owner_and_name)
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.files[repo, value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.files[repo, value["path"]] = self.hub.objects[value["oid"]]
        return self._answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def _answer(self, content: dict, status: int = 200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
