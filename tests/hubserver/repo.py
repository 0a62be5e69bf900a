"""One repository of the test Hub: a bare git repository, and its large files by sha256. Git itself keeps the history."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize ([0-9]+)\n")
WHO = "hub <hub@localhost>"
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith("GIT_")},
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_TERMINAL_PROMPT": "0",
}


class ParentMovedError(Exception):
    """The branch is not where the committer thought."""


@dataclass(frozen=True)
class Item:
    """A file or folder of a commit's tree; for a large file `lfs` is its sha256 and its size."""

    path: str
    kind: str
    oid: str
    size: int
    lfs: tuple[str, int] | None = None


@dataclass
class HubRepo:
    """`ops` of a commit are (path, content) with None for a deletion; content of large files is their pointer."""

    folder: Path
    name: str
    owner: str
    private: bool = True
    gated: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)
    _blobs: dict[str, bytes] = field(default_factory=dict)  # by what git calls them, which never changes: so kept
    _trees: dict[str, list[Item]] = field(default_factory=dict)

    def create(self) -> None:
        self.folder.mkdir(parents=True)
        (self.folder / "lfs").mkdir()
        self.git("init", "--quiet", "--bare", "--initial-branch=main", str(self.folder), inside=False)
        self.commit(None, [(".gitattributes", ATTRIBUTES)], "initial commit")

    def git(self, *args: str, stdin: bytes = b"", inside: bool = True) -> bytes:
        command = ["git", *(["--git-dir", str(self.folder)] if inside else []), *args]
        return subprocess.run(command, input=stdin, capture_output=True, check=True, env=ENVIRONMENT).stdout

    def resolve(self, revision: str) -> str | None:
        for kind in ("tags", "heads"):
            try:
                return (self.folder / "refs" / kind / revision).read_text().strip()
            except OSError:
                continue
        if revision in self._trees:
            return revision
        try:
            found = self.git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
            return found.decode().strip()
        except subprocess.CalledProcessError:
            return None

    def refs(self, kind: str) -> dict[str, str]:
        folder = self.folder / "refs" / kind
        return {
            path.name: path.read_text().strip() for path in sorted(folder.iterdir()) if not path.name.endswith(".lock")
        }

    def tree(self, commit: str) -> list[Item]:
        if commit not in self._trees:
            lines = self.git("ls-tree", "-r", "-t", "-l", "-z", commit).decode().split("\0")[:-1]
            self._trees[commit] = [self._item(line) for line in lines]
        return self._trees[commit]

    def _item(self, line: str) -> Item:
        (_, kind, oid, size), path = line.split("\t", maxsplit=1)[0].split(), line.split("\t")[1]
        if kind == "tree":
            return Item(path, "directory", oid, 0)
        match = POINTER.fullmatch(self.blob(oid)) if int(size) < 200 else None
        lfs = (match[1].decode(), int(match[2])) if match else None
        return Item(path, "file", oid, lfs[1] if lfs else int(size), lfs)

    def blob(self, oid: str) -> bytes:
        if oid not in self._blobs:
            self._blobs[oid] = self.git("cat-file", "blob", oid)
        return self._blobs[oid]

    def large(self, sha256: str) -> Path:
        return self.folder / "lfs" / sha256

    def keep_large(self, sha256: str, data: bytes) -> bool:
        if hashlib.sha256(data).hexdigest() != sha256:
            return False
        temporary = self.folder / f"{sha256}.{threading.get_ident()}"
        temporary.write_bytes(data)
        temporary.replace(self.large(sha256))
        return True

    def log(self, revision: str = "main") -> list[tuple[str, str, str, str]]:
        """(commit, date, title, message) of each, newest first."""
        out = self.git("log", "--format=%H%x1f%ad%x1f%s%x1f%b%x1e", "--date=format:%Y-%m-%dT%H:%M:%S.000Z", revision)
        entries = [entry.strip("\n").split("\x1f") for entry in out.decode().split("\x1e")[:-1]]
        return [(commit, date, title, message.strip()) for commit, date, title, message in entries]

    def commit(
        self,
        parent: str | None,
        ops: list[tuple[str, bytes | None]],
        title: str,
        message: str = "",
        branch: str = "main",
    ) -> str:
        """Put a commit on the branch; `parent` is where it has to be, None wherever it is."""
        with self.lock:
            head = self.resolve(branch)
            if parent is not None and parent != head:
                raise ParentMovedError
            words = f"{title}\n\n{message}".strip().encode()
            stream = [f"commit refs/heads/{branch}\ncommitter {WHO} now\ndata {len(words)}\n".encode(), words, b"\n"]
            stream += [f"from {head}\n".encode()] if head else []
            for path, content in ops:
                quoted = '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'
                if content is None:
                    stream.append(f"D {quoted}\n".encode())
                else:
                    stream += [f"M 100644 inline {quoted}\ndata {len(content)}\n".encode(), content, b"\n"]
                    self._blobs[hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()] = content
            self.git("fast-import", "--quiet", "--date-format=now", "--force", stdin=b"".join(stream))
            made = self.resolve(branch)
            assert made
            return made

    def tag(self, name: str, commit: str) -> None:
        self.git("update-ref", f"refs/tags/{name}", commit)

    def untag(self, name: str) -> None:
        self.git("update-ref", "-d", f"refs/tags/{name}")


def pointer(sha256: str, size: int) -> bytes:
    """What git keeps in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
