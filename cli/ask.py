"""Send a request over MQTT and show the answer as it streams.

Exit status: 0 answered, 1 an error was answered, 2 wrong usage, no broker or no node.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nestd.cli.arguments import add_broker, add_config, add_media, client_transport
from nestd.cli.main import Subparsers


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add `nestd ask`."""
    summary = "Send a request over MQTT and show the answer as it streams."
    parser = subparsers.add_parser("ask", help=summary, description=__doc__)
    parser.add_argument("prompt", help="what to ask; - reads it from standard input")
    add_media(parser)
    parser.add_argument("--system", help="a system message before the prompt")
    parser.add_argument("--submodel", default="auto", help="a sub-model's name; default: auto")
    parser.add_argument("--effort", choices=("low", "auto", "high"), default="auto")
    parser.add_argument(
        "--remote",
        choices=("never", "allowed", "required"),
        help="whether the node's remote server may answer; default: as the node is configured",
    )
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--priority", type=int, help="0 to 9, 9 first; default: 4")
    parser.add_argument(
        "--schema", type=Path, metavar="FILE", help="a JSON schema that the answer has to keep to"
    )
    parser.add_argument(
        "--conversation", metavar="ID", help="go on with what was said under this id"
    )
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for the text as it is made",
    )
    parser.add_argument("--json", action="store_true", help="print the events, one JSON a line")
    parser.add_argument(
        "--cancel-after", type=float, metavar="S", help="cancel the request after S seconds"
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="give up after S seconds"
    )
    whom = parser.add_mutually_exclusive_group()
    whom.add_argument("--node", help="which node; default: this host's, or the only one")
    whom.add_argument("--pool", help="any node of this pool")
    add_broker(parser)
    add_config(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Ask, print, and return the exit status."""
    from nestd.bundle.errors import ConfigError, RequestError
    from nestd.cli.media import add_to, read_media
    from nestd.client.connection import Client, Due

    if args.pool is not None and args.cancel_after is not None:
        raise ConfigError("--cancel-after needs --node: a pool does not know who answers")
    fields, media = request_fields(args), read_media(args.media, args.detail)
    same = None if args.conversation is None else conversation_client(args.conversation)
    settings, address, transport = client_transport(args, same)
    client = Client(transport, address, settings.mqtt.prefix)
    later = () if args.cancel_after is None else (Due(args.cancel_after, "cancel", {}),)
    try:
        if args.pool is not None:
            client.connect_to_pool(args.pool)
        else:
            client.connect(args.node, fallback=settings.node_name)
        if media:
            pool_bytes = settings.mqtt.max_payload_bytes
            fields = add_to(fields, media, client, args.timeout, pool_bytes)
        events = client.ask(fields, args.timeout + 5, later)
        return print_json(events) if args.json else print_text(events)
    except RequestError as error:  # before anything was asked
        print(f"nestd: {error.status} {error.code}: {error}", file=sys.stderr)
        return 1
    finally:
        client.close()


def request_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the request's JSON; what was not given is left to the node.

    Raises:
        ConfigError: `--schema` is no file with a JSON object.
    """
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    messages = [{"role": "user", "content": prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    fields = {
        "messages": messages,
        "submodel": args.submodel,
        "effort": args.effort,
        "remote": args.remote,
        "stream": args.stream,
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
        "priority": args.priority,
        "response_format": None if args.schema is None else json_format(args.schema),
        "conversation": args.conversation,
        "expires_in": args.timeout,
    }
    return {name: value for name, value in fields.items() if value is not None}


def conversation_client(conversation: str) -> str:
    """Return the client id of a conversation, the same at each call of one user on one host.

    A node tells conversations apart by client: under a new id it would know nothing.
    """
    whose = f"nestd:{socket.gethostname()}:{os.getuid()}:{conversation}"
    return f"nestd-client-{uuid.uuid5(uuid.NAMESPACE_URL, whose).hex[:12]}"


def json_format(path: Path) -> dict[str, Any]:
    """Return the `response_format` for the JSON schema in a file.

    Raises:
        ConfigError: it cannot be read, or holds no JSON object.
    """
    from nestd.bundle.errors import ConfigError

    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the JSON schema {path}: {error}") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"{path} holds no JSON schema: write an object, such as {{}}")
    return {"type": "json_schema", "json_schema": schema}


def print_json(events: Iterable[dict[str, Any]]) -> int:
    """Print each event on a line."""
    status = 1
    for event in events:
        print(json.dumps(event, ensure_ascii=False), flush=True)
        status = 0 if event["event"] == "done" else 1
    return status


def print_text(events: Iterable[dict[str, Any]]) -> int:
    """Print the text as it comes, and the figures on standard error."""
    shown, attempt = "", 0
    for event in events:
        if event["attempt"] > attempt > 0 and shown:
            print(f"\n(attempt {event['attempt']}: from the start)", file=sys.stderr)
            shown = ""
        attempt = event["attempt"]
        if event["event"] == "delta":
            print(event["text"], end="", flush=True)
            shown += event["text"]
        elif event["event"] == "done":
            rest = remaining_text(shown, event["text"])
            print(rest, flush=True)
            print(summary(event), file=sys.stderr)
            return 0
        elif event["event"] == "error":
            if shown:
                print(flush=True)
            print(f"nestd: {event['status']} {event['code']}: {event['message']}", file=sys.stderr)
    return 1


def remaining_text(shown: str, whole: str) -> str:
    """Return what is still to be printed; deltas may be lost, and then the whole text follows."""
    return whole.removeprefix(shown) if whole.startswith(shown) else f"\n{whole}"


def summary(done: dict[str, Any]) -> str:
    """Return one line: sub-models, tokens, speed and times."""
    timings, usage = done["timings"], done["usage"]
    tokens = usage["completion_tokens"] if usage else None  # a remote server may not tell
    route = [done["switches"][0]["submodel"]] if done["switches"] else [done["submodel"]]
    route += [f"{s['submodel']} from token {s['token']}" for s in done["switches"][1:]]
    if done.get("remote_model"):
        route = [f"remote ({done['remote_model']})"]
    speed = "-"
    if tokens is not None and timings["decode_ms"]:
        speed = f"{tokens / timings['decode_ms'] * 1000:.1f} tokens/s"
    parts = [
        " -> ".join(route),
        "? tokens" if tokens is None else f"{tokens} tokens",
        speed,
        f"queue {timings['queue_ms']:.0f} ms",
        f"prefill {timings['prefill_ms']:.0f} ms",
        f"decode {timings['decode_ms']:.0f} ms",
        *([] if done.get("joules") is None else [f"{done['joules']:.1f} J"]),
        str(done["finish_reason"]),
    ]
    return f"[{' | '.join(parts)}]"
