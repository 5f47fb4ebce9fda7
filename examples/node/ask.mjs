// Ask a nestd node and print the answer as it comes.
//   npm install && node ask.mjs [--broker mqtt://localhost] [--node kitchen] [--submodel auto] "turn the light on"
// Exit status: 0 answered, 1 an error was answered, 2 no answer.
import { randomUUID } from "node:crypto";
import { parseArgs } from "node:util";
import mqtt from "mqtt";

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    broker: { type: "string", default: "mqtt://localhost" },
    node: { type: "string", default: "kitchen" },
    submodel: { type: "string", default: "auto" },
    timeout: { type: "string", default: "60" },
  },
});
if (positionals.length !== 1) {
  console.error('usage: node ask.mjs [--broker URL] [--node NAME] "question"');
  process.exit(2);
}

const id = randomUUID();
const clientId = `ask-${id.slice(0, 8)}`;
// Where there is a login, answers come to it: so a broker can keep them from others (examples/mosquitto).
const login = decodeURIComponent(new URL(options.broker).username);
const replies = `clients/${login ? `${login}/${clientId}` : clientId}/answer`;
const request = JSON.stringify({
  id,
  messages: [{ role: "user", content: positionals[0] }],
  submodel: options.submodel,
  stream: true,
  expires_in: Number(options.timeout),
});

const client = mqtt.connect(options.broker, { protocolVersion: 5, clientId, clean: true });

// After every connect: the same id is never run twice, so asking again is safe.
client.on("connect", async () => {
  await client.subscribeAsync(replies, { qos: 1 });
  await client.publishAsync(`nestd/v1/${options.node}/request/generate`, request, {
    qos: 1,
    properties: { responseTopic: replies, correlationData: Buffer.from(id) },
  });
});

let shown = "";
let attempt = 0;

client.on("message", (_topic, payload) => {
  const event = JSON.parse(payload.toString());
  if (event.id !== id) return;
  if (event.attempt > attempt) {
    if (shown) process.stdout.write("\n");
    shown = ""; // it was run again: the deltas start over
    attempt = event.attempt;
  }
  if (event.event === "delta") {
    process.stdout.write(event.text);
    shown += event.text;
  } else if (event.event === "done") {
    // Deltas may be missing; `done` has the whole text.
    const whole = event.text.startsWith(shown) ? event.text.slice(shown.length) : `\n${event.text}`;
    process.stdout.write(`${whole}\n`);
    console.error(`[${event.submodel}, ${event.usage.completion_tokens} tokens, ${event.finish_reason}]`);
    finish(0);
  } else if (event.event === "error") {
    console.error(`${event.status} ${event.code}: ${event.message}`);
    finish(1);
  }
});

client.on("error", (error) => {
  console.error(error.message);
  finish(2);
});

const patience = setTimeout(() => {
  console.error("no answer came: is the node online?");
  finish(2);
}, Number(options.timeout) * 1000);

function finish(status) {
  clearTimeout(patience);
  process.exitCode = status;
  setImmediate(() => client.end()); // the answer's acknowledgement goes out first
}
