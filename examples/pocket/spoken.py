"""How people say numbers, percentages, temperatures, times, durations and days.

Each function takes a `random.Random` and returns the spoken form, mostly with the value the command
carries. Values are normalised: 24-hour times, whole minutes (or seconds), Celsius. So "20 minutes
before 7 am" asks pocket to calculate. No sentences and no JSON here.
"""

from __future__ import annotations

import random
from typing import Final

import words as w

ONES: Final = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS: Final = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
WEEK: Final = tuple(day for day in w.DAYS if day.endswith("day") and day != "weekday")


def spell(number: int) -> str:
    """Write 0..99 in English words."""
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f" {ONES[ones]}" if ones else "")


def say_number(rng: random.Random, number: int) -> str:
    """Digits most of the time, words now and then."""
    return spell(number) if number < 100 and rng.random() < 0.3 else str(number)


def say_percent(rng: random.Random, number: int) -> str:
    """A percentage as people say it."""
    special = {
        10: "a tenth", 20: "a fifth", 25: "a quarter", 50: "half", 75: "three quarters",
        100: "the maximum",
    }  # fmt: skip
    if number in special and rng.random() < 0.3:
        return special[number]
    return say_number(rng, number) + rng.choice(["%", " percent", " per cent"])


def random_temperature(rng: random.Random, low: int, high: int) -> tuple[str, float]:
    """(spoken, degrees Celsius); half degrees now and then, Fahrenheit rounded to whole Celsius."""
    if rng.random() < 0.3:
        fahrenheit = rng.randint(round(low * 1.8 + 32), round(high * 1.8 + 32))
        unit = rng.choice([" degrees Fahrenheit", "°F", " F", " Fahrenheit"])
        return say_number(rng, fahrenheit) + unit, round((fahrenheit - 32) / 1.8)
    whole = rng.randint(low, high)
    unit = rng.choice([" degrees", "°C", " degrees Celsius", " Celsius", "°", " C"])
    if rng.random() < 0.3:
        said = f"{spell(whole)} and a half" if rng.random() < 0.4 else f"{whole}.5"
        return said + unit, whole + 0.5
    return say_number(rng, whole) + unit, whole


def say_time(rng: random.Random, hour: int, minute: int) -> str:
    """A time of day as people say it; never ambiguous between morning and evening."""
    if (hour, minute) in ((0, 0), (12, 0)) and rng.random() < 0.6:
        return "midnight" if hour == 0 else "noon"
    style = rng.randrange(3)
    if style == 0:
        return f"{hour:02d}:{minute:02d}" if rng.random() < 0.5 else f"{hour}:{minute:02d}"
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    tail = rng.choice([" am" if hour < 12 else " pm", f" {part}"])
    twelve = hour % 12 or 12
    # "quarter to twelve in the evening": nobody agrees on what comes next, so it is not said.
    if style == 1 or minute % 5 or (twelve == 11 and minute > 30):
        return f"{twelve}:{minute:02d}{tail}" if minute else f"{twelve}{tail}"
    if minute == 0:
        return rng.choice([f"{spell(twelve)}{tail}", f"{twelve} o'clock {part}"])
    if minute > 30:
        twelve = twelve % 12 + 1
    before = {15: "quarter past", 30: "half past", 45: "quarter to"}.get(minute)
    if before is None:
        past = f"{say_number(rng, minute)} past" if minute < 30 else None
        before = past or f"{say_number(rng, 60 - minute)} to"
    return f"{before} {rng.choice([str(twelve), spell(twelve)])}{tail}"


def random_time(rng: random.Random) -> tuple[str, str]:
    """(spoken, "HH:MM"); now and then a number of minutes before or after another time."""
    hour = rng.choice([*range(24), *range(6, 23)])
    minute = rng.choice([0, 15, 30, 45, rng.randrange(0, 60, 5), rng.randrange(60)])
    said = say_time(rng, hour, minute)
    if rng.random() < 0.12:
        offset, minute = rng.choice([5, 10, 15, 20, 30, 45]), minute // 5 * 5
        said = say_time(rng, hour, minute)
        later = rng.random() < 0.5
        count = "half an hour" if offset == 30 else f"{say_number(rng, offset)} minutes"
        said = f"{count} {'after' if later else 'before'} {said}"
        hour, minute = divmod((hour * 60 + minute + (offset if later else -offset)) % 1440, 60)
    return said, f"{hour:02d}:{minute:02d}"


def random_duration(rng: random.Random) -> tuple[str, dict[str, int]]:
    """(spoken, {"minutes": 137}); below a minute {"seconds": 45}."""
    style = rng.randrange(10)
    if style == 0:
        said, minutes = rng.choice(w.SPECIAL_DURATIONS)
        return said, {"minutes": minutes}
    if style <= 3:
        hours, minutes = (
            rng.randint(1, 9),
            rng.choice([rng.randint(1, 59), rng.randrange(5, 60, 5)]),
        )
        unit = "hour" if hours == 1 else "hours"
        said = f"{say_number(rng, hours)} {unit} and {say_number(rng, minutes)} minutes"
        return said, {"minutes": 60 * hours + minutes}
    if style == 3:
        seconds = rng.randint(5, 59)
        return f"{say_number(rng, seconds)} seconds", {"seconds": seconds}
    if style == 4:
        hours = rng.randint(2, 12)
        return f"{say_number(rng, hours)} hours", {"minutes": 60 * hours}
    minutes = rng.randint(2, 99)
    unit = rng.choice(["minutes", "min"])
    return f"{say_number(rng, minutes)} {unit}", {"minutes": minutes}


def random_day(rng: random.Random) -> tuple[str, str]:
    """(spoken, value): a weekday, "daily", "tomorrow" ..., or a date as "MM-DD"."""
    style = rng.random()
    if style < 0.2:
        number, month = rng.randint(1, 28), rng.randint(1, 12)
        suffix = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 if number // 10 != 1 else 0, "th")
        ordinal = f"{number}{suffix}"
        if number <= len(w.ORDINALS) and rng.random() < 0.4:
            ordinal = w.ORDINALS[number - 1]
        name = w.MONTHS[month - 1]
        said = rng.choice([f"on the {ordinal} of {name}", f"on {name} {number}"])
        return said, f"{month:02d}-{number:02d}"
    if style < 0.3:
        at, step = rng.randrange(7), rng.choice([-2, -1, 1, 2])
        count = "the day" if abs(step) == 1 else "two days"
        direction = "after" if step > 0 else "before"
        return f"{count} {direction} {WEEK[at].capitalize()}", WEEK[(at + step) % 7]
    day = rng.choice(list(w.DAYS))
    return rng.choice(w.DAYS[day]), day
