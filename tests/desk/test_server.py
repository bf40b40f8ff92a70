"""The server by itself: who is answered, and who is not; no model here."""

import json
import re
import socket
import threading

import pytest

from cakeflow.desk import DeskServer
from cakeflow.desk.server import HEADER, MOST_BYTES
from cakeflow.errors import ConfigError, LockedError

from .conftest import Client


def fail(error):
    def call(body):
        raise error

    return call


@pytest.fixture
def page():
    server = DeskServer(0)
    server.calls = {
        "echo": lambda body: {"echo": json.loads(body)},
        "busy": fail(LockedError("at work")),
        "bad": fail(ConfigError("no such thing")),
        "broken": fail(ZeroDivisionError("by zero")),
    }
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Client(server)
    server.shutdown()
    thread.join()
    server.close()


def test_the_page_is_whole_and_may_run_nothing_but_its_own(page):
    status, answer, html = page.send("GET", f"/?token={page.token}")
    assert status == 200
    policy = answer.getheader("Content-Security-Policy")
    assert re.match(
        r"default-src 'none'; script-src 'sha256-\S+'; style-src 'sha256-\S+'; connect-src 'self'; ", policy
    )
    assert "unsafe" not in policy
    for name, value in {
        "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store", "Cross-Origin-Resource-Policy": "same-origin",
    }.items():  # fmt: skip
        assert answer.getheader(name) == value
    assert answer.getheader("Access-Control-Allow-Origin") is None
    assert html.count("<script>") == html.count("<style>") == 1
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", html)
    assert not re.search(r"https?://", html)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {}, 403),
        ("/?token=", {}, 403),
        ("/?token=%C3%A9%ED%A0%80", {}, 403),
        ("/?token={token}x", {}, 403),
        ("/other?token={token}", {}, 404),
        ("/../setup.cfg?token={token}", {}, 404),
        ("http://[?token={token}", {}, 400),
        ("/?token={token}", {"Host": "evil.example"}, 403),
        ("/?token={token}", {"Host": "127.0.0.1"}, 403),
        ("/?token={token}", {"Host": "127.0.0.1:1"}, 403),
        ("/?token={token}", {"Host": None}, 403),
        ("/?token={token}", {"Origin": "http://evil.example"}, 403),
        ("/?token={token}", {"Origin": "null"}, 403),
        ("/?token={token}", {"Host": "localhost:{port}"}, 200),
        ("/?token={token}", {"Origin": "http://localhost:{port}"}, 200),
    ],
)
def test_who_gets_the_page(page, path, headers, status):
    names = {"token": page.token, "port": page.server.server_port}
    chosen = {name: value and value.format(**names) for name, value in headers.items()}
    assert page.send("GET", path.format(**names), **chosen)[0] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({HEADER: None}, 403),
        ({HEADER: "x"}, 403),
        ({HEADER: "\xe9"}, 403),
        ({"Host": "evil.example:80"}, 403),
        ({"Origin": "https://127.0.0.1"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content_Type": None}, 415),
        ({"Content_Length": None}, 411),
        ({"Content_Length": "-1"}, 411),
        ({"Content_Length": "1e3"}, 411),
        ({"Transfer_Encoding": "chunked"}, 411),
    ],
)
def test_who_may_call(page, headers, status):
    code, _, answer = page.send("POST", "/api/echo", {"a": 1}, **headers)
    assert code == status
    assert answer == {"echo": {"a": 1}} if status == 200 else answer["error"]["kind"] == "Refused"


def test_two_host_headers_are_refused(page):
    with socket.create_connection(("127.0.0.1", page.server.server_port), timeout=10) as connection:
        host = f"Host: {page.server.hosts[0]}\r\n"
        connection.sendall(f"GET /?token={page.token} HTTP/1.1\r\n{host}{host}\r\n".encode())
        assert b" 403 " in connection.recv(64)


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
def test_other_methods_are_refused(page, method):
    status, answer, _ = page.send(method, f"/api/echo?token={page.token}")
    assert status == 501
    assert answer.getheader("Access-Control-Allow-Origin") is None


def test_a_call_has_a_name_and_a_size(page):
    assert page.send("POST", "/api/other", {})[0] == 404
    assert page.send("POST", "/api/echo", "x" * MOST_BYTES)[0] == 413
    assert page.send("POST", "/api/echo", "x" * (MOST_BYTES - 2))[0] == 200


def test_errors_are_typed_and_without_traceback(page, caplog):
    assert page.send("POST", "/api/busy", {})[::2] == (
        409,
        {"error": {"kind": "LockedError", "message": "at work", "fields": []}},
    )
    status, _, answer = page.send("POST", "/api/bad", {})
    assert (status, answer["error"]["message"]) == (400, "no such thing")
    assert caplog.records == []
    status, _, answer = page.send("POST", "/api/broken", {})
    assert (status, answer["error"]["message"]) == (500, "by zero; the terminal has the details")
    assert "Traceback" not in str(answer)


def test_it_listens_on_the_loopback_address_only(page):
    assert page.server.socket.getsockname()[0] == "127.0.0.1"
    assert page.server.address == f"http://127.0.0.1:{page.server.server_port}/?token={page.token}"


def test_a_port_in_use_is_a_typed_error(page):
    with pytest.raises(ConfigError, match=rf"port {page.server.server_port} is in use .*--port 0"):
        DeskServer(page.server.server_port)
    with pytest.raises(ConfigError, match="port 70000 cannot be had"):
        DeskServer(70000)


def test_every_server_has_a_token_of_its_own():
    servers = [DeskServer(0) for _ in range(2)]
    for server in servers:
        server.close()
    assert len({server.token for server in servers}) == 2
    assert min(len(server.token) for server in servers) >= 43
