"""A hub on the loopback: what a client of the hub needs to create a repository, to upload, to list and to fetch."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote


class FakeHub:
    """Its state: ``commits`` of each repository, each the files after it; ``branches``; what was asked (``requests``).

    A repository in ``private`` is not there for who brings no token.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.private: set[str] = set()
        self.endpoint = ""

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.commits[repo][self.commit(repo, revision)]

    def commit(self, repo: str, revision: str = "main") -> str:
        return self.branches[repo].get(revision, revision)

    def create(self, repo: str) -> None:
        if repo not in self.commits:
            self.commits[repo], self.branches[repo] = {}, {}
            self.upload(repo, "main", {})

    def upload(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        before = self.files(repo, branch) if branch in self.branches[repo] else {}
        after = {**before, **files}
        oid = hashlib.sha1(repr((len(self.commits[repo]), sorted(after))).encode()).hexdigest()
        self.commits[repo][oid], self.branches[repo][branch] = after, oid
        return oid


@contextmanager
def running() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, status: int, body: Any = b"", **headers: str) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def missing(self, code: str) -> None:
            self.reply(404, b"{}", X_Error_Code=code)

        def handle_all(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(self.path.partition("?")[0])
            token = self.headers.get("Authorization")
            hub.requests.append((self.command, path, token))
            if path == "/api/repos/create":
                fields = json.loads(body)
                repo = f"{fields.get('organization') or 'me'}/{fields['name']}"
                hub.create(repo)
                return self.reply(200, {"url": f"{hub.endpoint}/{repo}", "name": repo, "id": repo})
            if path == "/api/validate-yaml":  # of the README
                return self.reply(200, {"errors": [], "warnings": []})
            found = re.match(r"/api/models/([\w-]+/[\w-]+)(?:/(\w+))?(?:/([\w.%-]+))?(?:/(.*))?$", path)
            if found:
                repo, action, revision, folder = found.groups()
                if repo not in hub.commits or (repo in hub.private and not token):
                    return self.missing("RepoNotFound")
                return self.model(repo, action, revision or "main", folder, body)
            found = re.match(r"/([\w-]+/[\w-]+)/resolve/([\w.-]+)/(.*)$", path)
            if found and (found[1] not in hub.private or token):
                return self.file(*found.groups())
            return self.missing("RepoNotFound")

        def model(self, repo: str, action: str | None, revision: str, folder: str | None, body: bytes) -> None:
            if action == "preupload":
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return self.reply(200, {"files": files})
            if action == "commit":
                lines = [json.loads(line) for line in body.splitlines()]
                files = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                oid = hub.upload(repo, revision, files)
                return self.reply(
                    200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.endpoint}/{repo}/commit/{oid}"}
                )
            if action == "branch":
                hub.branches[repo].setdefault(revision, hub.commit(repo))
                return self.reply(200, {})
            commit = hub.commit(repo, revision)
            if commit not in hub.commits[repo]:
                return self.missing("RevisionNotFound")
            if action == "tree":
                inside = f"{folder}/" if folder else ""
                files = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in sorted(hub.commits[repo][commit].items())
                    if name.startswith(inside)
                ]
                return self.reply(200, files) if files or not folder else self.missing("EntryNotFound")
            siblings = [{"rfilename": name} for name in sorted(hub.commits[repo][commit])]
            return self.reply(200, {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []})

        def file(self, repo: str, revision: str, name: str) -> None:
            if repo not in hub.commits:
                return self.missing("RepoNotFound")
            commit = hub.commit(repo, revision)
            if commit not in hub.commits[repo]:
                return self.missing("RevisionNotFound")
            content = hub.commits[repo][commit].get(name)
            if content is None:
                return self.missing("EntryNotFound")
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.reply(200, content, ETag=etag, X_Repo_Commit=commit)

        do_GET = do_HEAD = do_POST = handle_all

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
