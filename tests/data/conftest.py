"""A web server on this machine."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest


class _Site(SimpleHTTPRequestHandler):
    """Notes what is sent, and says by an ETag whether a file is still the same."""

    sent: ClassVar[list[str]] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.sent.append(self.path)
        super().do_GET()

    def end_headers(self):
        path = Path(self.translate_path(self.path))
        if path.is_file():
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        super().end_headers()


@pytest.fixture
def site(tmp_path):
    """A folder and the URL under which it can be read."""
    folder = tmp_path / "site"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Site, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def sent():
    """Paths that the server was asked for."""
    return _Site.sent
