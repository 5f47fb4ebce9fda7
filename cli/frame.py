"""What `nestd watch` draws: a pure function from what nodes say to the lines of one frame.

Texts come over the network: whatever is no printable character is replaced, so that no node can
write escape sequences to somebody's terminal. "-" is shown for what a board cannot tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nestd.daemon.units import format_bytes

# ANSI (ECMA-48) attributes.
BOLD, DIM, INVERSE, RED, GREEN, YELLOW = "1", "2", "7", "31", "32", "33"
PLAIN = ""

LABEL = 11
BAR = 24
# A node that has not answered for so long is marked.
SILENT_SECONDS = 4.0

Segment = tuple[str, str]
Line = list[Segment]


@dataclass(slots=True)
class NodeView:
    """What one node has said about itself, as it came; empty where it has not.

    Attributes:
        silent_s: seconds since it last answered.
    """

    name: str
    availability: str = ""
    state: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)
    silent_s: float = 0.0

    @property
    def online(self) -> bool:
        """It says so, and its will has not said otherwise."""
        return self.availability == "online"


def frame(nodes: Sequence[NodeView], width: int, height: int, color: bool) -> list[str]:
    """Return the lines of one frame: a block for each node, or a row where blocks do not fit."""
    blocks = [block(node) for node in nodes]
    if sum(len(lines) + 1 for lines in blocks) <= height or len(nodes) == 1:
        lines = [line for lines in blocks for line in (*lines, [])][:-1]
    else:
        lines = table(nodes)
    return [paint(line, width, color) for line in lines[:height]]


def paint(line: Iterable[Segment], width: int, color: bool) -> str:
    """Return one line, cut to `width` columns."""
    result, left = [], width
    for text, style in line:
        piece = "".join(c if c.isprintable() else "?" for c in text)[:left]
        left -= len(piece)
        result.append(f"\x1b[{style}m{piece}\x1b[0m" if color and style and piece else piece)
    return "".join(result).rstrip()


def block(node: NodeView) -> list[Line]:
    """Return the lines about one node."""
    head: Line = [(node.name, BOLD), ("  ", PLAIN), *_phase(node)]
    bundle = node.info.get("bundle")
    if bundle:
        head.append((f"   {bundle}", DIM))
    uptime = _number(node.health.get("uptime_seconds"))
    if node.online and uptime is not None:
        head.append((f"   up {_duration(uptime)}", DIM))
    if not node.online or not node.state:
        return [head]
    lines = [head, _memory(node), _heat_and_power(node), *_ladder(node)]
    for label, key in (("runs", "submodel"), ("largest", "largest")):
        value, reason = node.state.get(key), node.state.get(f"{key}_reason")
        lines.append(_labelled(label, [(f"{_text(value):10}", BOLD), (f" {_text(reason)}", PLAIN)]))
    for cause in ("power", "memory"):
        reason = node.state.get(f"{cause}_reason")
        if reason and reason != node.state.get("largest_reason"):
            lines.append(_labelled("held by", [(f"{cause}: {reason}", YELLOW)]))
    lines.append(_labelled("queue", [(_work(node), PLAIN)]))
    return lines


def table(nodes: Sequence[NodeView]) -> list[Line]:
    """Return one row for each node."""
    names = max([4, *(len(node.name) for node in nodes)])
    title = f"{'node':{names}} {'phase':9} {'runs':10} {'largest':10} {'available':>19} {'psi':>5}"
    title += f" {'°C':>4} {'W':>6} {'tok/s':>6} {'queue':>5}  why"
    rows: list[Line] = [[(title, DIM)]]
    for node in nodes:
        phase, style = _phase(node)[0]
        row: Line = [(f"{node.name:{names}} ", BOLD), (f"{phase:9} ", style)]
        if node.online and node.state:
            row.append((_cells(node), PLAIN))
        rows.append(row)
    return rows


def _cells(node: NodeView) -> str:
    state, health, queue = node.state, node.health, _queue(node)
    cells = (
        f"{_text(state.get('submodel')):10}",
        f"{_text(state.get('largest')):10}",
        f"{_available(health):>19}",
        f"{_figure(health, 'memory_pressure_percent'):>5}",
        f"{_figure(health, 'temperature_celsius', 0):>4}",
        f"{_figure(health, 'watts'):>6}",
        f"{_figure(health, 'decode_tokens_per_second'):>6}",
        f"{_text(queue.get('running')) + '+' + _text(queue.get('waiting')):>5}",
        f" {_text(state.get('submodel_reason'))}",
    )
    return " ".join(cells)


def _phase(node: NodeView) -> Line:
    if not node.online:
        return [("offline", DIM)]
    phase = str(node.state.get("phase", "-"))
    line: Line = [(phase, GREEN if phase == "ready" else YELLOW)]
    if node.state.get("phase_reason"):
        line.append((f"  {node.state['phase_reason']}", YELLOW))
    if node.silent_s > SILENT_SECONDS:
        line.append((f"  no answer for {node.silent_s:.0f} s", RED))
    return line


def _memory(node: NodeView) -> Line:
    health = node.health
    available, total = map(_number, map(health.get, _MEMORY))
    pressure = _number(health.get("memory_pressure_percent"))
    line: Line = []
    if available is not None and total:
        line += _bar(1 - available / total)
    line.append((f" {_available(health)} available", PLAIN))
    style = PLAIN if not pressure else YELLOW if pressure < 10 else RED
    line.append((f"   pressure {_figure(health, 'memory_pressure_percent')} %", style))
    for name, key in _PROCESSES:
        size = _number(health.get(key))
        line.append(("" if size is None else f"   {name} {format_bytes(int(size))}", DIM))
    return _labelled("memory", line)


_MEMORY = ("memory_available_bytes", "memory_total_bytes")
_PROCESSES = (("daemon", "rss_bytes"), ("engine", "engine_rss_bytes"))


def _heat_and_power(node: NodeView) -> Line:
    health = node.health
    celsius, limit = (
        _number(health.get(f"{name}_celsius")) for name in ("temperature", "throttle")
    )
    line: Line = []
    # From 30 °C, where nothing is warm yet, to where the board slows itself down.
    if celsius is not None and limit is not None and limit > 30:
        line += [*_bar((celsius - 30) / (limit - 30)), (" ", PLAIN)]
    slows = "" if limit is None else f" of {limit:.0f}"
    line.append((f"{_figure(health, 'temperature_celsius', 0)}{slows} °C", PLAIN))
    scope = health.get("watts_scope")
    line.append((f"   {_figure(health, 'watts')} W", PLAIN))
    line.append(("" if scope is None else f" ({scope})", DIM))
    line.append((f"   {_figure(health, 'joules_per_token', 2)} J/token", PLAIN))
    for key, unit, digits in (("volts", "V", 2), ("battery_percent", "% battery", 0)):
        if health.get(key) is not None:
            line.append((f"   {_figure(health, key, digits)} {unit}", PLAIN))
    for key in ("under_voltage", "throttled"):
        if health.get(key):
            line.append((f"   {key.replace('_', '-')}", RED))
    return _labelled("heat, power", line)


def _ladder(node: NodeView) -> list[Line]:
    """The sub-models worth running and those in use, the smallest first, a few to a line."""
    runs, largest = node.state.get("submodel"), node.state.get("largest")
    listed = node.info.get("submodels")
    items = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    params = {_text(item.get("name")): _number(item.get("effective_params")) or 0 for item in items}
    limit = params.get(_text(largest), -1)
    line: Line = []
    for item in items:
        name = _text(item.get("name"))
        if item.get("rung") is False and name not in (runs, largest):
            continue
        if name == runs:
            line.append((f"[{name}]", INVERSE))
        else:
            line.append((f" {name} ", PLAIN if params[name] <= limit else DIM))
        if name == largest:
            line.append(("|", RED if limit < max(params.values()) else GREEN))
    return [_labelled("ladder", line)] if line else []


def _work(node: NodeView) -> str:
    queue, health = _queue(node), node.health
    return (
        f"{_text(queue.get('running'))} running, {_text(queue.get('waiting'))} waiting (of "
        f"{_text(queue.get('limit'))})   {_figure(health, 'decode_tokens_per_second')} tokens/s, "
        f"prompts {_figure(health, 'prefill_tokens_per_second', 0)}   "
        f"context {_text(node.state.get('context_length'))}"
    )


def _queue(node: NodeView) -> dict[str, Any]:
    queue = node.state.get("queue")
    return queue if isinstance(queue, dict) else {}


def _labelled(label: str, line: Line) -> Line:
    return [(f"  {label:{LABEL}} ", DIM), *line]


def _bar(share: float) -> Line:
    share = min(1.0, max(0.0, share))
    full = round(share * BAR)
    style = GREEN if share < 0.7 else YELLOW if share < 0.9 else RED
    return [("█" * full, style), ("░" * (BAR - full), DIM)]


def _available(health: dict[str, Any]) -> str:
    available, total = map(_number, map(health.get, _MEMORY))
    if available is None:
        return "-"
    of = "" if total is None else f" of {format_bytes(int(total))}"
    return f"{format_bytes(int(available))}{of}"


def _figure(health: dict[str, Any], key: str, digits: int = 1) -> str:
    number = _number(health.get(key))
    return "-" if number is None else f"{number:.{digits}f}"


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _duration(seconds: float) -> str:
    days, rest = divmod(int(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    clock = f"{hours}:{rest // 60:02}:{rest % 60:02}"
    return f"{days} d {clock}" if days else clock
