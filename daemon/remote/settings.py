"""The section `remote` of the configuration (docs/remote.md)."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from nestd.daemon.section import PositiveSeconds, Seconds, Section

Consent = Literal["never", "allowed", "required"]
RemoteReason = Literal["task", "memory", "battery", "heat"]
_SECRET = {"secret": True}
# What a request says itself; the rest of the API's fields may be set by the owner.
OWN_FIELDS = ("model", "messages", "stream", "tools", "tool_choice", "response_format")
# Ends of names that no public name server answers for (RFC 6762, 8375, 9476 and common use).
_LOCAL_NAMES = (".local", ".lan", ".home.arpa", ".internal", ".localhost")


class RemoteSettings(Section):
    """A server with an OpenAI-compatible chat API, and what it may be used for.

    Attributes:
        base_url: what stands before `/chat/completions`; https, or with `allow_http` also http to
            this machine or the local network.
        model: its name at the server.
        api_key_file: a file whose first line is the key, read anew for each request; the key itself
            is never here.
        ca_file: certificates to trust instead of the system's.
        default: for requests that do not say whether they may go there.
        reasons: for which requests that allow it go there.
        allow_media: pictures and clips may go there, too.
        max_concurrent: requests that it has at once.
        connect_timeout_s, read_timeout_s: until it takes a connection; its longest silence.
        pause_s: how long it is left alone after it has failed.
        extra_fields: further fields of the request's body; one that is null is left out of it.
    """

    enabled: bool = False
    base_url: str | None = None
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    api_key_file: Annotated[Path, Field(json_schema_extra=_SECRET)] | None = None
    ca_file: Path | None = None
    allow_http: bool = False
    default: Consent = "never"
    reasons: tuple[RemoteReason, ...] = ("task", "memory", "battery", "heat")
    allow_media: bool = False
    max_concurrent: Annotated[int, Field(ge=1, le=64)] = 2
    connect_timeout_s: PositiveSeconds = 5.0
    read_timeout_s: PositiveSeconds = 60.0
    pause_s: Seconds = 30.0
    extra_fields: Annotated[dict[str, JsonValue], Field(json_schema_extra=_SECRET)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        # Errors of a whole section quote no value: a URL may hold a login.
        if self.base_url is not None and (problem := _url_problem(self.base_url, self.allow_http)):
            raise PydanticCustomError("remote", "{what}", {"what": problem, "keys": ("base_url",)})
        for key in ("base_url", "model"):
            if self.enabled and getattr(self, key) is None:
                text = f"needs `{key}` beside it"
                raise PydanticCustomError("remote", "{what}", {"what": text, "keys": ("enabled",)})
        clash = sorted(set(self.extra_fields or ()) & set(OWN_FIELDS))
        if clash:
            text = f"may not hold {', '.join(clash)}: nestd sets that itself"
            raise PydanticCustomError("remote", "{what}", {"what": text, "keys": ("extra_fields",)})
        return self


def _url_problem(url: str, allow_http: bool) -> str | None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    if parts.scheme not in ("https", "http") or not host:
        return "write a URL, for example https://llm.example.org/v1"
    if parts.username or parts.password:
        return "may hold no login: write the key into a file and name it in api_key_file"
    if parts.query or parts.fragment:
        return "may hold no ? and no #: write what stands before /chat/completions"
    if parts.scheme == "https":
        return None
    if not allow_http:
        return "is not encrypted: use https, or set allow_http for a server in the local network"
    if not _is_local(host):
        return "is not encrypted and not in the local network: use https"
    return None


def _is_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(_LOCAL_NAMES)
    return address.is_private or address.is_loopback or address.is_link_local
