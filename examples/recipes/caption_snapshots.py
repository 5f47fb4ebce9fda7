"""Say what is on each snapshot that a camera publishes: JPEG bytes in, a sentence out, over MQTT.

python3 caption_snapshots.py --host broker.lan --node kitchen 'frigate/+/person/snapshot'

The sentence goes to captions/<the snapshot's topic>, retained. Where snapshots come faster than
they are read, only the newest of each camera is.
"""

from __future__ import annotations

import json
from queue import Queue

from common import arguments, ask, node
from paho.mqtt import client as paho

from nestd.cli.media import Medium

PROMPT = "Say in one short sentence what is on this picture of a security camera."


def main() -> None:
    """Run until interrupted."""
    parser = arguments(__doc__)
    parser.add_argument("topic", help="where snapshots are published; a filter")
    parser.add_argument("--prompt", default=PROMPT)
    args = parser.parse_args()
    newest: dict[str, bytes] = {}
    waiting: Queue[str] = Queue()

    def on_connect(camera: paho.Client, *_: object) -> None:
        camera.subscribe(args.topic)

    def on_message(_client: paho.Client, _userdata: object, message: paho.MQTTMessage) -> None:
        # An empty or an old (retained) picture is nothing that has happened now.
        if message.payload and not message.retain:
            if message.topic not in newest:
                waiting.put(message.topic)
            newest[message.topic] = message.payload

    camera = paho.Client(paho.CallbackAPIVersion.VERSION2)
    camera.on_connect, camera.on_message = on_connect, on_message
    with node(args) as client:
        camera.connect(args.host, args.port)
        camera.loop_start()
        print(f"waiting for snapshots on {args.topic}", flush=True)
        while True:
            topic = waiting.get()
            picture = Medium({"type": "image"}, newest.pop(topic))
            done = ask(client, args.prompt, [picture], max_tokens=60)
            caption = {"caption": done["text"].strip(), "submodel": done["submodel"]}
            camera.publish(f"captions/{topic}", json.dumps(caption), qos=1, retain=True)
            print(f"{topic}: {caption['caption']}", flush=True)


if __name__ == "__main__":
    main()
