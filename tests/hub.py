"""A hub on this machine, with faults: it speaks as much of the hub's protocol as its clients ask for."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class Hub:
    """A server of repositories; use it as a context.

    Attributes:
        files: repository, such as "owner/name" or "datasets/owner/name" -> name of a file -> its bytes.
        asked: the requests so far, such as "GET /owner/name/resolve/main/config.json".
        status, code: how it refuses each request; with 0 it answers.
        silent: whether it says nothing at all.
        sent: name of a file -> the bytes that come in its place; the hash stated is that of `files`.
        cut: name of a file -> after how many bytes the connection breaks, each time anew.
        stuck: name of a file -> from which byte on it sends nothing.
        page: what it answers instead, as the page of a hotel's network would.
    """

    def __init__(self):
        self.files, self.asked, self.port, self.released = {}, [], 0, threading.Event()
        self.heal()

    def open(self):
        """Serve, on the same port as before."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.port = self.server.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self):
        """Refuse connections from now on."""
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def heal(self):
        """Take all faults away."""
        self.released.set()
        self.released = threading.Event()
        self.status, self.code, self.silent, self.page = 0, "", False, b""
        self.sent, self.cut, self.stuck = {}, {}, {}
        self.asked.clear()

    def __enter__(self):
        self.open()
        return self

    def __exit__(self, *_):
        self.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        always = {"Content-Length": len(body), "X-Repo-Commit": COMMIT, "Connection": "close"}
        for name, value in {**always, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path}")
        if hub.silent:
            hub.released.wait()
            self.close_connection = True
        elif hub.page:
            self.answer(200, hub.page, Content_Type="text/html")
        elif hub.status:
            self.answer(hub.status, b"", X_Error_Code=hub.code, **({"Retry_After": 7} if hub.status == 429 else {}))
        elif found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.file(*found.groups())
        elif found := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(revision|tree)/.+)?", path):
            self.about(found[1].removeprefix("models/"), found[2])
        else:
            self.answer(404)

    do_HEAD = do_GET

    def about(self, repository, kind):
        if (files := self.hub.files.get(repository)) is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if kind == "tree":
            found = [{"type": "file", "path": n, "size": len(b), "oid": digest(n, b)} for n, b in files.items()]
        else:
            name = repository.removeprefix("datasets/")
            found = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

    def file(self, repository, name):
        hub, files = self.hub, self.hub.files.get(repository)
        if files is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if name not in files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        body = files[name]
        stated = {"ETag": f'"{digest(name, body)}"', "Accept_Ranges": "bytes"}
        if large(name):
            stated |= {"X_Linked_ETag": stated["ETag"], "X_Linked_Size": len(body)}
        if self.command == "HEAD":
            return self.answer(200, body, **stated)
        body, status, start = hub.sent.get(name, body), 200, 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
            if start >= len(body):
                return self.answer(416)
            stated["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, status = body[start:], 206
        limit = hub.cut.get(name, max(0, hub.stuck.get(name, start + len(body)) - start))
        if limit >= len(body):
            return self.answer(status, body, **stated)
        self.answer(status, b"", **{**stated, "Content-Length": len(body)})
        self.wfile.write(body[:limit])
        self.wfile.flush()
        if name in hub.stuck:
            hub.released.wait()


def large(name):
    """Whether the hub would keep a file outside git."""
    return not name.endswith((".json", ".md", ".txt"))


def digest(name, body):
    """How the hub names a file: by its SHA-256, or as git does."""
    if large(name):
        return hashlib.sha256(body).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
