"""The server: listens, keeps a log, spoils what it is told to, and sends what `protocol.py` answers."""

from __future__ import annotations

import json
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from tests.hubserver.faults import Faults, pieces
from tests.hubserver.protocol import RefusedError, Routes
from tests.hubserver.repo import HubRepo

OWNER_TOKEN = "hf_owner"  # may write what is `me`'s
OTHER_TOKEN = "hf_other"  # somebody else's


@dataclass(frozen=True)
class Asked:
    """One request as the log keeps it; `token` says whether one came along, `begin` at which byte a file is taken up."""

    method: str
    path: str
    host: str
    token: bool
    begin: int = 0


@dataclass
class HubServer:
    """`with HubServer(folder) as hub:`; `hub.endpoint` is where it listens."""

    root: Path
    tokens: dict[str, str] = field(default_factory=lambda: {OWNER_TOKEN: "me", OTHER_TOKEN: "you"})
    faults: Faults = field(default_factory=Faults)
    repos: dict[str, HubRepo] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    uploaded: list[str] = field(default_factory=list)  # sha256 of every large file that came in
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Self:
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._http = Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @cached_property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def create(self, name: str, owner: str = "me", *, private: bool = True) -> HubRepo:
        repo = HubRepo(self.root / f"{name}.git", name, owner, private)
        repo.create()
        self.repos[name] = repo
        return repo

    def downloads(self) -> list[str]:
        """Paths of every file that was sent out."""
        return [a.path for a in self.asked if a.method == "GET" and ("/resolve/" in a.path or "/large/" in a.path)]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed on purpose: a broken pipe is no news."""


class Handler(Routes, BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - http.server's names

    def _serve(self) -> None:
        body = self._body()
        host = (self.headers.get("Host") or "").split(":")[0]
        begin = re.fullmatch(r"bytes=([0-9]+)-", self.headers.get("Range", ""))
        self.begin = int(begin[1]) if begin else 0
        self.hub.asked.append(Asked(self.command, self.path, host, "Authorization" in self.headers, self.begin))
        self.fault = self.hub.faults.take(self.command, self.path)
        if self.fault and self.fault.first:
            self.fault.first()
        try:
            self._spoil(after=False)
            status, answer, headers = self.route(body)
            self._spoil(after=True)
            self._answer(status, answer, headers)
        except RefusedError as no:
            headers = {"X-Error-Code": no.code, "X-Error-Message": no.message, "X-Request-Id": secrets.token_hex(4)}
            headers |= dict(self.fault.headers) if self.fault else {}
            body_out = no.body if no.body is not None else {"error": no.message or "refused"}
            self._answer(no.status, body_out, {k: v for k, v in headers.items() if v})

    def _spoil(self, *, after: bool) -> None:
        if self.fault and self.fault.status and self.fault.after == after:
            raise RefusedError(self.fault.status, message="injected")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, answer: Any, headers: dict[str, str]) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        kind = "application/octet-stream" if isinstance(answer, bytes) else "application/json"
        is_file = self.command == "GET" and isinstance(answer, bytes)
        if self.begin and is_file and status == 200:
            headers["Content-Range"] = f"bytes {self.begin}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[self.begin :]
        length = str(len(data))
        if is_file and self.fault and self.fault.body:
            data = self.fault.body(data)
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": length, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = self.fault if is_file else None
        sent = 0
        for piece in pieces(data, fault):
            if fault and fault.cut is not None and sent + len(piece) > fault.cut:
                self.wfile.write(piece[: fault.cut - sent])
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if fault and fault.stall_s:
                time.sleep(fault.stall_s)
            self.wfile.write(piece)
            sent += len(piece)
