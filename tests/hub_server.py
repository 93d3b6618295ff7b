"""A small Hub in memory on 127.0.0.1, for clients that are the real ones: what huggingface_hub, transformers and
datasets ask of the Hub when they download and upload models and data sets, and no more.

    with HubServer() as hub:
        hub.add_repository("me/model", {"config.json": b"{}"})
        subprocess.run([...], env=hub.environment(tmp_path / "home"))

A repository is a list of commits, and a commit a dictionary of files. Large files travel as on the Hub: announced to
`objects/batch`, put beside the repositories by their SHA-256, and made visible by the commit that names them.
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.utils.sha import git_hash


LFS_PATTERNS = ("*.safetensors", "*.parquet", "*.bin", "*.arrow", "*.onnx")
LFS_SIZE = 10 * 1024**2
WRITER, READER = "hf_writer", "hf_reader"
WRITER_NAME = "me"


class Commit(NamedTuple):
    sha: str
    files: dict[str, bytes]
    message: str


@dataclass
class Repository:
    """`branches` and `tags` are names to commits; `lfs` the paths that were uploaded as large files."""

    id: str
    kind: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], message: str, branch: str = "main") -> Commit:
        made = Commit(secrets.token_hex(20), dict(files), message)
        self.commits[made.sha] = made
        self.branches[branch] = made.sha
        return made

    def at(self, revision: str) -> Commit | None:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(sha)

    @property
    def head(self) -> Commit:
        return self.commits[self.branches["main"]]


@dataclass
class Cut:
    """Cut the connection `times` times: after so many bytes of a body, or (None) after the work, before the answer."""

    method: str
    path: str
    after: int | None
    times: int


class HubError(Exception):
    """An answer that is not 200. By its code, such as EntryNotFound, and its headers clients know what it means."""

    def __init__(
        self, status: HTTPStatus, message: str, code: str = "", headers: Mapping[str, str] = {}, **more: str
    ) -> None:
        """more: said in the body beside the message"""
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}
        self.body = {"error": message, **more}


class ConnectionCut(Exception):
    """The connection is to end here, in the middle."""


def is_lfs(path: str, size: int) -> bool:
    return size > LFS_SIZE or any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)


def described(path: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub lists it. The oid of a large one is that of a pointer to it."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
    if is_lfs(path, len(content)):
        sha256 = hashlib.sha256(content).hexdigest()
        entry |= {"oid": git_hash(sha256.encode())}
        entry |= {"lfs": {"oid": sha256, "size": len(content), "pointerSize": 134}}
    return entry


def metadata_of(card: str) -> dict[str, Any]:
    """The YAML at the head of a card."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    metadata = yaml.safe_load(match[1]) if match else {}
    if not isinstance(metadata, dict):
        raise ValueError("not a mapping")
    return metadata


def task_of(files: Mapping[str, bytes]) -> str | None:
    """What `pipeline` does with a model: what its card says, or else the head that it was saved with."""
    if tag := metadata_of(files.get("README.md", b"").decode()).get("pipeline_tag"):
        return tag
    architecture = (json.loads(files.get("config.json", b"{}")).get("architectures") or [""])[0]
    tasks = {"ForSequenceClassification": "text-classification", "ForMaskedLM": "fill-mask"}
    return next((task for suffix, task in tasks.items() if architecture.endswith(suffix)), None)


class HubServer:
    """Repositories, the users that may do something with them, and the thread that serves them.

    `requests` holds "METHOD /path" of all that was asked, and `unknown` what was asked in vain since the server does
    not know the address.
    """

    def __init__(self) -> None:
        # Token to the user's name and role.
        self.users = {WRITER: (WRITER_NAME, "write"), READER: (WRITER_NAME, "read"), "hf_other": ("other", "write")}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.cuts: list[Cut] = []
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.lock = Lock()
        self._http: ThreadingHTTPServer | None = None

    # Starting and stopping

    def start(self) -> "HubServer":
        hub = self

        class Handler(HubHandler):
            server_hub = hub

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        if self._http:
            self._http.shutdown()
            self._http.server_close()

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        assert self._http, "start the server first"
        return f"http://127.0.0.1:{self._http.server_port}"

    def environment(self, home: Path, token: str | None = WRITER, **more: str) -> dict[str, str]:
        """Of a client process that knows no other Hub and keeps everything in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
        return kept | own | ({"HF_TOKEN": token} if token else {}) | more

    # What a test prepares and looks at

    def add_repository(
        self, repo_id: str, files: Mapping[str, bytes] | Path, kind: str = "model", private: bool = False
    ) -> Repository:
        """A repository with one commit. files: contents by path, or a folder to take all files of."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        repository = self.repositories[kind, repo_id] = Repository(repo_id, kind, private)
        repository.commit(files, "initial commit")
        return repository

    def repository(self, repo_id: str, kind: str = "model") -> Repository:
        return self.repositories[kind, repo_id]

    def cut(self, method: str, path: str, after: int | None, times: int = 1) -> Cut:
        """Let requests die `times` times whose path holds `path`, a regular expression; see `Cut`."""
        cut = Cut(method, path, after, times)
        self.cuts.append(cut)
        return cut

    def next_cut(self, method: str, path: str) -> Cut | None:
        with self.lock:
            for cut in self.cuts:
                if cut.times > 0 and cut.method == method and re.search(cut.path, path):
                    cut.times -= 1
                    return cut
        return None


# A repository's address in the interface, and the kinds by their names there.
API = r"/api/(?P<kinds>models|datasets)/(?P<repo>[^/]+/[^/]+)"
GIT = r"/(?P<kinds>datasets/)?(?P<repo>[^/]+/[^/]+)"


class HubHandler(BaseHTTPRequestHandler):
    """One connection. Each method named in `ROUTES` answers one address; it returns what is sent as JSON, or None."""

    protocol_version = "HTTP/1.1"
    server_hub: HubServer
    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("GET", API + r"(?:/revision/(?P<revision>[^/]+))?", "describe"),
        ("GET", API + r"/refs", "references"),
        ("GET", API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("POST", API + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("POST", API + r"/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", API + r"/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", API + r"/tag/(?P<revision>[^/]+)", "tag"),
        ("POST", GIT + r"\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("GET", GIT + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("HEAD", GIT + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def log_message(self, *_: object) -> None:
        """Tests look at `HubServer.requests` instead."""

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.query = {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query).items()}
        self.server_hub.requests.append(f"{self.command} {path}")
        self._cut = self.server_hub.next_cut(self.command, path)
        try:
            self.body = self._read_body()
            answer = self._route(urlsplit(self.path).path)
            if self._cut and self._cut.after is None:
                raise ConnectionCut
            if answer is not None:
                self._send(HTTPStatus.OK, {"Content-Type": "application/json"}, json.dumps(answer).encode())
        except HubError as error:
            headers = {"Content-Type": "application/json", **error.headers}
            self._send(error.status, headers, json.dumps(error.body).encode())
        except (ConnectionCut, ConnectionError):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _route(self, path: str) -> Any:
        for method, pattern, name in self.ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                answer: Callable[..., Any] = getattr(self, name)
                groups = {key: unquote(value or "") for key, value in match.groupdict().items()}
                if "repo" not in groups:
                    return answer(**groups)
                kind = "dataset" if groups.pop("kinds").startswith("datasets") else "model"
                writes = name in ("preupload", "commit", "tag", "lfs_batch")
                return answer(self._repository(groups.pop("repo"), kind, writes), **groups)
        self.server_hub.unknown.append(f"{self.command} {path}")
        raise HubError(HTTPStatus.NOT_FOUND, f"no such address: {path}")

    # Bodies

    def _read_body(self) -> bytes:
        left = int(self.headers.get("Content-Length") or 0)
        limit = self._cut.after if self._cut and self.command in ("POST", "PUT") else None
        if limit is not None:
            self.rfile.read(min(left, limit))
            raise ConnectionCut
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(left)
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _send(self, status: HTTPStatus, headers: Mapping[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._cut and self._cut.after is not None:
            self.wfile.write(content[: self._cut.after])
            self.wfile.flush()
            raise ConnectionCut
        self.wfile.write(content)

    # Who may do what

    def _user(self) -> tuple[str, str] | None:
        """Name and role; None for a stranger. A token that nobody has is an error at every address."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in self.server_hub.users:
            raise HubError(HTTPStatus.UNAUTHORIZED, "Invalid credentials in Authorization header")
        return self.server_hub.users[token]

    def _must_write(self, namespace: str) -> None:
        user = self._user()
        if user is None:
            raise HubError(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")
        if user != (namespace, "write"):
            raise HubError(HTTPStatus.FORBIDDEN, f"You don't have the rights to write to {namespace}")

    def _repository(self, repo_id: str, kind: str, writes: bool) -> Repository:
        user = self._user()
        repository = self.server_hub.repositories.get((kind, repo_id))
        namespace = repo_id.split("/")[0]
        # The Hub does not tell what is private from what is not there.
        if repository is None or (repository.private and (user is None or user[0] != namespace)):
            status = HTTPStatus.UNAUTHORIZED if user is None else HTTPStatus.NOT_FOUND
            raise HubError(status, "Repository not found", "RepoNotFound")
        if writes:
            self._must_write(namespace)
        return repository

    @staticmethod
    def _commit_at(repository: Repository, revision: str) -> Commit:
        if (commit := repository.at(revision)) is None:
            raise HubError(HTTPStatus.NOT_FOUND, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Addresses

    def whoami(self) -> dict[str, Any]:
        if (user := self._user()) is None:
            raise HubError(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")
        name, role = user
        token = {"displayName": "test", "role": role}
        return {"type": "user", "name": name, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}

    def create_repository(self) -> dict[str, Any]:
        wanted = json.loads(self.body)
        user = self._user()
        namespace = wanted.get("organization") or (user[0] if user else "")
        self._must_write(namespace)
        kind, repo_id = wanted.get("type", "model"), f"{namespace}/{wanted['name']}"
        url = f"{self.server_hub.url}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        if (kind, repo_id) in self.server_hub.repositories:
            raise HubError(HTTPStatus.CONFLICT, "You already created this repository", url=url)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        self.server_hub.add_repository(repo_id, {".gitattributes": attributes.encode()}, kind, private)
        return {"url": url, "name": repo_id}

    def validate_card(self) -> dict[str, Any]:
        try:
            metadata_of(json.loads(self.body)["content"])
        except (ValueError, yaml.YAMLError) as error:
            raise HubError(HTTPStatus.BAD_REQUEST, "Invalid metadata in README.md") from error
        return {"errors": [], "warnings": []}

    def describe(self, repository: Repository, revision: str) -> dict[str, Any]:
        commit = self._commit_at(repository, revision or "main")
        entries = [described(path, content) for path, content in sorted(commit.files.items())]
        siblings = [{"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]} for entry in entries]
        about = {"id": repository.id, "sha": commit.sha, "private": repository.private, "siblings": siblings}
        about |= {"author": repository.id.split("/")[0], "tags": [], "downloads": 0, "likes": 0, "gated": False}
        about |= {"lastModified": "2026-01-01T00:00:00.000Z", "disabled": False}
        if repository.kind == "model":
            about |= {"pipeline_tag": task_of(commit.files), "library_name": "transformers"}
        return about

    def references(self, repository: Repository) -> dict[str, Any]:
        def listed(names: Mapping[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]

        return {
            "branches": listed(repository.branches, "heads"),
            "tags": listed(repository.tags, "tags"),
            "converts": [],
        }

    def tree(self, repository: Repository, revision: str, path: str) -> list[dict[str, Any]]:
        commit = self._commit_at(repository, revision)
        prefix = f"{path}/" if path else ""
        inside = {name: content for name, content in commit.files.items() if name.startswith(prefix)}
        if path and not inside:
            raise HubError(HTTPStatus.NOT_FOUND, f"{path} does not exist on {revision}", "EntryNotFound")
        is_deep = self.query.get("recursive", "").lower() in ("true", "1")
        folders = {
            prefix + "/".join(parts[: depth + 1])
            for parts in (name[len(prefix) :].split("/") for name in inside)
            for depth in range(len(parts) - 1 if is_deep else min(len(parts) - 1, 1))
        }
        files = [name for name in sorted(inside) if is_deep or "/" not in name[len(prefix) :]]
        listed = [{"type": "directory", "path": name, "oid": git_hash(name.encode()), "size": 0} for name in folders]
        return listed + [described(name, inside[name]) for name in files]

    def paths_info(self, repository: Repository, revision: str) -> list[dict[str, Any]]:
        commit = self._commit_at(repository, revision)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode())["paths"]
        found = []
        for path in paths:
            if path in commit.files:
                found.append(described(path, commit.files[path]))
            elif any(name.startswith(f"{path}/") for name in commit.files):
                found.append({"type": "directory", "path": path, "oid": git_hash(path.encode()), "size": 0})
        return found

    def preupload(self, repository: Repository, revision: str) -> dict[str, Any]:
        files = self._commit_at(repository, revision).files
        answers = []
        for wanted in json.loads(self.body)["files"]:
            path = wanted["path"]
            answer = {"path": path, "shouldIgnore": False}
            answer |= {"uploadMode": "lfs" if is_lfs(path, wanted["size"]) else "regular"}
            if path in files:
                entry = described(path, files[path])
                answer |= {"oid": entry.get("lfs", entry)["oid"]}
            answers.append(answer)
        return {"files": answers}

    def lfs_batch(self, repository: Repository) -> dict[str, Any]:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            known = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server_hub.blobs:
                known |= {"actions": {"upload": {"href": f"{self.server_hub.url}/lfs/{wanted['oid']}"}}}
            objects.append(known)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> dict[str, Any]:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(HTTPStatus.BAD_REQUEST, "the content does not have this SHA-256")
        self.server_hub.blobs[oid] = self.body
        return {}

    def commit(self, repository: Repository, revision: str) -> dict[str, Any]:
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.server_hub.lock:
            before = self._commit_at(repository, revision)
            if not before.sha.startswith(header.get("parentCommit", "")):
                raise HubError(HTTPStatus.PRECONDITION_FAILED, "A commit has happened since.")
            files = dict(before.files)
            for line in lines:
                self._apply(files, line["key"], line["value"])
            made = repository.commit(files, header["summary"], revision)
        url = f"{self.server_hub.url}/{repository.id}/commit/{made.sha}"
        return {"success": True, "commitOid": made.sha, "commitUrl": url}

    def _apply(self, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
        """One operation of a commit."""
        path = value.get("path", "")
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.server_hub.blobs:
                raise HubError(HTTPStatus.BAD_REQUEST, f"{path} names content that was not uploaded")
            files[path] = self.server_hub.blobs[value["oid"]]
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(HTTPStatus.NOT_FOUND, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
                del files[name]

    def tag(self, repository: Repository, revision: str) -> dict[str, Any]:
        name = json.loads(self.body)["tag"]
        if name in repository.tags:
            raise HubError(HTTPStatus.CONFLICT, "Reference already exists")
        repository.tags[name] = self._commit_at(repository, revision).sha
        return {"success": True}

    def resolve(self, repository: Repository, revision: str, path: str) -> None:
        commit = self._commit_at(repository, revision)
        if path not in commit.files:
            raise HubError(HTTPStatus.NOT_FOUND, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.sha})
        content = commit.files[path]
        entry = described(path, content)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes", "ETag": f'"{entry["oid"]}"'}
        headers |= {"Content-Type": "application/octet-stream"}
        if "lfs" in entry:
            headers |= {"ETag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Etag": f'"{entry["lfs"]["oid"]}"'}
            headers |= {"X-Linked-Size": str(len(content))}
        status = HTTPStatus.OK
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = match.groups()
            start = int(first) if first else max(len(content) - int(last), 0)
            stop = min(int(last) + 1, len(content)) if first and last else len(content)
            if start >= len(content):
                whole = {"Content-Range": f"bytes */{len(content)}"}
                raise HubError(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "no such range", headers=whole)
            status = HTTPStatus.PARTIAL_CONTENT
            headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            content = content[start:stop]
        self._send(status, headers, content)
