"""Servers of the tests on this machine; among them a Hugging Face hub, for the real
libraries: of its HTTP interface, what loading data sets needs.
"""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Files = Mapping[str, bytes]
# By id, then by revision: 'main', 'refs/convert/parquet', 'refs/pr/1'.
Repositories = Mapping[str, Mapping[str, Files]]


def commit_of(repository: str, revision: str) -> str:
    """The full hash of a revision."""
    return _digest(f"{repository}@{revision}".encode())


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def listening(handler: Callable[..., Any]) -> Iterator[str]:
    """The address of a server whose requests go to instances of `handler`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def hub(repositories: Repositories) -> Callable[..., Any]:
    """The handler of a hub that has these; its address is for HF_ENDPOINT."""
    return type("Hub", (_Hub,), {"repositories": repositories})


class _Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Repositories

    def do_GET(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        content = None
        for pattern, answer in _ROUTES.items():
            if found := re.fullmatch(pattern, path):
                words = [urllib.parse.unquote(word or "") for word in found.groups()]
                content = getattr(self, answer)(*words)
        if content is None:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        if isinstance(content, tuple):
            return self._send_file(*content)
        return self._send(200, json.dumps(content).encode(), {})

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    # ---- what is there

    def _revision(self, repository: str, asked: str) -> tuple[str, Files] | None:
        """Hash and files of a revision that is asked for by name or full hash."""
        for name, files in self.repositories.get(repository, {}).items():
            commit = commit_of(repository, name)
            if asked in (name, commit):
                return commit, files
        return None

    def _info(self, repository: str, revision: str = "main") -> Any:
        found = self._revision(repository, revision)
        if found is None:
            return None
        siblings = [{"rfilename": path} for path in found[1]]
        return {"id": repository, "sha": found[0], "siblings": siblings, "tags": []}

    def _tree(self, repository: str, revision: str, folder: str) -> Any:
        """Entries of a folder; with `recursive` also of those below."""
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        is_deep = query.get("recursive", ["false"])[0].lower() == "true"
        prefix = f"{folder}/" if folder else ""
        found = self._revision(repository, revision)
        entries: dict[str, Any] = {}
        for path, content in found[1].items() if found else ():
            if not path.startswith(prefix):
                continue
            *folders, _ = path.removeprefix(prefix).split("/")
            depth = len(folders) if is_deep else min(len(folders), 1)
            for number in range(1, depth + 1):
                name = prefix + "/".join(folders[:number])
                entries[name] = {"type": "directory", "path": name, "oid": "0"}
            if is_deep or not folders:
                entries[path] = {
                    "type": "file",
                    "path": path,
                    "size": len(content),
                    "oid": _digest(content),
                }
        return list(entries.values()) or None

    def _refs(self, repository: str) -> Any:
        names = self.repositories.get(repository, {})
        refs = [
            {"name": name, "ref": name, "targetCommit": commit_of(repository, name)}
            for name in names
        ]
        return {
            "branches": [ref for ref in refs if ref["name"] == "main"],
            "converts": [ref for ref in refs if "refs/convert" in ref["name"]],
            "tags": [],
            "pullRequests": [ref for ref in refs if "refs/pr" in ref["name"]],
        }

    def _commits(self, repository: str, revision: str) -> Any:
        """The hashes of all revisions."""
        about = {"message": "", "authors": [], "date": "2024-01-01T00:00:00.000Z"}
        return [
            {"id": commit_of(repository, name), "title": name, **about}
            for name in self.repositories.get(repository, {})
        ]

    def _file(
        self, repository: str, revision: str, path: str
    ) -> tuple[str, bytes] | None:
        """Its commit and content."""
        commit, files = self._revision(repository, revision) or ("", {})
        return (commit, files[path]) if path in files else None

    # ---- answers

    def _send_file(self, commit: str, content: bytes) -> None:
        headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": commit}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, content, headers)
        start, last = int(asked[1]), int(asked[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
        return self._send(206, content[start : last + 1], headers)

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


_API = "/api/datasets/([^/]+/[^/]+)"
_ROUTES = {
    _API: "_info",
    f"{_API}/revision/([^/]+)": "_info",
    f"{_API}/tree/([^/]+)(?:/(.*))?": "_tree",
    f"{_API}/refs": "_refs",
    f"{_API}/commits/([^/]+)": "_commits",
    "/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.*)": "_file",
}
