"""TLS with the broker: the context, and what went wrong in words that say what to do.

Knows no MQTT. What makes a handshake fail may mend itself (a certificate is renewed, a clock is set
after the network came up), so nothing here decides whether to try again.
"""

from __future__ import annotations

import ssl

from nestd.bundle.errors import ConfigError
from nestd.daemon.mqtt.packets import TransportOptions

# OpenSSL's verify codes (x509_vfy.h).
_EXPIRED, _NOT_YET_VALID = 10, 9
_OTHER_NAME = frozenset({62, 64})
_UNKNOWN_CA = frozenset({2, 18, 19, 20, 21})
_NO_TLS = "the broker does not speak TLS on this port: set mqtt.port to its TLS port (mostly 8883)"
# OpenSSL's names of what the other side says, or does not, in the text of an SSLError.
_SAID = {
    "CERTIFICATE_REQUIRED": (
        "the broker asks for a client certificate: set mqtt.cert_file and mqtt.key_file"
    ),
    # Up to TLS 1.2 a broker that misses the certificate says no more than this.
    "HANDSHAKE_FAILURE": (
        "the broker ends the TLS handshake: if it asks for a client certificate, set "
        "mqtt.cert_file and mqtt.key_file"
    ),
    "ALERT_UNKNOWN_CA": (
        "the broker does not know the CA of our client certificate: have mqtt.cert_file signed by "
        "the CA that the broker trusts"
    ),
    "ALERT_CERTIFICATE_EXPIRED": "our client certificate has expired: renew mqtt.cert_file",
    "ALERT_CERTIFICATE_REVOKED": "our client certificate was revoked: renew mqtt.cert_file",
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "RECORD_LAYER_FAILURE": _NO_TLS,
    "UNEXPECTED_EOF": _NO_TLS,
}


def tls_context(options: TransportOptions) -> ssl.SSLContext:
    """Return a context that verifies the broker, with our own certificate if there is one.

    Raises:
        ConfigError: a file is missing or is not what it should be.
    """
    try:
        context = ssl.create_default_context(cafile=options.ca_file)
        if options.certificate_file is not None:
            context.load_cert_chain(options.certificate_file, options.key_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"cannot use mqtt.ca_file, cert_file or key_file ({error}): check that they are PEM "
            "files which this user may read"
        ) from error
    return context


def explain(error: OSError, host: str) -> str:
    """Return why there is no connection to the broker `host`, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        code, words = error.verify_code, error.verify_message
        if code == _EXPIRED:
            return "the broker's certificate has expired: renew it, or set this machine's clock"
        if code == _NOT_YET_VALID:
            return "the broker's certificate is not valid yet: set this machine's clock"
        if code in _OTHER_NAME:
            return (
                f"the broker's certificate is not made out for {host!r}: set mqtt.host to a name "
                "in it, or have it made out for this one"
            )
        if code in _UNKNOWN_CA:
            return (
                f"no CA that is trusted here has signed the broker's certificate ({words}): set "
                "mqtt.ca_file to the certificate of the CA that did"
            )
        return f"the broker's certificate is refused ({words}): renew it"
    if isinstance(error, ssl.SSLError):
        return explain_alert(str(error)) or f"TLS with the broker fails: {error}"
    if isinstance(error, ConnectionResetError):
        return f"the broker hangs up ({error}): check that mqtt.tls is right for mqtt.port"
    return f"cannot reach the broker: {error}"


def explain_alert(text: str) -> str | None:
    """Return what the text of an SSLError means, or None if it is no such text."""
    for name, sentence in _SAID.items():
        if name in text:
            return sentence
    return None
