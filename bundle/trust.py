"""Whether a bundle is the one that its owner chose: a pinned digest, or a signature.

The digest of a bundle is the sha256 of its manifest.json, which holds those of all other files. So
a digest, or a signature of the manifest, vouches for the whole bundle once every file has been
compared. Signatures are OpenSSH's (`ssh-keygen -Y sign -n nestd-bundle`, PROTOCOL.sshsig): the tool
is on every board, and keys and their files are familiar.

What is checked here is what lies on the disk now; who can change it afterwards is not stopped.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from nestd.bundle.errors import BundleError
from nestd.bundle.manifest import MANIFEST, Bundle

SIGNATURE = f"{MANIFEST}.sig"
NAMESPACE = "nestd-bundle"
SSH_KEYGEN = "ssh-keygen"
TIMEOUT_SECONDS = 30.0


def authenticate(
    bundle: Bundle,
    sha256: str | None,
    signers: Path | None,
    before_each: Callable[[str], None] = lambda _name: None,
) -> None:
    """Compare `bundle` with what is trusted; nothing happens where neither is given.

    Args:
        bundle: an opened bundle.
        sha256: the digest that it must have, as `nestd inspect` prints it.
        signers: an allowed_signers file (ssh-keygen(1)), one of whose keys must have signed it.
        before_each: called with each file's name before it is read; all take a while.

    Raises:
        BundleError: it is another bundle, it is not signed by one of them, or a file differs.
    """
    if sha256 is not None and bundle.digest != sha256:
        raise BundleError(
            f"{bundle.path} is not the pinned bundle: its digest is {bundle.digest}, bundle_sha256 "
            f"is {sha256}: copy the right one, or pin this one if you have changed it yourself"
        )
    if signers is not None:
        _verify_signature(bundle, signers)
    if sha256 is not None or signers is not None:
        bundle.verify(before_each)


def _verify_signature(bundle: Bundle, signers: Path) -> None:
    signature = bundle.path / SIGNATURE
    for file, remedy in (
        (signature, f"sign it: ssh-keygen -Y sign -f KEY -n {NAMESPACE} {bundle.path / MANIFEST}"),
        (signers, "name the allowed_signers file in bundle_signers"),
    ):
        if not file.is_file():
            raise BundleError(f"{file} is missing, and bundle_signers asks for it: {remedy}")
    found = _ssh_keygen("find-principals", "-s", str(signature), "-f", str(signers))
    # The first line is the first principal whose key it is.
    principal = found.stdout.decode(errors="replace").partition("\n")[0]
    if found.returncode != 0 or not principal:
        raise BundleError(
            f"{signature} was made with a key that is not in {signers}: sign the bundle with one "
            "that is, or add the key if you trust it"
        )
    checked = _ssh_keygen(
        *("verify", "-f", str(signers), "-I", principal, "-n", NAMESPACE, "-s", str(signature)),
        data=bundle.manifest_bytes,
    )
    if checked.returncode != 0:
        raise BundleError(
            f"the signature {signature} does not belong to this bundle: copy both again, or sign "
            "the bundle again if you have changed it yourself"
        )


def _ssh_keygen(*arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [SSH_KEYGEN, "-Y", *arguments]
    try:
        return subprocess.run(
            command, input=data, capture_output=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BundleError(
            f"cannot check the bundle's signature ({error}): install OpenSSH's client "
            "(sudo apt-get install openssh-client), or pin the bundle with bundle_sha256"
        ) from error
