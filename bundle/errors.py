"""The errors of nestd: one small tree.

    NestdError
    ├── RequestError          answered to the client: a wire code and a status (docs/mqtt.md)
    │   ├── BadRequest 400, Refused 403, ModelNotFound 404, BlobNotFound 404, Expired 408,
    │   ├── IdReused 409, TooLarge 413, UnsupportedMedia 415, QueueFull 429, Cancelled 499,
    │   ├── Internal 500, Loading 503, PowerSaver 503, ModalityUnavailable 503,
    │   └── RemoteUnavailable 503, InsufficientMemory 507
    ├── CheckpointError       the Hugging Face input cannot be converted
    ├── BundleError           a bundle is missing, damaged or of another format
    ├── ConfigError           a YAML file or an option is wrong
    └── BrokerError           the MQTT broker refuses us for good

Each message is one sentence that says what is wrong and what to do. A command prints it and exits
with status 2; the daemon sends `RequestError`s to the client.
"""

from __future__ import annotations

from typing import ClassVar


class NestdError(Exception):
    """Base of every error that nestd raises on purpose."""


class CheckpointError(NestdError):
    """The checkpoint cannot be read or is not a Gemma 3n model."""


class BundleError(NestdError):
    """The bundle is missing, damaged, incomplete or of another format version."""


class ConfigError(NestdError):
    """A configuration file, profile or option is wrong."""


class BrokerError(NestdError):
    """The broker refuses the connection for a reason that waiting does not mend."""


class RequestError(NestdError):
    """An error answered to the client who sent the request.

    Attributes:
        code: the word on the wire, for programs.
        status: the HTTP-like number on the wire.
        retry_after_ms: when the same request may succeed, or None.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500

    def __init__(self, message: str, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class BadRequest(RequestError):
    """The request is malformed."""

    code, status = "bad_request", 400


class Refused(RequestError):
    """The owner's filter refuses the request or its answer."""

    code, status = "refused", 403


class ModelNotFound(RequestError):
    """The bundle has no such sub-model."""

    code, status = "model_not_found", 404


class BlobNotFound(RequestError):
    """No finished blob has this id: unknown, expired, or not whole yet."""

    code, status = "blob_not_found", 404


class Expired(RequestError):
    """The request outlived its expiry."""

    code, status = "expired", 408


class IdReused(RequestError):
    """The id was used before with another payload."""

    code, status = "id_reused", 409


class TooLarge(RequestError):
    """The payload, the prompt or a medium is over a limit."""

    code, status = "too_large", 413


class UnsupportedMedia(RequestError):
    """A medium is broken or of a format that is not supported."""

    code, status = "unsupported_media", 415


class QueueFull(RequestError):
    """The queue is full; `retry_after_ms` says when to try again."""

    code, status = "queue_full", 429


class Cancelled(RequestError):
    """The client cancelled the request."""

    code, status = "cancelled", 499


class Internal(RequestError):
    """The node failed to answer; the log has the cause."""

    code, status = "internal", 500


class Loading(RequestError):
    """The model is still loading."""

    code, status = "loading", 503


class PowerSaver(RequestError):
    """The power state forbids the request now."""

    code, status = "power_saver", 503


class ModalityUnavailable(RequestError):
    """The bundle or the profile lacks the modality."""

    code, status = "modality_unavailable", 503


class RemoteUnavailable(RequestError):
    """The request requires the remote server, which may not or cannot answer it."""

    code, status = "remote_unavailable", 503


class InsufficientMemory(RequestError):
    """No sub-model fits the memory that is free."""

    code, status = "insufficient_memory", 507


def request_error(code: str, message: str, retry_after_ms: int | None = None) -> RequestError:
    """Return the error of the tree whose wire code is `code` (Internal for an unknown code)."""
    for kind in RequestError.__subclasses__():
        if kind.code == code:
            return kind(message, retry_after_ms)
    return Internal(message, retry_after_ms)
