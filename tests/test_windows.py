"""A run and its exports where files behave as on Windows (``windows``): the same bytes, and nothing in the way."""

import getpass
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_runs import editor_of
from windows import behave_as_windows, bytes_below

from cakeflow import EditRequest
from cakeflow.errors import ConfigError
from cakeflow.export import apply_delta
from cakeflow.journal import provenance, verify
from cakeflow.models.loading import load_model
from cakeflow.storage import atomic, folders

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads what is open from /proc")
FACTS = [EditRequest("{} lives in", name, "Köln “am Rhein” 東京") for name in ("Ann", "Žofie", "Bob", "李")]
FORMATS = ("model", "delta", "lora")


@pytest.fixture
def base(lm, tmp_path):
    lm.model.float().save_pretrained(tmp_path / "base")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def windows(monkeypatch, base):
    monkeypatch.setattr("time.sleep", lambda _: None)
    behave_as_windows(monkeypatch)


@pytest.fixture
def elsewhere(base, tmp_path):
    """A run and its exports, made before the test begins to behave as Windows."""
    return life(base, tmp_path / "elsewhere")


def life(base, folder):
    """A run that is stopped and goes on, a rollback, exports that replace others; the folder of all of it."""
    lm = load_model(base)
    editor = editor_of(lm)
    editor.fit(FACTS, 1, run_dir=folder / "run")
    editor.rollback(1)
    for _ in range(2):
        for format in FORMATS:
            editor.export(folder / format, format, overwrite=True)
    return folder


@pytest.mark.usefixtures("elsewhere", "windows")
def test_exports_have_the_same_bytes_as_elsewhere(base, tmp_path):
    one, other = bytes_below(tmp_path / "elsewhere"), bytes_below(life(base, tmp_path / "windows"))
    assert set(one) == set(other)
    ours = [
        name for name in one if name.endswith((".safetensors", "README.md", "manifest.json", "adapter_config.json"))
    ]
    assert len(ours) >= 10
    for name in ours:
        assert name.endswith(".safetensors") or b"\r" not in other[name]
        if not name.endswith(("README.md", "manifest.json")):  # they name the ledger's last line, which has the time
            assert one[name] == other[name]
    fresh = load_model(base)
    apply_delta(fresh, tmp_path / "windows/delta")
    assert fresh.fingerprint() == load_model(tmp_path / "windows/model").fingerprint()


@pytest.mark.usefixtures("windows")
def test_a_ledger_is_read_again_and_audited(base, tmp_path):
    life(base, tmp_path)
    assert b"\r" not in (tmp_path / "run/journal/ledger.jsonl").read_bytes()
    assert verify(tmp_path / "run").faults == []
    again = editor_of(load_model(base))
    again.load(tmp_path / "run")
    assert [step.requests[0].target_new for step in again.journal] == [FACTS[0].target_new] * 3
    answers = [json.loads(line) for line in (tmp_path / "run/after.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {each["subject"] for each in answers} == {fact.subject for fact in FACTS}


@pytest.mark.usefixtures("windows")
def test_a_reader_delays_a_file_and_does_not_lose_it(tmp_path, monkeypatch):
    """Somebody reads the file that is to be replaced: for a moment, and for longer than we wait."""
    path = tmp_path / "metrics.jsonl"
    atomic.write_text(path, "old")
    with path.open() as reader:
        waits = []
        monkeypatch.setattr("time.sleep", lambda seconds: (waits.append(seconds), len(waits) == 3 and reader.close()))
        atomic.write_text(path, "new")
    assert path.read_text() == "new"
    assert len(waits) == 3
    monkeypatch.setattr("time.sleep", lambda _: None)
    with path.open(), pytest.raises(PermissionError, match="being used"):
        atomic.write_text(path, "newer")
    assert bytes_below(tmp_path / ".")["metrics.jsonl"] == b"new"
    assert [name for name in bytes_below(tmp_path) if "tmp" in name] == []


@pytest.mark.usefixtures("windows")
def test_a_folder_in_use_is_named_and_left_as_it_was(base, tmp_path):
    """The model that is replaced is open in this very process: mapped, as libraries load it."""
    life(base, tmp_path)
    before = bytes_below(tmp_path / "model")
    editor = editor_of(load_model(base))
    editor.load(tmp_path / "run")
    with safe_open(tmp_path / "model/model.safetensors", "pt"), pytest.raises(ConfigError, match="close whatever has"):
        editor.export(tmp_path / "model", overwrite=True)
    assert bytes_below(tmp_path / "model") == before
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith((".tmp", ".old"))] == []
    editor.export(tmp_path / "model", overwrite=True)


ELSEWHERE_ONLY = re.compile(
    r"\b(?:os\.(?:fork|geteuid|getuid|getpgid|killpg|setsid|chown|mkfifo|uname|fchmod|fchown|pread|pwrite|statvfs|"
    r"getloadavg|sched_\w+|O_NOFOLLOW|O_DIRECTORY|O_CLOEXEC|O_SYNC)|"
    r"signal\.(?:SIGKILL|SIGHUP|SIGALRM|SIGUSR\d|SIGQUIT|SIGCHLD|alarm|setitimer|pause|pthread_kill)|"
    r"fcntl|termios|resource\.\w*rlimit)\b"
)


def test_no_code_names_what_windows_lacks():
    """But for the number of the user, which is asked for where there is a list of users (``pwd``)."""
    root = Path(atomic.__file__).parents[2]
    places = [*(root / "cakeflow").rglob("*.py"), *(root / "plugins").rglob("*.py")]
    named = {(path.name, name) for path in places for name in ELSEWHERE_ONLY.findall(path.read_text(encoding="utf-8"))}
    assert named == {("provenance.py", "os.geteuid")}


@pytest.mark.usefixtures("windows")
def test_what_is_open_by_accident_does_not_keep_a_folder_from_its_place(tmp_path):
    """As models are, which transformers maps and which refer to themselves: gone only when garbage is collected."""

    def write(folder):
        atomic.write_tensors(folder / "a.safetensors", {"a": torch.ones(3)})
        mapped = [safe_open(folder / "a.safetensors", "pt").get_tensor("a")]
        mapped.append(mapped)

    folders.write_folder(tmp_path / "out", write)
    assert (tmp_path / "out/a.safetensors").exists()


def test_lines_are_added_in_binary(tmp_path, monkeypatch):
    """Windows' own ``open`` adds carriage returns to lines unless it is told not to."""
    monkeypatch.setattr(atomic.os, "O_BINARY", 1 << 29, raising=False)
    flags, usual = [], atomic.os.open
    monkeypatch.setattr(
        atomic.os, "open", lambda path, how, *mode: (flags.append(how), usual(path, how & ~(1 << 29), *mode))[1]
    )
    atomic.append_line(tmp_path / "lines", b"one")
    assert flags[0] & 1 << 29


def test_names_of_a_run_are_names_everywhere(base, tmp_path):
    """No device, no sign that Windows refuses, no two that differ in case only, and short: 260 signs are a path."""
    life(base, tmp_path / "work")
    names = [path.relative_to(tmp_path / "work").as_posix() for path in (tmp_path / "work").rglob("*")]
    assert len({name.casefold() for name in names}) == len(names) > 20
    for name in names:
        assert all(folders.file_name(part) == part for part in name.split("/"))
        assert len(name) < 80


DEVICES = ("CON", "con.txt", "nul", "COM1")


@pytest.mark.parametrize("name", [*DEVICES, "a:b", "what?", "a/b", r"a\b", "end.", "end ", "", "..", "tab\t"])
def test_what_is_no_name_everywhere_becomes_one(name):
    other = folders.file_name(name)
    assert other != name
    assert folders.file_name(other) == other
    assert Path(other).name == other


@pytest.mark.parametrize("name", ["facts", "Fakten für Köln", "東京", "console", "com10", ".hidden", "a.b.c"])
def test_a_good_name_stays(name):
    assert folders.file_name(name) == name


def test_without_a_name_in_the_environment_the_account_is_who(monkeypatch):
    """On Windows ``getpass`` then imports what is not there."""

    def missing():
        raise ModuleNotFoundError("No module named 'pwd'")

    monkeypatch.setattr(getpass, "getuser", missing)
    assert "environment" not in provenance.who()


def test_a_mount_point_is_recognised_without_pathlib(monkeypatch):
    def unsupported(_):
        raise NotImplementedError("Path.is_mount() is unsupported on this system")

    monkeypatch.setattr(Path, "is_mount", unsupported)
    with pytest.raises(ConfigError, match="mount point"):
        folders.check_free(Path("/"), overwrite=True)


def test_what_an_encoding_lacks_is_shown_as_escapes():
    """The command's output in a file, in cp1252."""
    code = "from cakeflow.__main__ import main; import sys; main(['--version']); sys.stdout.write('東京 Köln')"
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert rb"\u6771\u4eac K" in done.stdout
