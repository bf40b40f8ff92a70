"""The page over HTTP: on the loopback address, for whoever has the page's token, from the page itself only."""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cakeflow.desk.work import error_view
from cakeflow.errors import ConfigError, EditError, LockedError

log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
HEADER = "X-Cakeflow-Token"
MOST_BYTES = 64 * 1024
"""Largest body of a request."""
SECONDS = 10
"""Most seconds for a request to arrive."""
Call = Callable[[bytes], dict[str, Any]]
"""Answers the body of a request; ``EditError`` is shown on the page."""


class DeskServer(ThreadingHTTPServer):
    """Serves one page and its calls.

    Every request needs the token: the page as ``/?token=...``, calls as a header, which a page of another site cannot
    send. A ``Host`` header other than the server's own, which a foreign name that resolves to this machine would have
    (DNS rebinding), and a foreign ``Origin`` are refused, as are other types and larger sizes. There are no methods
    but GET and POST.

    Attributes:
        token: The token, new for every server.
        html: The page.
        policy: Its content security policy.
        calls: Name -> what answers a call; none before the session is there.

    Args:
        port: The port; 0 takes any that is free.

    Raises:
        ConfigError: If the port cannot be had.
    """

    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # there it would share the port with another server

    def __init__(self, port: int) -> None:
        self.token, self.calls = secrets.token_urlsafe(32), dict[str, Call]()
        self.html, self.policy = _page(self.token)
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            reason = "is in use by another program" if taken else f"cannot be had: {error}"
            raise ConfigError(
                f"port {port} {reason}; choose another one: --port N, or any that is free: --port 0"
            ) from error

    @property
    def hosts(self) -> tuple[str, str]:
        """The values of ``Host`` that are its own."""
        return f"{LOOPBACK}:{self.server_port}", f"localhost:{self.server_port}"

    @property
    def address(self) -> str:
        """The page's address, with the token."""
        return f"http://{self.hosts[0]}/?token={self.token}"

    def has_token(self, text: str | None) -> bool:
        """True for the page's token."""
        return text is not None and hmac.compare_digest(text.encode("utf-8", "replace"), self.token.encode())

    def close(self) -> None:
        """Free the port."""
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note what a connection died of, such as a browser that went away."""
        log.debug("a connection ended early", exc_info=True)


class _RefusalError(Exception):
    """A request that is not answered: its status and the reason."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: DeskServer
    timeout = SECONDS
    server_version, sys_version = "cakeflow", ""

    def do_GET(self) -> None:
        """Answer with the page."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Answer a call."""
        self._answer(self._post)

    def _answer(self, make: Callable[[], None]) -> None:
        try:
            self._require_own()
            make()
        except _RefusalError as refusal:
            self._drain()
            self._json(refusal.status, {"error": {"kind": "Refused", "message": str(refusal), "fields": []}})

    def _require_own(self) -> None:
        """Refuse what does not come from this server's own page."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            raise _RefusalError(HTTPStatus.FORBIDDEN, "foreign Host header; open the address that the terminal shows")
        origins = self.headers.get_all("Origin") or []
        if any(origin not in {f"http://{host}" for host in self.server.hosts} for origin in origins):
            raise _RefusalError(HTTPStatus.FORBIDDEN, "foreign Origin; open the address that the terminal shows")

    def _require_token(self, text: str | None) -> None:
        if not self.server.has_token(text):
            raise _RefusalError(HTTPStatus.FORBIDDEN, "no valid token; open the address that the terminal shows")

    def _get(self) -> None:
        path, query = self._url
        self._require_token(next(iter(parse_qs(query).get("token", [])), None))
        if path != "/":
            raise _RefusalError(HTTPStatus.NOT_FOUND, "there is nothing but the page")
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.html)

    def _post(self) -> None:
        self._require_token(self.headers.get(HEADER))
        call = self.server.calls.get(self._url[0].removeprefix("/api/"))
        if call is None:
            raise _RefusalError(
                HTTPStatus.NOT_FOUND, f"there is no such call; there are {', '.join(self.server.calls)}"
            )
        body = self._body()
        try:
            self._json(HTTPStatus.OK, call(body))
        except EditError as error:
            status = HTTPStatus.CONFLICT if isinstance(error, LockedError) else HTTPStatus.BAD_REQUEST
            self._json(status, {"error": error_view(error)})
        except OSError:
            raise
        except Exception as error:
            log.exception("%s failed", self.path)
            message = f"{error}; the terminal has the details"
            view = {"kind": type(error).__name__, "message": message, "fields": []}
            self._json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": view})

    @property
    def _url(self) -> tuple[str, str]:
        try:
            url = urlsplit(self.path)
        except ValueError as error:
            raise _RefusalError(HTTPStatus.BAD_REQUEST, "the address cannot be read") from error
        return url.path, url.query

    def _body(self) -> bytes:
        if self.headers.get_content_type() != "application/json":
            raise _RefusalError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "calls are application/json")
        length = self._length
        if length is None or self.headers.get("Transfer-Encoding"):
            raise _RefusalError(HTTPStatus.LENGTH_REQUIRED, "calls need a Content-Length")
        if length > MOST_BYTES:
            raise _RefusalError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a call has at most {MOST_BYTES} bytes")
        body = self.rfile.read(length)
        if len(body) < length:
            raise _RefusalError(HTTPStatus.BAD_REQUEST, "the call was cut off")
        return body

    @property
    def _length(self) -> int | None:
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None

    def _drain(self) -> None:
        """Read what a refused request sends, within bounds: else the answer may be lost with the connection."""
        try:
            self.connection.settimeout(1)
            self.rfile.read(min(self._length or 0, 16 * MOST_BYTES))
        except OSError:
            pass

    def _json(self, status: HTTPStatus, data: Mapping[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(data, allow_nan=False).encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": self.server.policy,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: the first line of a request may have the token in it."""


def _page(token: str) -> tuple[bytes, str]:
    """Return the page, and the policy that allows its own script and style, by their hashes, and nothing else."""
    environment = Environment(
        loader=PackageLoader("cakeflow.desk", "assets"), autoescape=True, undefined=StrictUndefined
    )
    assert environment.loader is not None
    script, css = (environment.loader.get_source(environment, name)[0] for name in ("desk.js", "desk.css"))
    html = environment.get_template("desk.html").render(token=token, script=Markup(script), css=Markup(css))
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(css)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.encode(), policy


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
