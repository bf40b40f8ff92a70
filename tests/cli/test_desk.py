"""``cakeflow desk``: what is refused before anything is loaded or written, and an orderly end."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest

from cakeflow.cli.desk import run_desk
from cakeflow.desk.server import HEADER
from cakeflow.errors import ConfigError
from cakeflow.journal import verify


def test_a_port_in_use_is_refused_before_anything_is_written(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="is in use by another program; choose another one: --port N"):
            run_desk(tmp_path / "run", model="no such model", port=taken.getsockname()[1])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "no_such_model"}, "no shipped model config for this model: name the layers"),
        ({"policy": "missing.yaml"}, "policy 'missing.yaml' cannot be read"),
        ({"port": -1}, "port must be a whole number of at least 0"),
        ({"method": "caek"}, "did you mean 'cake'"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        run_desk(tmp_path / "run", **{"port": 0, **options})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ctrl_c_ends_it_and_the_same_folder_goes_on(method, workplace):
    words = [sys.executable, "-m", "cakeflow", "desk", "--run_dir", "run"]
    (workplace / "rules.yaml").write_text("minimum: {efficacy_exact: 0}")
    private = [*method, "--record_texts", "false"]
    for edits, further in ((0, private), (1, [])):  # the folder knows its model, method and what it records
        command = [*words, *further, "--port", "0", "--policy", "rules.yaml"]
        with ExitStack() as end:
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            page = end.enter_context(subprocess.Popen(command, **pipes, text=True, cwd=workplace))
            end.callback(page.kill)  # else a test that fails waits for it for ever
            port, token = re.search(r":(\d+)/\?token=(\S+)", page.stdout.readline()).groups()
            answer = call(port, token, "state")
            assert answer["state"]["edits"] == edits
            job = call(port, token, "apply", sentence=f"{('Ann Lee', 'Bob Ray')[edits]} is from", answer="Peru")["job"]
            while (view := call(port, token, "job", job=job)["job"])["state"] in ("waiting", "running"):
                pass
            assert view["state"] == "done", view["error"]
            page.send_signal(signal.SIGINT)
            out, err = page.communicate(timeout=60)
        assert page.returncode == 0, err
        assert f"closed with {edits + 1} facts in force" in out
        assert "go on with: cakeflow desk --run_dir run --policy rules.yaml" in out
        assert "Traceback" not in err
    assert verify(workplace / "run").faults == []
    assert all(path.is_dir() or b"Ann Lee" not in path.read_bytes() for path in (workplace / "run").rglob("*"))
    assert all(path.is_dir() or b"Bob Ray" not in path.read_bytes() for path in (workplace / "run").rglob("*"))


def call(port, token, verb, **arguments):
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
    headers = {"Content-Type": "application/json", HEADER: token}
    connection.request("POST", f"/api/{verb}", json.dumps(arguments), headers)
    return json.loads(connection.getresponse().read())
