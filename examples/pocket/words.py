"""The closed word tables of pocket's task: canonical slot values and how people say them.

Knows words only: no sentences, no randomness, no JSON. An entry's key is what a command carries.
"""

from __future__ import annotations

from typing import Final

ROOMS: Final[dict[str, tuple[str, ...]]] = {
    "kitchen": ("kitchen",),
    "living_room": ("living room", "lounge", "sitting room"),
    "bedroom": ("bedroom", "main bedroom"),
    "kids_room": ("kids' room", "children's room", "nursery"),
    "guest_room": ("guest room", "spare room"),
    "bathroom": ("bathroom", "washroom"),
    "office": ("office", "study"),
    "hall": ("hall", "hallway", "corridor"),
    "garage": ("garage",),
    "basement": ("basement", "cellar"),
    "attic": ("attic", "loft"),
    "garden": ("garden", "backyard"),
    "greenhouse": ("greenhouse",),
    "workshop": ("workshop",),
}

DEVICES: Final[dict[str, tuple[str, ...]]] = {
    "light": ("light", "lights", "ceiling light"),
    "lamp": ("lamp", "reading lamp", "table lamp"),
    "fan": ("fan", "ventilator"),
    "heater": ("heater", "radiator", "heating"),
    "ac": ("air conditioner", "AC", "air conditioning"),
    "tv": ("TV", "television", "telly"),
    "speaker": ("speaker", "music box"),
    "humidifier": ("humidifier",),
    "purifier": ("air purifier", "air cleaner"),
    "pump": ("pump", "water pump"),
    "sprinkler": ("sprinkler", "irrigation"),
    "kettle": ("kettle",),
    "coffee_machine": ("coffee machine", "coffee maker"),
    "socket": ("socket", "outlet", "smart plug"),
}

# device -> (property, lowest, highest, step, spoken forms of the property)
LEVELS: Final[dict[str, tuple[str, int, int, int, tuple[str, ...]]]] = {
    "light": ("brightness", 5, 100, 5, ("brightness", "light level")),
    "lamp": ("brightness", 5, 100, 5, ("brightness",)),
    "fan": ("speed", 1, 9, 1, ("speed", "level")),
    "tv": ("volume", 1, 60, 1, ("volume", "sound")),
    "speaker": ("volume", 1, 60, 1, ("volume", "sound")),
    "humidifier": ("humidity", 30, 70, 5, ("target humidity", "humidity")),
    "pump": ("power", 10, 100, 10, ("power", "output")),
}

OPENINGS: Final[dict[str, tuple[str, ...]]] = {
    "front_door": ("front door", "main door"),
    "back_door": ("back door", "rear door"),
    "patio_door": ("patio door", "terrace door"),
    "garage_door": ("garage door",),
    "gate": ("gate", "driveway gate"),
    "shed": ("shed", "garden shed"),
}

COVERS: Final[dict[str, tuple[str, ...]]] = {
    "blinds": ("blinds", "shutters"),
    "curtains": ("curtains", "drapes"),
    "window": ("window", "windows"),
    "skylight": ("skylight", "roof window"),
}

COLOURS: Final[tuple[str, ...]] = (
    "red", "green", "blue", "yellow", "orange", "purple", "pink", "turquoise", "white", "amber",
)  # fmt: skip

# sensor -> (nouns, questions without a noun, lowest and highest threshold, step, unit words)
SENSORS: Final[
    dict[str, tuple[tuple[str, ...], tuple[str, ...], int, int, int, tuple[str, ...]]]
] = {
    "temperature": (
        ("temperature",), ("how warm is it", "how hot is it", "how cold is it"),
        5, 40, 1, (" degrees", " °C", " C", ""),
    ),
    "humidity": (
        ("humidity", "air humidity"), ("how humid is it", "how damp is the air"),
        20, 95, 5, ("%", " percent", ""),
    ),
    "co2": (
        ("CO2", "carbon dioxide", "CO2 level"), ("how stale is the air",),
        600, 2000, 50, (" ppm", ""),
    ),
    "pm25": (
        ("fine dust", "PM2.5", "particle level"), ("how dusty is the air",),
        5, 150, 5, (" micrograms", ""),
    ),
    "pressure": (
        ("air pressure", "barometer"), (),
        960, 1050, 1, (" hPa", " millibar", ""),
    ),
    "light_level": (
        ("light level", "illuminance"), ("how bright is it", "how dark is it"),
        10, 900, 10, (" lux", ""),
    ),
    "noise": (
        ("noise level", "noise"), ("how loud is it", "how noisy is it"),
        30, 95, 1, (" decibels", " dB", ""),
    ),
    "soil_moisture": (
        ("soil moisture", "moisture of the soil"), ("how dry is the soil",),
        10, 80, 5, ("%", " percent", ""),
    ),
    "power": (
        ("power draw", "power consumption"), ("how much power is being used",),
        100, 3000, 100, (" watts", " W"),
    ),
    "water_level": (
        ("water level", "tank level"), ("how full is the tank",),
        5, 95, 5, ("%", " percent", ""),
    ),
}  # fmt: skip

STATISTICS: Final[dict[str, tuple[str, ...]]] = {
    "min": ("lowest", "minimum"),
    "max": ("highest", "maximum", "peak"),
    "avg": ("average", "mean"),
}

ABOVE: Final[tuple[str, ...]] = (
    "goes above", "rises above", "is over", "climbs past", "exceeds", "is more than", "gets above",
)  # fmt: skip
BELOW: Final[tuple[str, ...]] = (
    "drops below", "falls under", "is under", "sinks below", "is less than", "gets below",
)  # fmt: skip

SCENES: Final[tuple[str, ...]] = (
    "movie night", "good morning", "good night", "dinner", "party", "reading", "away", "holiday",
    "homework", "cleaning", "romantic evening", "yoga",
)  # fmt: skip

TIMER_LABELS: Final[tuple[str, ...]] = (
    "pasta", "egg", "pizza", "laundry", "tea", "bread", "nap", "rice", "workout", "oven", "cake",
    "parking", "meditation", "soup",
)  # fmt: skip

NAMES: Final[tuple[str, ...]] = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Kira",
    "Liam", "Maria", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tom", "Zoë", "José", "Mum", "Dad",
    "Grandma",
)  # fmt: skip

CHORES: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("water", ("the plants", "the tomatoes", "the lawn", "the roses")),
    ("feed", ("the cat", "the dog", "the fish", "the hens")),
    ("call", ("the dentist", "the bank", "the school", "the plumber", "the landlord")),
    ("buy", ("milk", "bread", "eggs", "batteries", "stamps", "flowers")),
    ("take out", ("the bins", "the recycling", "the dog")),
    ("pay", ("the rent", "the bill", "the plumber", "the school")),
    ("pick up", ("the parcel", "the laundry", "the kids", "the cake", "flowers")),
    ("clean", ("the filter", "the oven", "the windows", "the car")),
    ("charge", ("the car", "the drill", "the phone", "batteries")),
    ("check", ("the boiler", "the oven", "the mail", "the car", "the filter")),
)

DAYS: Final[dict[str, tuple[str, ...]]] = {
    "tomorrow": ("tomorrow",),
    "monday": ("on Monday",),
    "tuesday": ("on Tuesday",),
    "wednesday": ("on Wednesday",),
    "thursday": ("on Thursday",),
    "friday": ("on Friday",),
    "saturday": ("on Saturday",),
    "sunday": ("on Sunday",),
    "daily": ("every day", "daily", "each day"),
    "weekdays": ("on weekdays", "every weekday"),
    "weekend": ("on weekends", "at the weekend"),
}

MONTHS: Final[tuple[str, ...]] = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
ORDINALS: Final[tuple[str, ...]] = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
    "eleventh", "twelfth",
)  # fmt: skip

SPECIAL_DURATIONS: Final[tuple[tuple[str, int], ...]] = (
    ("half an hour", 30), ("a quarter of an hour", 15), ("an hour", 60), ("a minute", 1),
    ("three quarters of an hour", 45), ("an hour and a half", 90), ("one and a half hours", 90),
    ("two and a half hours", 150), ("three and a half hours", 210), ("a couple of minutes", 2),
    ("an hour and a quarter", 75), ("a couple of hours", 120), ("a dozen minutes", 12),
)  # fmt: skip

POLITE_BEFORE: Final[tuple[str, ...]] = (
    "please ", "could you ", "can you ", "would you please ", "hey pocket, ", "pocket, ", "ok, ",
    "hi, please ", "I'd like you to ", "um, ", "be so kind and ", "quick one: ", "hello, can you ",
)  # fmt: skip
POLITE_AFTER: Final[tuple[str, ...]] = (
    " please", ", please", " thanks", ", thank you", " for me", " if you can", ", will you",
    " right now",
)  # fmt: skip
CHATTER: Final[tuple[str, ...]] = (
    "I'm cold. ", "We have guests. ", "It's late. ", "I just got home. ", "Sorry to bother you. ",
    "I can't find the remote. ", "Long day. ", "The baby is asleep. ",
)  # fmt: skip

# Things pocket has no command for; every sentence is a pair of halves.
OFF_TOPIC: Final[tuple[tuple[str, ...], tuple[str, ...]]] = (
    (
        "tell me a joke about", "who invented", "write a poem about", "what is the capital of",
        "sing a song about", "what do you think about", "how do I cook", "translate the word for",
        "explain the history of", "why do people like",
    ),
    (
        "France", "cats", "the moon", "pancakes", "football", "robots", "love", "mushrooms", "Peru",
        "bicycles", "dragons", "chess", "the sea", "tractors", "coffee", "winter",
    ),
)  # fmt: skip
