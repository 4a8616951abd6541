"""A stand-in for the Hugging Face Hub on this machine: what an upload asks of it, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_secretsecretsecret"


@dataclass
class Repository:
    """One model repository."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


class FakeHub(ThreadingHTTPServer):
    """Repositories by name, and large files by digest."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.refuse_writing = False

    @property
    def address(self) -> str:
        """For ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if not self._known():
            self._answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/whoami-v2":
            self._answer({"type": "user", "name": "tester", "fullname": "", "orgs": [], "auth": {}})
        elif path.startswith("/api/models/"):
            owner, name, *more = path.removeprefix("/api/models/").split("/")
            repository = self.server.repositories.get(f"{owner}/{name}")
            if repository is None:
                self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            elif more[:1] == ["tree"]:
                listed = [{"type": "file", "path": each, "size": 1, "oid": "0"} for each in repository.files]
                self._answer(listed)
            else:
                siblings = [{"rfilename": each} for each in repository.files]
                self._answer({"id": f"{owner}/{name}", "sha": "0" * 40, "siblings": siblings, "private": True})
        else:
            self._answer({"error": f"no {path}"}, 404)

    def do_POST(self) -> None:
        path, body = self.path.split("?")[0], self._body()
        if not self._known():
            self._answer({"error": "Invalid credentials"}, 401)
        elif self.server.refuse_writing:
            self._answer({"error": f"{TOKEN} has no write permission"}, 403)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.server.repositories[name] = Repository(private)
            self._answer({"url": f"{self.server.address}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            self._answer({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.address}/blobs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit("/".join(path.removeprefix("/api/models/").split("/")[:2]), body)
        else:
            self._answer({"error": f"no {path}"}, 404)

    def do_PUT(self) -> None:
        content = self._body()
        digest = self.path.rsplit("/", 1)[-1]
        assert hashlib.sha256(content).hexdigest() == digest
        self.server.blobs[digest] = content
        self._answer({})

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.server.repositories[name]
        repository.commits += 1
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.blobs[value["oid"]]
        commit = f"{self.server.address}/{name}/commit/{'0' * 40}"
        self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": commit, "hookOutput": ""})
