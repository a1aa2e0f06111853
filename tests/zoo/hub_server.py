"""A server that speaks as much of the Hugging Face hub as its client needs to fetch and to upload a network."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

__all__ = ["Hub"]


class Hub(ThreadingHTTPServer):
    """Repositories by name; each is a folder of files with one revision.

    Args:
        folder: Where repositories lie that are uploaded.
        repositories: Folders that are served beside them, by name.
    """

    daemon_threads = True

    def __init__(self, folder: Path, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder, self.repositories = folder, dict(repositories)
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, daemon=True).start()

    def revision(self, name: str) -> str:
        """The one commit of a repository: a hash of its files."""
        digest = hashlib.sha1(name.encode())
        for file in sorted(self.repositories[name].iterdir()):
            digest.update(file.read_bytes())
        return digest.hexdigest()


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, status: int, content: object = None, body: bool = True, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        hub = self.server
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in hub.repositories:
            name = "/".join(parts[2:4])
            files = [{"rfilename": file.name} for file in hub.repositories[name].iterdir()]
            self._answer(200, {"id": name, "sha": hub.revision(name), "siblings": files}, body)
            return
        name = "/".join(parts[:2])
        if len(parts) < 5 or parts[2] != "resolve" or name not in hub.repositories:
            self._answer(404, {"error": "Repository not found"}, body, X_Error_Code="RepoNotFound")
            return
        file = hub.repositories[name] / "/".join(parts[4:])
        if not file.is_file():
            self._answer(404, {"error": "Entry not found"}, body, X_Error_Code="EntryNotFound")
            return
        content = file.read_bytes()
        tag = f'"{hashlib.sha1(content).hexdigest()}"'
        self._answer(200, content, body, ETag=tag, X_Repo_Commit=hub.revision(name))

    def do_POST(self) -> None:
        hub, parts = self.server, urlsplit(self.path).path.strip("/").split("/")
        content = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if parts == ["api", "repos", "create"]:
            given = json.loads(content)
            name = f"{given['organization']}/{given['name']}"
            known = name in hub.repositories
            if not known:
                hub.repositories[name] = hub.folder / name
                hub.repositories[name].mkdir(parents=True)
            self._answer(409 if known else 200, {"url": f"{hub.url}/{name}", "name": name})
        elif parts == ["api", "validate-yaml"]:
            self._answer(200, {"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            files = [file["path"] for file in json.loads(content)["files"]]
            self._answer(200, {"files": [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif parts[4] == "commit":
            name = "/".join(parts[2:4])
            for line in content.splitlines():
                part = json.loads(line)
                if part["key"] == "file":
                    file = hub.repositories[name] / part["value"]["path"]
                    file.write_bytes(base64.b64decode(part["value"]["content"]))
            revision = hub.revision(name)
            self._answer(200, {"commitUrl": f"{hub.url}/{name}/commit/{revision}", "commitOid": revision})
        else:
            self._answer(404, {"error": self.path})
