"""Talk to the house: a conversation that may switch lights and read temperatures, without internet.

python3 assistant.py --host broker.lan --node kitchen

Lights obey home/<room>/light/set (ON, OFF); temperatures are the retained home/<room>/temperature.
"""

from __future__ import annotations

import argparse
import sys
import uuid
from typing import Any

from common import arguments, ask, node
from paho.mqtt import client as paho

from nestd.client import Client

SYSTEM = "You are the voice of a house. Answer in one or two short sentences."
ROOMS = ("attic", "hall", "kitchen")
ROOM = {"enum": list(ROOMS)}
TOOLS = [
    {
        "name": "set_light",
        "description": "Switch the light of a room on or off.",
        "parameters": {
            "type": "object",
            "properties": {"room": ROOM, "on": {"type": "boolean"}},
            "required": ["room", "on"],
            "additionalProperties": False,
        },
    },
    {
        "name": "read_temperature",
        "description": "Tell how warm a room is.",
        "parameters": {
            "type": "object",
            "properties": {"room": ROOM},
            "required": ["room"],
            "additionalProperties": False,
        },
    },
]


class House:
    """The house's own topics."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._temperatures: dict[str, str] = {}
        self._broker = paho.Client(paho.CallbackAPIVersion.VERSION2)
        self._broker.on_connect = lambda broker, *_: broker.subscribe("home/+/temperature")
        self._broker.on_message = self._on_message
        self._broker.connect(args.host, args.port)
        self._broker.loop_start()

    def _on_message(self, _client: object, _userdata: object, message: paho.MQTTMessage) -> None:
        room = message.topic.split("/")[1]
        self._temperatures[room] = message.payload.decode(errors="replace")

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Do what the model asks for and say what came of it.

        Arguments keep to the tool's schema; what may be switched is decided here all the same.
        """
        room = arguments["room"]
        if name == "set_light":
            state = "ON" if arguments["on"] else "OFF"
            self._broker.publish(f"home/{room}/light/set", state, qos=1).wait_for_publish(10)
            return f"The light in the {room} is {state}."
        degrees = self._temperatures.get(room)
        return f"It is {degrees} degrees in the {room}." if degrees else "No sensor there."


def answer(client: Client, house: House, question: str, choice: str, conversation: str) -> str:
    """Return the answer to one question, after at most one call of a tool."""
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    fields = {"conversation": conversation, "max_tokens": 120}
    done = ask(client, turns, tools=TOOLS, tool_choice=choice, **fields)
    if done["tool_call"] is not None:
        name, arguments = done["tool_call"]["name"], done["tool_call"]["arguments"]
        result = house.call(name, arguments)
        print(f"  ({name} {arguments}: {result})", flush=True)
        done = ask(client, [{"role": "tool", "content": result}], **fields)
    return str(done["text"]).strip()


def main() -> None:
    """Answer each line of standard input."""
    parser = arguments(__doc__)
    parser.add_argument("--tool-choice", default="auto", help="auto, required, none or a tool")
    args = parser.parse_args()
    conversation = uuid.uuid4().hex
    with node(args) as client:
        house = House(args)
        for question in sys.stdin:
            print(
                answer(client, house, question.strip(), args.tool_choice, conversation), flush=True
            )


if __name__ == "__main__":
    main()
