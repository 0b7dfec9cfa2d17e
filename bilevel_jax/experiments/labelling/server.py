"""The page's server: a few fixed addresses, on this machine only unless told otherwise."""

import errno
import hmac
import html
import ipaddress
import json
import math
import os
import secrets
import socket
import socketserver
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from bilevel_jax.core.errors import InputError
from bilevel_jax.experiments.labelling.desk import Desk, OtherFileError, UnavailableError

HOST, PORT, FPS = "127.0.0.1", 8765, 15.0
LARGEST = 4096  # bytes of a request
TYPES = {"page.css": "text/css", "page.js": "text/javascript", "drawings.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class LabelServer(ThreadingHTTPServer):
    """Shows pairs of a directory in browsers and writes the labels; `serve_forever` runs it.

    It answers only requests for an address of its own, which keeps out pages whose name was pointed at this machine,
    and takes answers only with a token that the page holds and other sites cannot read.

    Args:
      directory: holds labels.jsonl, a `PreferenceFile`.
      host: an address of this machine. "0.0.0.0" is all of them: whoever reaches the machine may label.
      port: 0 is a free one.
      by: a name that the page suggests.
      fps: steps per second.

    Raises:
      InputError: no directory or file; an address that is not this machine's, a port that is taken; fps not above 0.

    Example:
      >>> import tempfile
      >>> directory = tempfile.mkdtemp()
      >>> file = bj.preferences.PreferenceFile.create(
      ...     f"{directory}/labels.jsonl", jnp.zeros(2), bj.environments.Discrete(3), length=4
      ... )
      >>> with LabelServer(directory, port=0) as server:
      ...     server.url.startswith("http://127.0.0.1:")
      True
    """

    daemon_threads = True

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        host: str = HOST,
        port: int = PORT,
        by: str = "",
        fps: float = FPS,
    ):
        if not (math.isfinite(fps) and 0 < fps <= 1000):
            raise InputError(f"--fps: expected steps per second above 0 and at most 1000, got {fps}")
        if not 0 <= port <= 65535:
            raise InputError(f"--port: expected 0 (a free one) to 65535, got {port}")
        if not host:
            raise InputError("--host: expected an address; 0.0.0.0 is all of this machine's")
        self.desk = Desk(directory)
        self.token = secrets.token_urlsafe(32)
        self.host = host
        settings = json.dumps({"token": self.token, "by": by, "fps": fps})
        files = resources.files("bilevel_jax.experiments.labelling")
        page = files.joinpath("page.html").read_text(encoding="utf-8").replace("SETTINGS", html.escape(settings))
        self.files = {"/": ("text/html", page.encode())}
        for name, kind in TYPES.items():
            self.files[f"/{name}"] = (kind, files.joinpath(name).read_bytes())
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise InputError(f"--port: {port} is in use on {host}; name another, or 0 for a free one") from None
            raise InputError(f"--host, --port: {host}, {port} cannot be served ({error.strerror})") from None

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks a name server for the name, which may take long
        self.server_name, self.server_port = self.host, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing where a browser went away."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """The page's address."""
        name = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{name}]' if ':' in name else name}:{self.server_port}/"

    def answer(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        """Return what the desk says to a request of the page."""
        by, file = request.get("by"), request.get("file", "")
        if path == "/label":
            if "value" not in request:
                raise InputError("value: it is missing")
            return self.desk.label(by, request.get("pair"), request["value"], file)
        return self.desk.undo(by) if path == "/undo" else self.desk.next(by, request.get("holding"), file)


class _Handler(BaseHTTPRequestHandler):
    server: LabelServer
    server_version, sys_version = "bilevel-jax", ""
    timeout = 30  # seconds without a word after which a connection is closed; each has one request, as in HTTP/1.0

    def do_GET(self):
        """The page and its parts."""
        found = self.server.files.get(self.path)
        if not self._is_for_us():
            self._refuse(403, "this server has another address; open the one that it printed")
        elif found is None:
            self._refuse(404, "there is no such page")
        else:
            self._send(200, *found)

    def do_POST(self):
        """Questions and answers, as JSON."""
        problem = self._problem()
        if problem:
            self._refuse(*problem)
            return
        try:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not isinstance(request, dict):
                raise ValueError
        except (ValueError, RecursionError):
            self._refuse(400, "expected an object as JSON")
            return
        try:
            answer = self.server.answer(self.path, request)
        except OtherFileError as error:
            self._refuse(409, str(error))
        except UnavailableError as error:
            self._refuse(503, str(error))
        except InputError as error:
            self._refuse(400, str(error))
        except OSError as error:
            self._refuse(503, f"the answer cannot be written ({error.strerror})")
        else:
            self._send(200, "application/json", json.dumps(answer).encode())

    def _problem(self) -> tuple[int, str] | None:
        length = self.headers.get("Content-Length", "")
        origin = self.headers.get("Origin")
        token = self.headers.get("X-Token", "").encode()
        if not self._is_for_us():
            return 403, "this server has another address; open the one that it printed"
        if origin not in (None, f"http://{self.headers['Host']}"):
            return 403, "another page may not ask"
        if not hmac.compare_digest(token, self.server.token.encode()):
            return 403, "the token is not this server's; load the page again"
        if self.path not in ("/next", "/label", "/undo"):
            return 404, "there is no such page"
        if self.headers.get_content_type() != "application/json":
            return 415, "expected application/json"
        if not (length.isascii() and length.isdigit()):
            return 411, "expected Content-Length"
        if len(length) > 9 or int(length) > LARGEST:
            return 413, f"a request has at most {LARGEST} bytes"
        return None

    def _is_for_us(self) -> bool:
        """Whether Host is this server's address. The port may be a tunnel's."""
        hosts = self.headers.get_all("Host", [])
        name, _, port = hosts[0].rpartition(":") if len(hosts) == 1 else ("", "", "")
        if not port.isdigit():
            name = hosts[0] if len(hosts) == 1 else ""
        reached = str(self.connection.getsockname()[0]).removeprefix("::ffff:")
        known = {reached, self.server.host.lower()}
        known |= {"localhost"} if ipaddress.ip_address(reached).is_loopback else {socket.gethostname().lower()}
        return name.lower().removeprefix("[").removesuffix("]") in known

    def _refuse(self, status: int, reason: str) -> None:
        self._send(status, "application/json", json.dumps({"error": reason}).encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests are no news."""


def serve(directory: str | os.PathLike[str], **options: Any) -> None:
    """Show the page of a directory until Ctrl-C; the options are `LabelServer`'s.

    Raises:
      InputError: as `LabelServer`.
    """
    with LabelServer(directory, **options) as server:
        follower = server.desk.follower
        for line in follower.refused:
            print(f"{follower.path}, {line}; the line is not used", file=sys.stderr)
        if not ipaddress.ip_address(str(server.server_address[0])).is_loopback:
            print("whoever reaches this address can label, and reads what they send", file=sys.stderr)
        print(f"{server.url} shows pairs of {follower.path}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            follower.look()
            print(f"\n{follower.labelled()} of {len(follower.contents.pairs)} pairs have labels")
