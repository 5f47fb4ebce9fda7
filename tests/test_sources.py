"""A checkpoint comes from a directory, or from a hub through the hub's own client."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nestd.bundle.errors import CheckpointError
from nestd.bundle.manifest import Bundle
from nestd.conversion.convert import ConvertOptions, convert
from nestd.conversion.sources.open import open_checkpoint
from nestd.conversion.sources.resolve import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "someone/tiny-gemma-3n"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub's HTTP interface as a download of one repository needs."""

    files: Path

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{REPOSITORY}"):
            names = [{"rfilename": item.name} for item in sorted(self.files.iterdir())]
            document = {"id": REPOSITORY, "sha": COMMIT, "siblings": names}
            self._send(json.dumps(document).encode(), "application/json", body)
            return
        file = self.files / path.rsplit("/", 1)[-1]
        if not path.startswith(f"/{REPOSITORY}/resolve/") or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._send(file.read_bytes(), "application/octet-stream", body)

    def _send(self, content: bytes, kind: str, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def hub(tiny_checkpoint: Path) -> Iterator[str]:
    handler = type("Handler", (Hub,), {"files": tiny_checkpoint})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def nestd_convert(
    repository: str, bundle: Path, endpoint: str, cache: Path
) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own: the client reads its environment when it is imported."""
    command = [str(Path(sys.executable).with_name("nestd")), "convert", repository, str(bundle)]
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_a_hugging_face_repository_is_downloaded_and_converted(
    hub: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("huggingface_hub")
    result = nestd_convert(REPOSITORY, tmp_path / "b", hub, tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.manifest.source.checkpoint == REPOSITORY
    local = convert(str(tiny_checkpoint), tmp_path / "c", ConvertOptions(), io.StringIO())
    assert bundle.manifest.files["decoder.data"] == local.manifest.files["decoder.data"]


def test_an_unknown_repository_says_what_to_check(hub: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    result = nestd_convert("someone/else", tmp_path / "b", hub, tmp_path / "cache")
    assert result.returncode == 2
    assert "cannot download someone/else from Hugging Face" in result.stderr
    assert "hf auth login" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_hub_that_cannot_be_reached_says_so(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    nobody = "http://127.0.0.1:9"
    result = nestd_convert(REPOSITORY, tmp_path / "b", nobody, tmp_path / "cache")
    assert result.returncode == 2
    assert "cannot download" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_downloaded_repository_converts_again_without_the_hub(hub: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    nobody, cache = "http://127.0.0.1:9", tmp_path / "cache"
    assert nestd_convert(REPOSITORY, tmp_path / "b", hub, cache).returncode == 0
    again = nestd_convert(REPOSITORY, tmp_path / "again", nobody, cache)
    assert again.returncode == 0, again.stderr


def test_a_cache_with_a_partial_download_says_so(hub: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    nobody, cache = "http://127.0.0.1:9", tmp_path / "cache"
    assert nestd_convert(REPOSITORY, tmp_path / "b", hub, cache).returncode == 0
    (weights,) = cache.glob("hub/*/snapshots/*/model.safetensors")
    weights.unlink()
    again = nestd_convert(REPOSITORY, tmp_path / "again", nobody, cache)
    assert again.returncode == 2
    assert "model.safetensors is missing: download the checkpoint again" in again.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("kagglehub") is not None, reason="kagglehub is installed"
)
def test_kaggle_without_its_client_says_what_to_install() -> None:
    with pytest.raises(CheckpointError, match="pip install kagglehub"):
        resolve("kaggle:google/gemma-3n/transformers/gemma-3n-e4b")


def test_a_file_without_weights_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with (
        pytest.raises(CheckpointError, match="no GGUF file"),
        open_checkpoint(resolve(str(tmp_path / "model.bin"))),
    ):
        pass
