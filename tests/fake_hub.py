"""A hub on this machine, for what is published: it takes commits to repositories and keeps their files."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "w" * 20


class FakeHub:
    """Files by repository and name. `asked` lists the requests."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, Any] = {}
        self.asked: list[str] = []
        self.url = ""

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """``(status, JSON)``."""
        path = path.partition("?")[0]
        self.asked.append(f"{method} {path}")
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        match path.strip("/").split("/"):
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                if name in self.repos:
                    return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
                self.repos[name], self.private[name] = {}, asked.get("visibility") == "private" or asked.get("private")
                return 200, {"url": f"{self.url}/{name}", "name": name}
            case ["api", "validate-yaml"]:
                return 200, {"errors": [], "warnings": []}
            case ["api", "models", _, _, "preupload", _]:
                names = [file["path"] for file in json.loads(body)["files"]]
                return 200, {"files": [{"path": x, "uploadMode": "regular", "shouldIgnore": False} for x in names]}
            case ["api", "models", owner, name, "commit", _]:
                for line in body.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        content = base64.b64decode(entry["value"]["content"])
                        self.repos[f"{owner}/{name}"][entry["value"]["path"]] = content
                url = f"{self.url}/{owner}/{name}/commit/{'0' * 40}"
                return 200, {"success": True, "commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""}
            case ["api", "models", owner, name, *_]:
                return 200, {"id": f"{owner}/{name}", "sha": "0" * 40, "siblings": [], "xetEnabled": False}
        return 404, {"error": "nothing there"}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Context in which a fake hub answers on 127.0.0.1."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            body = self._body()
            status, content = hub.answer(self.command, self.path, body, self.headers.get("Authorization", ""))
            answer = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            if "error" in content:
                self.send_header("X-Error-Message", content["error"])
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = respond

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
