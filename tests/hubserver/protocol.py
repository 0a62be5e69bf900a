"""The protocol: who may do what, then one method a route."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from tests.hubserver.repo import HubRepo, Item, ParentMovedError, pointer

if TYPE_CHECKING:
    from email.message import Message

    from tests.hubserver.app import HubServer


class RefusedError(Exception):
    """An answer that is an error; `code` goes into X-Error-Code."""

    def __init__(self, status: int, code: str = "", message: str = "", body: Any = None) -> None:
        self.status, self.code, self.message, self.body = status, code, message, body


class Routes:
    """What a handler answers; `route` is the way in."""

    hub: HubServer
    command: str
    path: str
    headers: Message

    def route(self, body: bytes) -> tuple[int, Any, dict[str, str]]:
        path, _, query = self.path.partition("?")
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[0] == "api":
            return 200, self._api(parts[1:], body, parse_qs(query)), {}
        if len(parts) > 2 and parts[1].endswith(".git"):
            return 200, self._lfs(f"{parts[0]}/{parts[1].removesuffix('.git')}", parts[2:], body), {}
        if len(parts) == 4 and parts[2] == "large":
            return 200, self.hub.repos[f"{parts[0]}/{parts[1]}"].large(parts[3]).read_bytes(), {}
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve(f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]))
        raise RefusedError(404, message="no such page")

    def _api(self, parts: list[str], body: bytes, query: dict[str, list[str]]) -> Any:
        if parts == ["whoami-v2"]:
            if not self.user:
                raise RefusedError(401, message="Invalid username or password.")
            role = {"type": "access_token", "accessToken": {"role": "write"}}
            return {"type": "user", "name": self.user, "orgs": [], "auth": role}
        if parts == ["validate-yaml"]:
            return {"errors": [], "warnings": []}
        if parts == ["repos", "create"]:
            return self._create(json.loads(body))
        if parts[0] != "models" or len(parts) < 3:
            raise RefusedError(404, message="no such page")
        verb = parts[3] if len(parts) > 3 else "revision"
        write = verb in {"commit", "tag", "branch", "preupload"}
        repo = self._repo(f"{parts[1]}/{parts[2]}", write=write)
        answer = getattr(self, f"_api_{verb.replace('-', '_')}", None)
        if answer is None:
            raise RefusedError(404, message="no such page")
        return answer(repo, parts[4:], body, query)

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        user = self.user
        owner = asked.get("organization") or user
        if user is None or owner != user:
            raise RefusedError(403 if user else 401, message="You don't have the rights to create a model here")
        name = f"{owner}/{asked['name']}"
        told = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
        with self.hub.lock:
            if name in self.hub.repos:
                raise RefusedError(409, body={"error": "You already created this model repo", **told})
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.hub.create(name, owner, private=private)
        return told

    def _commit_of(self, repo: HubRepo, revision: str) -> str:
        commit = repo.resolve(revision)
        if commit is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _api_revision(self, repo: HubRepo, rest: list[str], *_: Any) -> Any:
        commit = self._commit_of(repo, rest[0] if rest else "main")
        files = [{"rfilename": item.path} for item in repo.tree(commit) if item.kind == "file"]
        facts = {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False}
        return {
            "_id": "0",
            "id": repo.name,
            "modelId": repo.name,
            "sha": commit,
            "siblings": files,
            "tags": [],
            **facts,
        }

    def _api_tree(self, repo: HubRepo, rest: list[str], *_: Any) -> Any:
        below = "/".join(rest[1:])
        items = repo.tree(self._commit_of(repo, rest[0]))
        return [_told(item) for item in items if not below or item.path.startswith(f"{below}/")]

    def _api_paths_info(self, repo: HubRepo, rest: list[str], body: bytes, _: Any) -> Any:
        wanted = set(parse_qs(body.decode()).get("paths", []))
        return [_told(item) for item in repo.tree(self._commit_of(repo, rest[0])) if item.path in wanted]

    def _api_commits(self, repo: HubRepo, rest: list[str], *_: Any) -> Any:
        log = repo.log(self._commit_of(repo, rest[0]))
        return [
            {"id": commit, "date": date, "title": title, "message": message, "authors": [{"user": repo.owner}]}
            for commit, date, title, message in log
        ]

    def _api_refs(self, repo: HubRepo, *_: Any) -> Any:
        told = {
            kind: [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": c} for n, c in repo.refs(folder).items()]
            for kind, folder in (("branches", "heads"), ("tags", "tags"))
        }
        return {**told, "converts": []}

    def _api_tag(self, repo: HubRepo, rest: list[str], body: bytes, _: Any) -> Any:
        with repo.lock:
            if self.command == "DELETE":
                if rest[0] not in repo.refs("tags"):
                    raise RefusedError(404, "RevisionNotFound", "no such tag")
                repo.untag(rest[0])
                return {}
            name = json.loads(body)["tag"]
            if name in repo.refs("tags"):
                raise RefusedError(409, message=f"Tag {name} exists already")
            repo.tag(name, self._commit_of(repo, rest[0]))
        return {}

    def _api_preupload(self, repo: HubRepo, rest: list[str], body: bytes, _: Any) -> Any:
        known = {item.path: item for item in repo.tree(self._commit_of(repo, rest[0]))}
        answers = []
        for file in json.loads(body)["files"]:
            item = known.get(file["path"])
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            oid = {"oid": item.lfs[0] if item.lfs else item.oid} if item else {}
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return {"files": answers}

    def _api_commit(self, repo: HubRepo, rest: list[str], body: bytes, _: Any) -> Any:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        ops = [op for line in lines[1:] for op in self._operations(repo, line["key"], line["value"])]
        try:
            made = repo.commit(header.get("parentCommit"), ops, header["summary"], header["description"], rest[0])
        except ParentMovedError:
            raise RefusedError(412, message="The branch has moved") from None
        url = f"{self.hub.endpoint}/{repo.name}/commit/{made}"
        return {"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""}

    def _operations(self, repo: HubRepo, key: str, value: dict[str, Any]) -> list[tuple[str, bytes | None]]:
        path = value["path"]
        if key == "file":
            return [(path, base64.b64decode(value["content"]))]
        if key == "lfsFile":
            if not repo.large(value["oid"]).exists():
                raise RefusedError(400, message="a large file was never uploaded")
            return [(path, pointer(value["oid"], repo.large(value["oid"]).stat().st_size))]
        assert key in {"deletedFile", "deletedFolder"}, key
        return [(path.rstrip("/"), None)]

    def _lfs(self, name: str, rest: list[str], body: bytes) -> Any:
        asked = json.loads(body) if rest[-1] == "batch" else {}
        wants = asked.get("operation") == "download"
        repo = self.hub.repos[name] if rest[0] == "upload" else self._repo(name, write=not wants)
        if rest[0] == "upload":
            if not repo.keep_large(rest[1], body):
                raise RefusedError(400, message="the bytes are not those that were announced")
            self.hub.uploaded.append(rest[1])
            return {}
        if rest[-1] == "verify":
            return {}
        objects = asked["objects"]
        base = f"{self.hub.endpoint}/{name}.git"
        for each in objects:
            if wants:
                each["actions"] = {"download": {"href": f"{self.hub.endpoint}/{name}/large/{each['oid']}"}}
            elif not repo.large(each["oid"]).exists():
                each["actions"] = {
                    "upload": {"href": f"{base}/upload/{each['oid']}"},
                    "verify": {"href": f"{base}/verify"},
                }
        return {"transfer": "basic", "objects": objects}

    def _resolve(self, name: str, revision: str, path: str) -> tuple[int, Any, dict[str, str]]:
        repo = self._repo(name)
        if repo.gated and self.user != repo.owner:
            raise RefusedError(403, "GatedRepo", f"Access to model {name} is restricted")
        commit = self._commit_of(repo, revision)
        item = next((item for item in repo.tree(commit) if item.path == path and item.kind == "file"), None)
        headers = {"X-Repo-Commit": commit}
        if item is None:
            raise RefusedError(404, "EntryNotFound", "Entry not found")
        if item.lfs:
            sha256, size = item.lfs
            elsewhere = f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/{name}/large/{sha256}"
            headers |= {"Location": elsewhere, "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(size)}
            return 302, {}, {**headers, "ETag": f'"{sha256}"'}
        return 200, repo.blob(item.oid), {**headers, "ETag": f'"{item.oid}"', "Accept-Ranges": "bytes"}

    @property
    def user(self) -> str | None:
        header = self.headers.get("Authorization", "")
        if not header:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        return user

    def _repo(self, name: str, *, write: bool = False) -> HubRepo:
        repo, user = self.hub.repos.get(name), self.user
        if repo is None or (repo.private and user != repo.owner):
            raise RefusedError(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != repo.owner:
            raise RefusedError(403, message="You don't have the rights to write here")
        return repo


def _told(item: Item) -> dict[str, Any]:
    told = {"type": item.kind, "oid": item.oid, "size": item.size, "path": item.path}
    if item.lfs:
        told["lfs"] = {"oid": item.lfs[0], "size": item.lfs[1], "pointerSize": len(pointer(*item.lfs))}
    return told
