"""What an owner writes into `remote:`, and what becomes of mistakes and secrets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nestd.bundle.errors import ConfigError
from nestd.cli.main import main
from nestd.daemon.config import explain_settings, load_settings

BUNDLE = str(Path(__file__).parent / "recorded/e4b-int4")
SERVER = "remote:\n  enabled: true\n  base_url: https://llm.example.org/v1\n  model: big\n"


def load(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "nestd.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(file, "generic", environ={}, root=tmp_path)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def test_it_is_off_and_asks_for_nothing_by_default(tmp_path: Path) -> None:
    remote = load_settings(None, "generic", environ={}, root=tmp_path).remote
    assert (remote.enabled, remote.default, remote.allow_media) == (False, "never", False)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (
            "enabled: true\n  model: m",
            "nestd.yaml:2:12: remote.enabled: needs `base_url` beside",
        ),
        ("enabled: true\n  base_url: https://a/v1", "remote.enabled: needs `model` beside it"),
        ("base_url: llm.example.org", "write a URL, for example https://llm.example.org/v1"),
        ("base_url: https://a:port/v1", "write a URL, for example https://llm.example.org/v1"),
        ("base_url: http://llm.lan/v1", "is not encrypted: use https, or set allow_http"),
        (
            "allow_http: true\n  base_url: http://llm.example.org/v1",
            "is not encrypted and not in the local network: use https",
        ),
        (
            "allow_http: true\n  base_url: http://8.8.8.8/v1",
            "is not encrypted and not in the local network: use https",
        ),
        ("base_url: https://a/v1?key=hunter2", "may hold no ? and no #"),
        ("base_url: https://me:hunter2@a/v1", "may hold no login: write the key into a file"),
        ("extra_fields: {model: x, stream: no}", "may not hold model, stream: nestd sets that"),
        ("reasons: [boredom]", "should be 'task', 'memory', 'battery' or 'heat'"),
        ("default: always", "should be 'never', 'allowed' or 'required'"),
        ("api_key: hunter2", "remote.api_key: unknown key; did you mean `api_key_file`?"),
    ],
)
def test_a_mistake_is_one_sentence_that_shows_no_secret(
    tmp_path: Path, lines: str, sentence: str
) -> None:
    (line,) = load(tmp_path, f"remote:\n  {lines}\n")
    assert sentence in line
    assert "hunter2" not in line


@pytest.mark.parametrize(
    "url",
    [
        "https://llm.example.org/v1",
        "http://localhost:11434/v1",
        "http://127.0.0.1:8080/v1",
        "http://[::1]:8080/v1",
        "http://192.168.1.7:8000/v1",
        "http://workstation:11434/v1",
        "http://workstation.lan/v1",
    ],
)
def test_without_tls_a_server_is_in_the_local_network(tmp_path: Path, url: str) -> None:
    overrides = {"remote.base_url": url, "remote.allow_http": True}
    settings = load_settings(None, "generic", overrides, environ={}, root=tmp_path)
    assert settings.remote.base_url == url


def test_check_config_shows_where_a_value_is_from_and_hides_what_may_be_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "nestd.yaml"
    file.write_text(f"{SERVER}  api_key_file: hunter2\n  extra_fields: {{user: hunter2}}\n")
    assert main(["check-config", "--config", str(file), "--profile", "generic"]) == 0
    out = capsys.readouterr().out
    assert "hunter2" not in out
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["remote.model"].split()[1:] == ["big", f"{file}:4"]
    assert "(set, hidden)" in lines["remote.extra_fields"]
    assert f"{file}:6" in lines["remote.extra_fields"]


def test_fields_may_come_from_the_environment(tmp_path: Path) -> None:
    environ = {"NESTD_REMOTE__EXTRA_FIELDS": "{top_k: 40}"}
    explained = explain_settings(None, "generic", environ=environ, root=tmp_path)
    assert explained.settings.remote.extra_fields == {"top_k": 40}
    assert explained.origins["remote.extra_fields"] == "environment NESTD_REMOTE__EXTRA_FIELDS"


def test_a_node_without_the_extra_says_how_to_get_it() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "httpx2":
            raise ModuleNotFoundError("refused by the test", name=name)
sys.meta_path.insert(0, Refuse())
from nestd.bundle.errors import ConfigError
from support.node import Node
Node()
try:
    Node(remote__enabled=True, remote__base_url="https://llm.example.org/v1", remote__model="big")
except ConfigError as error:
    print(error)
"""
    tests = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tests)
    assert done.stdout == "remote.enabled needs httpx2: pip install 'nestd[remote]'\n", done.stderr


def test_a_key_that_cannot_be_read_is_an_error_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("httpx2", reason="the extra `remote` is not installed")
    from support.node import Node

    server = {
        "remote__enabled": True,
        "remote__base_url": "https://llm.example.org/v1",
        "remote__model": "big",
        "remote__api_key_file": "nestd.remote-key",
    }
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    with pytest.raises(ConfigError, match=r"remote\.api_key_file: cannot read .*nestd\.remote-key"):
        Node(**server)
    (tmp_path / "nestd.remote-key").write_text("hunter2 \u20ac\n")
    with pytest.raises(ConfigError, match="holds characters that no key has") as caught:
        Node(**server)
    assert "hunter2" not in str(caught.value)
    (tmp_path / "nestd.remote-key").write_text("hunter2\n")
    Node(**server)


def test_nestd_plan_tells_where_a_request_would_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "nestd.yaml"
    file.write_text(SERVER)
    options = ("--config", str(file), "--profile", "raspberry-pi-5-8gb", "--battery", "3")

    def lines(*more: str) -> list[str]:
        assert main(["plan", *options, *more, BUNDLE]) == 0
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    out = lines("--memory", "7G", "--remote", "allowed")
    assert "remote battery the battery is below 5 %" in out
    assert "this request remote the battery is below 5 %" in out
    out = lines("--memory", "7G")
    assert any(line.startswith("this request refused") for line in out)
