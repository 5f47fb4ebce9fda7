"""pocket's grammar: one random clean request and the one command it means.

Every function takes a `random.Random` and returns `(request, command)`; the same generator state
gives the same pair. No noise, no split, no tokens here: see data.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import words as w
from spoken import (
    random_day,
    random_duration,
    random_temperature,
    random_time,
    say_number,
    say_percent,
)

Command = dict[str, Any]
Pair = tuple[str, Command]


def pick_room(rng: random.Random, nowhere: float = 0.12) -> tuple[str, str | None]:
    """(" in the kitchen", "kitchen"); sometimes no room, all rooms, or a correction."""
    if rng.random() < nowhere:
        return "", None
    if rng.random() < 0.06:
        return rng.choice([" everywhere", " in every room", " in all rooms"]), "all"
    room = rng.choice(list(w.ROOMS))
    name = rng.choice(w.ROOMS[room])
    if rng.random() < 0.07:
        other = rng.choice(w.ROOMS[rng.choice([r for r in w.ROOMS if r != room])])
        return rng.choice(
            [
                f" in the {other}, no wait, in the {name}",
                f" in the {other}, sorry, I mean the {name}",
                f" not in the {other} but in the {name}",
            ]
        ), room
    return f" in the {name}", room


def put(command: Command, **slots: object) -> Command:
    """Add the slots that have a value, in the order given."""
    return command | {key: value for key, value in slots.items() if value is not None}


def one_of(rng: random.Random, table: dict[str, tuple[str, ...]]) -> tuple[str, str]:
    """(key, spoken form) of a random entry."""
    key = rng.choice(list(table))
    return key, rng.choice(table[key])


def power(rng: random.Random) -> Pair:
    """Switch a device."""
    device, said = one_of(rng, w.DEVICES)
    where, room = pick_room(rng)
    action = rng.choice(["on", "off", "off", "on", "toggle"])
    patterns = {
        "on": ["turn on the {d}{r}", "switch on the {d}{r}", "turn the {d}{r} on",
               "start the {d}{r}", "power up the {d}{r}", "{d} on{r}", "I want the {d}{r} on",
               "get the {d}{r} running", "let the {d}{r} run"],
        "off": ["turn off the {d}{r}", "switch off the {d}{r}", "turn the {d}{r} off",
                "shut down the {d}{r}", "{d} off{r}", "kill the {d}{r}", "stop the {d}{r}",
                "we don't need the {d}{r} any more", "cut the power of the {d}{r}"],
        "toggle": ["toggle the {d}{r}", "flip the {d}{r}", "change the state of the {d}{r}"],
    }  # fmt: skip
    request = rng.choice(patterns[action]).format(d=said, r=where)
    return request, put({"action": action}, device=device, room=room)


def schedule(rng: random.Random) -> Pair:
    """Switch a device at a time, on a day, or after a while."""
    request, command = rng.choice([power, power, colour, openings])(rng)
    style = rng.random()
    if style < 0.35:
        said, after = random_duration(rng)
        tail = rng.choice([f" in {said}", f" after {said}", f" {said} from now"])
        return request + tail, command | {"after": after}
    if style < 0.5:
        (start_said, start), (end_said, end) = random_time(rng), random_time(rng)
        when = rng.choice(
            [f"between {start_said} and {end_said}", f"from {start_said} to {end_said}"]
        )
        return rng.choice([f"{request} {when}", f"{when} {request}"]), command | {
            "from": start,
            "to": end,
        }
    said, at = random_time(rng)
    day_said, day = random_day(rng) if rng.random() < 0.5 else ("", None)
    when = rng.choice([f"{day_said} at {said}", f"at {said} {day_said}"]).strip()
    text = rng.choice([f"{request} {when}", f"{when} {request}"])
    return text, put(command, time=at, day=day)


def level(rng: random.Random) -> Pair:
    """Set a level, or change it by an amount."""
    device = rng.choice(list(w.LEVELS))
    prop, low, high, step, props = w.LEVELS[device]
    said, spoken_prop = rng.choice(w.DEVICES[device]), rng.choice(props)
    where, room = pick_room(rng)
    command = put({"action": "set"}, device=device, room=room, property=prop)
    is_percent = prop in ("brightness", "humidity", "power")
    value = rng.randrange(low, high + 1, step)
    amount = say_percent(rng, value) if is_percent else say_number(rng, value)
    if rng.random() < 0.3:
        value = rng.randrange(step, max(step * 4, high // 2) + 1, step)
        amount = say_number(rng, value) + (rng.choice(["%", " percent"]) if is_percent else "")
        up = rng.random() < 0.5
        verb = rng.choice(
            ["increase", "raise", "turn up"] if up else ["lower", "reduce", "turn down"]
        )
        request = rng.choice(
            [f"{verb} the {spoken_prop} of the {said}{where} by {amount}",
             f"by {amount} {verb} the {said} {spoken_prop}{where}"]
        )  # fmt: skip
        return request, command | {"action": "increase" if up else "decrease", "value": value}
    request = rng.choice(
        [f"set the {spoken_prop} of the {said}{where} to {amount}",
         f"set the {said}{where} to {amount} {spoken_prop}",
         f"put the {said} {spoken_prop}{where} at {amount}",
         f"{said}{where} {spoken_prop} {amount}",
         f"I want {amount} {spoken_prop} on the {said}{where}",
         f"change the {said}{where} to a {spoken_prop} of {amount}"]
    )  # fmt: skip
    return request, command | {"value": value}


def colour(rng: random.Random) -> Pair:
    """Give a light a colour."""
    tint, device = rng.choice(w.COLOURS), rng.choice(["light", "lamp"])
    said, (where, room) = rng.choice(w.DEVICES[device]), pick_room(rng)
    request = rng.choice(
        [f"make the {said}{where} {tint}", f"set the {said}{where} to {tint}",
         f"I'd love {tint} for the {said}{where}", f"colour the {said}{where} {tint}",
         f"change the colour of the {said}{where} to {tint}", f"{tint} {said}{where}"]
    )  # fmt: skip
    return request, put({"action": "set"}, device=device, room=room, color=tint)


def thermostat(rng: random.Random) -> Pair:
    """Set a temperature, in degrees Celsius."""
    where, room = pick_room(rng)
    said, value = random_temperature(rng, 6, 30)
    request = rng.choice(
        [f"set the thermostat{where} to {said}", f"heat to {said}{where}", f"make it {said}{where}",
         f"keep it at {said}{where}", f"I want {said}{where}", f"thermostat{where} {said}"]
    )  # fmt: skip
    return request, put({"action": "set"}, device="thermostat", room=room, value=value)


def openings(rng: random.Random) -> Pair:
    """Doors and covers: lock, unlock, open, close, or move to a position."""
    if rng.random() < 0.5:
        device, said = one_of(rng, w.OPENINGS)
        where, room = "", None
        action = rng.choice(["lock", "unlock", "open", "close"])
    else:
        device, said = one_of(rng, w.COVERS)
        where, room = pick_room(rng)
        action = rng.choice(["open", "close", "position"])
    if action == "position":
        value = rng.randrange(5, 100, 5)
        amount = say_percent(rng, value)
        request = rng.choice(["open the {d}{r} to {a}", "move the {d}{r} to {a}",
                              "set the {d}{r} to {a} open"])  # fmt: skip
        command = put({"action": "set"}, device=device, room=room, property="position", value=value)
        return request.format(d=said, r=where, a=amount), command
    patterns = {
        "lock": ["lock the {d}", "bolt the {d}", "make sure the {d} is locked"],
        "unlock": ["unlock the {d}", "unbolt the {d}", "release the lock of the {d}"],
        "open": ["open the {d}{r}", "open up the {d}{r}", "I want the {d}{r} open"],
        "close": ["close the {d}{r}", "shut the {d}{r}", "I want the {d}{r} closed"],
    }  # fmt: skip
    request = rng.choice(patterns[action]).format(d=said, r=where)
    return request, put({"action": action}, device=device, room=room)


def status(rng: random.Random) -> Pair:
    """Ask whether a device runs, or a door or cover is open."""
    if rng.random() < 0.35:
        device, said = one_of(rng, w.OPENINGS)
        where, room = "", None
        if rng.random() < 0.5:
            device, said = one_of(rng, w.COVERS)
            where, room = pick_room(rng)
        patterns = ["is the {d}{r} open", "did I close the {d}{r}", "is the {d}{r} shut",
                    "what about the {d}{r}, open or closed", "check the {d}{r}"]  # fmt: skip
    else:
        device, said = one_of(rng, w.DEVICES)
        where, room = pick_room(rng)
        patterns = ["is the {d}{r} on", "is the {d}{r} running", "did I leave the {d}{r} on",
                    "is the {d} still on{r}", "what is the {d}{r} doing"]  # fmt: skip
    request = rng.choice(patterns).format(d=said, r=where)
    return request, put({"action": "status"}, device=device, room=room)


def read(rng: random.Random) -> Pair:
    """Ask a sensor, now or as a statistic over a period."""
    sensor = rng.choice(list(w.SENSORS))
    nouns, questions = w.SENSORS[sensor][:2]
    noun, (where, room) = rng.choice(nouns), pick_room(rng)
    command = put({"action": "read"}, sensor=sensor, room=room)
    if rng.random() < 0.35:
        stat, word = one_of(rng, w.STATISTICS)
        count, unit = rng.randint(2, 30), rng.choice(["hours", "days"])
        period = f"{count}{unit[0]}"
        since = rng.choice(["over the last", "in the past", "during the last"])
        since = f"{since} {say_number(rng, count)} {unit}"
        if rng.random() < 0.2:
            since, period = rng.choice([("today", "today"), ("yesterday", "yesterday")])
        request = rng.choice(
            [f"what was the {word} {noun}{where} {since}", f"{word} {noun}{where} {since}",
             f"show me the {word} {noun} {since}{where}"]
        )  # fmt: skip
        return request, put(command, stat=stat, period=period)
    if questions and rng.random() < 0.5:
        return rng.choice(questions) + where, command
    request = rng.choice(
        [f"what is the {noun}{where}", f"read the {noun}{where}", f"{noun}{where}",
         f"{noun} value{where}", f"tell me the {noun}{where}",
         f"what does the {noun} sensor{where} say", f"I need the {noun}{where}"]
    )  # fmt: skip
    return request, command


def condition(rng: random.Random) -> tuple[str, Command]:
    """(" the humidity in the attic goes above 70%", its slots)."""
    sensor = rng.choice(list(w.SENSORS))
    nouns, _, low, high, step, units = w.SENSORS[sensor]
    where, room = pick_room(rng, nowhere=0.2)
    value: float = rng.randrange(low, high + 1, step)
    amount = say_number(rng, int(value)) + rng.choice(units)
    if sensor == "temperature":
        amount, value = random_temperature(rng, low, high)
    key, phrase = rng.choice([("above", rng.choice(w.ABOVE)), ("below", rng.choice(w.BELOW))])
    text = f"the {rng.choice(nouns)}{where} {phrase} {amount}"
    return text, put({"sensor": sensor}, room=room) | {key: value}


def automation(rng: random.Random) -> Pair:
    """Do something, or send an alert, when a sensor crosses a threshold."""
    when, slots = condition(rng)
    if rng.random() < 0.2:
        also, more = condition(rng)
        joint = rng.choice(["and", "or"])
        when, slots = f"{when} {joint} {also}", {joint: [slots, more]}
    word = rng.choice(["when", "if", "as soon as", "whenever"])
    if rng.random() < 0.35:
        alert = rng.choice(["warn me", "send me an alert", "let me know", "notify me", "tell me"])
        request = rng.choice([f"{alert} {word} {when}", f"{word} {when}, {alert}"])
        return request, {"action": "alert", "if": slots}
    what, command = rng.choice([power, power, openings, colour])(rng)
    request = rng.choice(
        [f"{what} {word} {when}", f"{word} {when}, {what}", f"{word} {when} {what}"]
    )
    return request, command | {"if": slots}


def timer(rng: random.Random) -> Pair:
    """Start or cancel a timer."""
    label = rng.choice(w.TIMER_LABELS) if rng.random() < 0.8 else None
    name = f"{label} timer" if label else "timer"
    article = "an" if name[0] in "aeiou" else "a"
    if label and rng.random() < 0.15:
        request = rng.choice([f"cancel the {name}", f"stop the {name}", f"delete my {name}"])
        return request, {"action": "cancel_timer", "label": label}
    said, duration = random_duration(rng)
    request = rng.choice(
        [f"set {article} {name} for {said}", f"start {article} {name} for {said}", f"{name} {said}",
         f"{name}, {said}", f"I need {article} {name} of {said}"]
    )  # fmt: skip
    return request, put({"action": "timer"}, label=label) | duration


def remind(rng: random.Random) -> Pair:
    """Remind a person of a chore, at a time or after a while."""
    verb, objects = rng.choice(w.CHORES)
    text = f"{verb} {rng.choice(objects)}"
    who = rng.choice(w.NAMES) if rng.random() < 0.7 else None
    command = put({"action": "remind"}, who=who or "me", text=text)
    person = who or "me"
    if rng.random() < 0.3:
        said, after = random_duration(rng)
        when, command = f"in {said}", command | {"after": after}
    else:
        said, at = random_time(rng)
        day_said, day = random_day(rng) if rng.random() < 0.4 else ("", None)
        when, command = f"{day_said} at {said}".strip(), put(command, time=at, day=day)
    request = rng.choice(
        [f"remind {person} to {text} {when}", f"{when} remind {person} to {text}",
         f"remind {person} {when} to {text}", f"tell {person} {when} to {text}"]
    )  # fmt: skip
    return request, command


def scene(rng: random.Random) -> Pair:
    """Start a scene."""
    name, (where, room) = rng.choice(w.SCENES), pick_room(rng, nowhere=0.3)
    request = rng.choice(
        [f"start the {name} scene{where}", f"{name} mode{where}", f"activate {name}{where}",
         f"set the scene to {name}{where}", f"it's time for {name}{where}"]
    )  # fmt: skip
    return request, put({"action": "scene"}, name=name, room=room)


def off_topic(rng: random.Random) -> Pair:
    """Nothing pocket can do."""
    first, second = w.OFF_TOPIC
    return f"{rng.choice(first)} {rng.choice(second)}", {"action": "unknown"}


FAMILIES: tuple[tuple[Callable[[random.Random], Pair], int], ...] = (
    (power, 12), (schedule, 12), (level, 12), (colour, 5), (thermostat, 7), (openings, 7),
    (status, 5), (read, 12), (automation, 12), (timer, 7), (remind, 9), (scene, 4), (off_topic, 2),
)  # fmt: skip
SHORT: tuple[Callable[[random.Random], Pair], ...] = (
    power, level, colour, openings, timer, scene, thermostat,
)  # fmt: skip


def clean_pair(rng: random.Random) -> Pair:
    """One request of any family, or two short ones in one sentence."""
    if rng.random() < 0.08:
        (one, first), (two, second) = (rng.choice(SHORT)(rng) for _ in range(2))
        joint = rng.choice([" and ", " and then ", ", then ", "; also "])
        return one + joint + two, {"action": "all", "of": [first, second]}
    family = rng.choices([f for f, _ in FAMILIES], [weight for _, weight in FAMILIES])[0]
    return family(rng)
