"""Pinned and signed bundles: the right one starts, every other is refused with a sentence."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from nestd.bundle.errors import BundleError
from nestd.bundle.manifest import MANIFEST, Bundle
from nestd.bundle.trust import NAMESPACE, SIGNATURE, authenticate
from nestd.cli.main import main

needs_ssh_keygen = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="OpenSSH's client is not installed"
)


@pytest.fixture
def bundle(tiny_bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy that a test may damage."""
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_the_digest_is_the_sha256_of_the_manifest_and_inspect_shows_it(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest()
    assert bundle.digest == digest
    assert main(["inspect", str(bundle.path)]) == 0
    assert digest in capsys.readouterr().out


def test_the_pinned_bundle_passes_and_each_of_its_files_is_read(bundle: Bundle) -> None:
    read: list[str] = []
    authenticate(bundle, bundle.digest, None, read.append)
    assert read == list(bundle.manifest.files)


def test_without_a_pin_nothing_is_read(bundle: Bundle) -> None:
    flip(bundle.path / "decoder.data")
    read: list[str] = []
    authenticate(bundle, None, None, read.append)
    assert read == []


def test_a_file_with_one_bit_changed_is_refused_though_its_size_is_right(bundle: Bundle) -> None:
    flip(bundle.path / "decoder.data")
    with pytest.raises(BundleError, match=r"decoder\.data does not match its sha256"):
        authenticate(Bundle.open(bundle.path), bundle.digest, None)


def test_a_manifest_that_was_changed_along_with_a_file_is_refused(bundle: Bundle) -> None:
    file = bundle.path / "tokenizer.json"
    flip(file)
    document = json.loads((bundle.path / MANIFEST).read_text())
    document["files"][file.name]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (bundle.path / MANIFEST).write_text(json.dumps(document))
    changed = Bundle.open(bundle.path)
    changed.verify()  # it agrees with itself
    with pytest.raises(BundleError, match="is not the pinned bundle"):
        authenticate(changed, bundle.digest, None)


def test_run_refuses_another_bundle_before_it_loads_or_connects(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    state = f"state_directory={tmp_path / 'state'}"
    arguments = ["run", "--bundle", str(bundle.path), "--set", state, "--port", "1"]
    assert main([*arguments, "--set", f"bundle_sha256={'0' * 64}"]) == 2
    assert "is not the pinned bundle" in capsys.readouterr().err
    assert main([*arguments, "--set", "bundle_sha256=abc"]) == 2
    assert "bundle_sha256" in capsys.readouterr().err


def key(directory: Path, name: str) -> Path:
    file = directory / name
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(file)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return file


def sign(bundle: Bundle, private: Path, namespace: str = NAMESPACE) -> None:
    (bundle.path / SIGNATURE).unlink(missing_ok=True)
    command = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(private), "-n", namespace]
    subprocess.run([*command, str(bundle.path / MANIFEST)], check=True, capture_output=True)


@pytest.fixture
def owner(tmp_path: Path) -> Path:
    return key(tmp_path, "owner")


@pytest.fixture
def signers(tmp_path: Path, owner: Path) -> Path:
    file = tmp_path / "allowed_signers"
    file.write_text(f"owner@home {owner.with_suffix('.pub').read_text()}")
    return file


@needs_ssh_keygen
def test_a_bundle_signed_by_an_allowed_key_passes(
    bundle: Bundle, owner: Path, signers: Path
) -> None:
    sign(bundle, owner)
    authenticate(Bundle.open(bundle.path), None, signers)


@needs_ssh_keygen
def test_a_bundle_without_a_signature_is_refused(bundle: Bundle, signers: Path) -> None:
    with pytest.raises(BundleError, match="ssh-keygen -Y sign"):
        authenticate(bundle, None, signers)
    (bundle.path / SIGNATURE).write_text("")
    with pytest.raises(BundleError, match="bundle_signers"):
        authenticate(bundle, None, signers.with_name("absent"))


@needs_ssh_keygen
def test_the_signature_of_another_key_is_refused(
    bundle: Bundle, signers: Path, tmp_path: Path
) -> None:
    sign(bundle, key(tmp_path, "stranger"))
    with pytest.raises(BundleError, match="a key that is not in"):
        authenticate(bundle, None, signers)


@needs_ssh_keygen
def test_a_signature_of_another_manifest_or_for_another_purpose_is_refused(
    bundle: Bundle, owner: Path, signers: Path
) -> None:
    sign(bundle, owner)
    manifest = bundle.path / MANIFEST
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(BundleError, match="does not belong to this bundle"):
        authenticate(Bundle.open(bundle.path), None, signers)
    sign(bundle, owner, namespace="file")
    with pytest.raises(BundleError, match="does not belong to this bundle"):
        authenticate(Bundle.open(bundle.path), None, signers)


@needs_ssh_keygen
def test_a_signed_bundle_with_a_damaged_file_is_refused(
    bundle: Bundle, owner: Path, signers: Path
) -> None:
    sign(bundle, owner)
    flip(bundle.path / "decoder.data")
    with pytest.raises(BundleError, match="does not match its sha256"):
        authenticate(bundle, None, signers)


def test_without_openssh_a_signature_cannot_be_checked_and_the_bundle_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (bundle.path / SIGNATURE).write_text("x")
    signers = tmp_path / "allowed_signers"
    signers.write_text("x")
    with pytest.raises(BundleError, match="install OpenSSH"):
        authenticate(bundle, None, signers)
