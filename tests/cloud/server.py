"""A small threaded HTTP/1.1 server: keep-alive, one thread per connection, exact lengths.

Guests reach it through a relay that starts one process per connection, so a connection that is
answered with a wrong length, or closed without need, shows up as a time-out inside the guest.
"""

import http.client
import select
import socket
import socketserver
import sys
import traceback
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from typing import Callable

MAX_BODY = 512 * 1024 * 1024


@dataclass
class Request:
    """One HTTP request, read completely."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes
    connection: socket.socket

    def header(self, name: str, default: str = "") -> str:
        return self.headers.get(name.lower(), default)

    def wait_for_hangup(self) -> None:
        """Keep the connection open, without an answer, until the client gives up."""
        while True:
            select.select([self.connection], [], [])
            try:
                if not self.connection.recv(4096):
                    return
            except OSError:
                return


@dataclass
class Response:
    status: int
    body: bytes = b""
    content_type: str = "text/plain"
    headers: list[tuple[str, str]] = field(default_factory=list)


# A handler that returns None has no answer: the connection is closed.
Handler = Callable[[Request], Response | None]


class _BadRequest(Exception):
    pass


class Server(socketserver.ThreadingTCPServer):
    """Bound and listening as soon as it is constructed; serves once it has a handler."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.handler: Handler | None = None

    @property
    def port(self) -> int:
        return self.server_address[1]

    def handle_error(self, request, client_address) -> None:
        # A client that goes away in the middle of an exchange is part of the game (reboots, power
        # cuts); everything else is a fault of this program.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def handle_any(self) -> None:
        try:
            body = self._read_body()
        except _BadRequest as error:
            self.close_connection = True
            self._send(Response(400, str(error).encode()))
            return
        path, _, query = self.path.partition("?")
        headers: dict[str, str] = {}
        for name, value in self.headers.items():
            headers.setdefault(name.lower(), value)
        request = Request(self.command, path, query, headers, body, self.connection)
        try:
            response = self.server.handler(request)
        except Exception:
            traceback.print_exc()
            response = Response(500, b"the simulation failed, see its standard error")
        if response is None:
            self.close_connection = True
            return
        self._send(response)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = do_OPTIONS = handle_any

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return self._read_chunks()
        length = self.headers.get("Content-Length", "0")
        if not length.isdigit() or int(length) > MAX_BODY:
            raise _BadRequest(f"bad Content-Length {length!r}")
        return self._read_exactly(int(length))

    def _read_chunks(self) -> bytes:
        parts: list[bytes] = []
        total = 0
        while True:
            line = self.rfile.readline(1024).split(b";")[0].strip()
            try:
                size = int(line, 16)
            except ValueError:
                raise _BadRequest("bad chunk size") from None
            total += size
            if size < 0 or total > MAX_BODY:
                raise _BadRequest("bad chunk size")
            if size == 0:
                while self.rfile.readline(65536).strip():
                    pass
                return b"".join(parts)
            parts.append(self._read_exactly(size))
            self.rfile.readline(1024)

    def _read_exactly(self, length: int) -> bytes:
        body = self.rfile.read(length)
        if len(body) != length:
            raise _BadRequest("the body ended early")
        return body

    def _send(self, response: Response) -> None:
        reason = http.client.responses.get(response.status, "")
        lines = [
            f"HTTP/1.1 {response.status} {reason}",
            f"Date: {formatdate(usegmt=True)}",
            f"Content-Type: {response.content_type}",
            f"Content-Length: {len(response.body)}",
        ]
        lines += [f"{name}: {value}" for name, value in response.headers]
        if self.close_connection:
            lines.append("Connection: close")
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        # One write, so that small answers travel as one packet.
        self.wfile.write(head if self.command == "HEAD" else head + response.body)

    def log_message(self, format: str, *args: object) -> None:
        pass
