"""What the harness does to a node, and what must hold afterwards.

Each scenario returns its figures; `ok` says whether the promise of docs/mqtt.md held. `scale` is 1
for the full run and smaller in tests.
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import Broker, Node, pocket_bundle
from proxy import Proxy
from witness import Witness

Figures = dict[str, Any]
ROOMS = ("kitchen", "attic", "office", "garage", "bedroom", "cellar", "hall", "bathroom")
DEVICES = ("lamp", "heater", "fan", "radio", "curtains", "television", "water pump")
MOST_OPEN = 8
# Set by `run.py --bundle`: what `soak` loads and unloads, in place of pocket.
BUNDLE_WITH_ENCODERS: Path | None = None


def question(number: int) -> str:
    room, device = ROOMS[number % len(ROOMS)], DEVICES[number // len(ROOMS) % len(DEVICES)]
    minutes = number % 50 + 2
    return f"turn {'on' if number % 2 else 'off'} the {device} in the {room} in {minutes} minutes"


def broker_restarts(work: Path, scale: float) -> Figures:
    """Clean restarts of the broker while requests run: none lost, none answered twice."""
    requests, restarts = scaled(1000, scale), scaled(50, scale)
    broker, node, witness = start(work)
    done = 0
    for number in range(requests):
        witness.say(question(number), f"r{number}")
        witness.wait_outstanding(MOST_OPEN)
        if (number + 1) * restarts // requests > done:
            done += 1
            broker.stop()
            broker.start()
    witness.wait_outstanding(0)
    figures = {"restarts": done, **witness.verdict(), "sessions_lost": witness.sessions_lost}
    stop(broker, node, witness)
    return figures | {"ok": clean(figures) and figures["done"] == requests}


def engine_kills(work: Path, scale: float) -> Figures:
    """SIGKILL of the engine at random moments: exactly one final event for each request."""
    kills = scaled(200, scale)
    broker, node, witness = start(work)
    dice = random.Random(1)
    asked = 0
    for _ in range(kills):
        while witness.outstanding < MOST_OPEN:
            witness.say(question(asked), f"r{asked}")
            asked += 1
        node.kill_engine(dice, longest_wait=2.0)
    witness.wait_outstanding(0)
    figures = {"kills": kills, **witness.verdict()}
    stop(broker, node, witness)
    return figures | {"ok": clean(figures)}


def daemon_kills(work: Path, scale: float) -> Figures:
    """SIGKILL of the daemon at random moments: exactly one final event for each request."""
    kills = scaled(50, scale)
    broker, node, witness = start(work)
    dice = random.Random(2)
    asked = 0
    for _ in range(kills):
        until = time.monotonic() + dice.uniform(0.0, 3.0)
        while time.monotonic() < until:
            if witness.outstanding < MOST_OPEN:
                witness.say(question(asked), f"r{asked}")
                asked += 1
            else:
                time.sleep(0.005)
        node.stop(signal.SIGKILL)
        node.start()
    witness.wait_outstanding(0)
    figures = {"kills": kills, **witness.verdict()}
    stop(broker, node, witness)
    return figures | {"ok": clean(figures)}


def broker_kills(work: Path, scale: float, repeats: bool = True) -> Figures:
    """SIGKILL of the broker, which has saved nothing: with a client that asks again, none lost."""
    kills = scaled(20, scale)
    broker, node, witness = start(work, repeats=repeats)
    dice = random.Random(3)
    asked = 0
    for _ in range(kills):
        for _ in range(MOST_OPEN):
            witness.say(question(asked), f"r{asked}")
            asked += 1
        time.sleep(dice.uniform(0.0, 1.0))
        seen = witness.births
        broker.stop(signal.SIGKILL)
        broker.start()
        witness.wait(lambda seen=seen: witness.births > seen, "the node does not come back")
        if repeats:
            witness.wait_outstanding(0)
        witness.wait(lambda: witness.health.get("counters", {}).get("connections"), "no health")
    time.sleep(3.0)
    lost = witness.health["counters"]["sessions_lost"]
    figures = {"kills": kills, **witness.verdict(), "sessions_lost_by_the_node": lost}
    figures["announced_in_the_log"] = node.log().count("the broker has lost our session")
    stop(broker, node, witness)
    announced = lost == kills and figures["announced_in_the_log"] == lost
    return figures | {"ok": announced and (clean(figures) or not repeats)}


def broker_kills_without_asking_again(work: Path, scale: float) -> Figures:
    """The same with a client that does not ask again: losses are counted and announced."""
    return broker_kills(work, scale, repeats=False)


def link_flaps(work: Path, scale: float) -> Figures:
    """The node's line is cut and mended: availability is right each time, no storm of attempts."""
    flaps = scaled(100, scale)
    broker = Broker(work / "broker")
    broker.start()
    proxy = Proxy(broker.port)
    node = Node(work, pocket_bundle(work), proxy.port)
    node.start()
    witness = Witness(broker.port)
    witness.wait_online()
    dice = random.Random(4)
    wrong, back, attempts = 0, [], proxy.attempts
    for number in range(flaps):
        seen = len(witness.availability)
        proxy.cut()
        try:
            witness.wait(
                lambda seen=seen: (
                    len(witness.availability) > seen and witness.availability[seen][1] == "offline"
                ),
                "no offline",
                10,
            )
        except TimeoutError:
            wrong += 1
        time.sleep(dice.uniform(0.0, 1.0))
        proxy.mend()
        mended = time.monotonic()
        witness.wait_online()
        back.append(time.monotonic() - mended)
        witness.say(question(number), f"r{number}")
        witness.wait_outstanding(0)
    figures = {
        "flaps": flaps,
        "offline_not_announced": wrong,
        "seconds_until_online_again": {
            "median": round(statistics.median(back), 2),
            "longest": round(max(back), 2),
        },
        "attempts_to_connect_per_flap": round((proxy.attempts - attempts) / flaps, 1),
        **witness.verdict(),
    }
    stop(broker, node, witness)
    calm = figures["attempts_to_connect_per_flap"] < 10
    return figures | {"ok": clean(figures) and wrong == 0 and calm}


def overload(work: Path, scale: float) -> Figures:
    """Ten times the queue at once: what is too much is refused fast, memory stays, cancel works."""
    rounds, queue = scaled(10, scale), 16
    # Mosquitto's own limit of 20 messages in flight would let the rest wait there.
    broker, node, witness = start(work, "max_inflight_messages 0")
    witness.say(question(0), "warm-up")
    witness.wait_outstanding(0)
    memory = node.process().memory_info().rss
    for turn in range(rounds):
        for number in range(10 * queue):
            witness.say(question(number), f"r{turn}-{number}")
        witness.wait_outstanding(0)
    refused = [
        1000 * (item.first_after or 0)
        for item in witness.asked.values()
        if item.finals and item.finals[0].get("code") == "queue_full"
    ]
    # Some answers are over before their cancel comes.
    cancels = [cancel_running(witness, number) for number in range(max(10, scaled(20, scale)))]
    figures = {
        **witness.verdict(),
        "refusal_ms": {"median": round(statistics.median(refused), 1), "longest": max(refused)},
        "cancel_ms": {
            "median": round(statistics.median(cancels), 1),
            "longest": round(max(cancels), 1),
        },
        "daemon_grew_mb": round((node.process().memory_info().rss - memory) / 1e6, 1),
    }
    stop(broker, node, witness)
    fast = figures["refusal_ms"]["longest"] < 250 and figures["cancel_ms"]["longest"] < 100
    return figures | {"ok": clean(figures) and fast and figures["daemon_grew_mb"] < 20}


def cancel_running(witness: Witness, number: int) -> float:
    """Return the milliseconds from a cancel to its request's end."""
    request_id = f"cancel-{number}"
    # A large temperature keeps the answer from ending by itself.
    witness.say(question(number), request_id, temperature=5, max_tokens=1000, top_k=0, top_p=1)
    time.sleep(0.1)
    began = time.monotonic()
    witness.command("cancel", {"id": request_id}, f"t{number}")
    witness.wait_outstanding(0)
    return 1000 * (time.monotonic() - began)


def malformed(work: Path, scale: float) -> Figures:
    """Broken messages on every topic: no crash, and an answer wherever one is due."""
    messages = scaled(10_000, scale)
    broker, node, witness = start(work)
    pid = node.process().pid
    dice = random.Random(5)
    due = 0
    for number in range(messages):
        verb = dice.choice(("generate", "generate", "cancel", "submodel", "modality", "health"))
        payload = broken_payload(dice, number)
        if dice.random() < 0.2:
            witness.publish(
                f"blob/{dice.choice(('x', '..', 'é'))}/{dice.choice(BLOB_STEPS)}", payload
            )
            continue
        if verb == "generate":
            due += 1
            witness.ask_raw(payload, f"m{number}")
            witness.wait_outstanding(200)
        else:
            witness.publish(f"request/{verb}", payload, qos=0)
    witness.wait_outstanding(0)
    witness.say(question(1), "still-alive")
    witness.wait_outstanding(0)
    figures = {
        "messages": messages,
        "answers_due": due,
        **witness.verdict(),
        "daemon_survived": node.alive and node.process().pid == pid,
    }
    stop(broker, node, witness)
    return figures | {"ok": figures["lost"] == 0 and figures["daemon_survived"]}


BLOB_STEPS = ("init", "0", "fin", "-1", "99999999999999999999", "x", "init/init")


def broken_payload(dice: random.Random, number: int) -> bytes:
    """Return a request that has been damaged in one of many ways."""
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": question(number)}]}
    kind = dice.randrange(8)
    if kind == 0:
        return dice.randbytes(dice.randrange(200))
    if kind == 1:
        return json.dumps(fields).encode()[: dice.randrange(60)]
    if kind == 2:
        return b"[" * dice.randrange(1, 4000)
    if kind == 3:
        return json.dumps(fields | {dice.choice("abcdef"): 1}).encode()
    if kind == 4:
        key = dice.choice(("max_tokens", "temperature", "submodel", "stop", "priority", "effort"))
        return json.dumps(
            fields | {key: dice.choice((None, -1, "x", [], {}, 1e400, True))}
        ).encode()
    if kind == 5:
        fields["messages"][0]["content"] = dice.choice(([], [{}], 7, [{"type": "image"}], {}))
        return json.dumps(fields).encode()
    if kind == 6:
        media = {"type": "image", "data": "A" * dice.randrange(50), "blob": dice.choice(("", "x"))}
        fields["messages"][0]["content"] = [media]
        return json.dumps(fields).encode()
    data = bytearray(json.dumps(fields).encode())
    for _ in range(dice.randrange(1, 6)):
        data[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(data)


def soak(work: Path, scale: float) -> Figures:
    """Encoders load and unload, requests come and go: memory and file descriptors stay flat."""
    cycles, requests = scaled(500, scale), scaled(2000, scale)
    bundle = BUNDLE_WITH_ENCODERS or pocket_bundle(work, ("text", "vision", "audio"))
    # Answers of the last seconds are kept on purpose: few of them, so that a leak would show.
    broker, node, witness = start(work, bundle=bundle, engine={"session_cache_bytes": 0})
    witness.wait(lambda: witness.state.get("phase") == "ready", "the engine does not load")
    memory: list[tuple[float, float]] = []
    descriptors: list[tuple[int, int]] = []
    asked = 0
    for number in range(cycles):
        modality = ("vision", "audio")[number % 2]
        for enabled in (True, False):
            fields = {"modality": modality, "enabled": enabled}
            witness.command("modality", fields, f"{number} {enabled}")
            witness.wait(
                lambda modality=modality, enabled=enabled: (
                    (modality in witness.state["modalities"]) == enabled
                ),
                "an encoder neither loads nor unloads",
            )
        while asked < (number + 1) * requests // cycles:
            witness.say(question(asked), f"r{asked}", max_tokens=16, expires_in=10)
            asked += 1
        witness.wait_outstanding(0)
        daemon, engine = node.process(), node.engine()
        assert engine is not None
        memory.append((daemon.memory_info().rss / 1e3, engine.memory_info().rss / 1e3))
        descriptors.append((daemon.num_fds(), engine.num_fds()))
    half = len(memory) // 2
    figures: Figures = {"cycles": cycles, **witness.verdict()}
    for index, name in enumerate(("daemon", "engine")):
        kilobytes = [pair[index] for pair in memory[half:]]
        slope, noise = trend(kilobytes)
        figures[f"{name}_rss_mb"] = round(kilobytes[-1] / 1e3, 1)
        figures[f"{name}_kb_per_cycle"] = f"{slope:.2f} +- {noise:.2f}"
        figures[f"{name}_grew_in_second_half_mb"] = round(slope * len(kilobytes) / 1e3, 2)
        figures[f"{name}_descriptors"] = f"{descriptors[half][index]} -> {descriptors[-1][index]}"
    stop(broker, node, witness)
    flat = all(descriptors[half][i] >= descriptors[-1][i] for i in (0, 1))
    grown = max(figures[f"{name}_grew_in_second_half_mb"] for name in ("daemon", "engine"))
    return figures | {"ok": clean(figures) and flat and grown < 5}


def trend(values: list[float]) -> tuple[float, float]:
    """Return the slope of a straight line through `values`, and its standard error."""
    if len(values) < 3:
        return 0.0, 0.0
    places = range(len(values))
    line = statistics.linear_regression(places, values)
    rests = [v - line.slope * x - line.intercept for x, v in zip(places, values, strict=True)]
    spread = sum((x - statistics.fmean(places)) ** 2 for x in places)
    variance = sum(rest**2 for rest in rests) / (len(values) - 2)
    return line.slope, (variance / spread) ** 0.5


SCENARIOS: dict[str, Callable[[Path, float], Figures]] = {
    item.__name__: item
    for item in (
        broker_restarts,
        engine_kills,
        daemon_kills,
        broker_kills,
        broker_kills_without_asking_again,
        link_flaps,
        overload,
        malformed,
        soak,
    )
}


def start(
    work: Path,
    *lines: str,
    repeats: bool = True,
    bundle: Path | None = None,
    **settings: object,
) -> tuple[Broker, Node, Witness]:
    broker = Broker(work / "broker", *lines)
    broker.start()
    node = Node(work, bundle or pocket_bundle(work), broker.port, **settings)
    node.start()
    witness = Witness(broker.port, repeats=repeats)
    witness.wait_online()
    return broker, node, witness


def stop(broker: Broker, node: Node, witness: Witness) -> None:
    witness.close()
    node.stop()
    broker.stop()


def scaled(count: int, scale: float) -> int:
    return max(1, round(count * scale))


def clean(figures: Figures) -> bool:
    return figures["lost"] == 0 and figures["contradictory"] == 0
