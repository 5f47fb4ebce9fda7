// The connection to the broker: MQTT 5 over a WebSocket, made again by itself.
// It knows topics and replies (docs/mqtt.md); it does not know nodes, answers or the page.

import { newId, number, object } from "./values.js";

const RECONNECT_MS = 2000;
const CONTROL_MS = 10_000;
const TELLING = ["availability", "state", "info", "health"];
// CONNACK: bad user name or password, not authorized. Trying again does not mend these.
const REFUSED = new Set([134, 135]);

// A control request or an upload that failed; its message is a sentence.
export class ReplyError extends Error {}

export class Broker {
  // `listener` has up(complete: may we read everything?), down(), refused(sentence),
  // told(node, topic, document) and event(document).
  constructor(url, prefix, listener) {
    this.url = url;
    this.base = `${prefix}/v1`;
    this.clientId = `nestd-dashboard-${newId().slice(0, 12)}`;
    this.online = false;
    this.maximumPacketSize = Infinity;
    this.listener = listener;
    this.waiting = new Map(); // by transaction
    this.client = null;
  }

  connect({ username, password }) {
    this.close();
    // Whose requests these are: a login, which the broker vouches for, else what we call ourselves.
    this.owner = username || this.clientId;
    const address = username ? `${username}/${this.clientId}` : this.clientId;
    this.replies = `clients/${address}/replies`;
    const client = mqtt.connect(this.url, {
      protocolVersion: 5,
      clientId: this.clientId,
      clean: true,
      username: username || undefined,
      password: username ? password : undefined,
      reconnectPeriod: RECONNECT_MS,
      reconnectOnConnackError: true,
      resubscribe: false,
      timerVariant: "native", // its worker would need blob: scripts
    });
    this.client = client;
    client.on("connect", (connack) => this.#connected(client, connack));
    client.on("message", (topic, payload) => this.#received(topic, payload));
    client.on("close", () => this.#disconnected(client));
    client.on("error", (error) => {
      if (!REFUSED.has(error.code)) return; // `close` follows
      client.end(true);
      this.listener.refused("The broker does not let this user in: check name and password.");
    });
  }

  close() {
    const client = this.client;
    this.client = null; // what it still says is not for us
    client?.end(true);
    this.online = false;
  }

  // Publishes JSON, or bytes as they are; resolves when the broker has it (QoS 1).
  async publish(topic, content, qos = 1) {
    if (!this.online) throw new ReplyError("The broker is away.");
    const raw = content instanceof Uint8Array;
    const properties = raw
      ? { responseTopic: this.replies }
      : { responseTopic: this.replies, contentType: "application/json" };
    await this.client.publishAsync(topic, raw ? content : JSON.stringify(content), { qos, properties });
  }

  // Sends a control message or one about a blob and returns its whole reply.
  async exchange(topic, fields, qos = 0, patience = CONTROL_MS) {
    const transaction = newId();
    const reply = new Promise((resolve, reject) => {
      const timer = setTimeout(() => reject(new ReplyError("The node did not reply.")), patience);
      this.waiting.set(transaction, (document) => { clearTimeout(timer); resolve(document); });
    });
    reply.catch(() => {}).finally(() => this.waiting.delete(transaction));
    await this.publish(topic, { transaction, ...fields }, qos);
    return reply;
  }

  // Sends a control request and returns the reply's data; ReplyError where the node refuses.
  async control(node, verb, fields = {}) {
    const reply = await this.exchange(`${this.base}/${node}/request/${verb}`, fields);
    if (reply.ok !== true) throw new ReplyError(String(object(reply.error).message));
    return object(reply.data);
  }

  async #connected(client, connack) {
    if (client !== this.client) return;
    this.maximumPacketSize = number(connack.properties?.maximumPacketSize) ?? Infinity;
    const filters = [...TELLING.map((topic) => `${this.base}/+/${topic}`), this.replies];
    let complete = true;
    try {
      await client.subscribeAsync(filters, { qos: 1 });
    } catch {
      complete = false;
    }
    if (client !== this.client || !client.connected) return;
    this.online = true;
    this.listener.up(complete);
  }

  #disconnected(client) {
    if (client !== this.client) return;
    this.online = false;
    this.listener.down();
  }

  #received(topic, payload) {
    let document = {};
    try {
      document = object(JSON.parse(new TextDecoder().decode(payload)));
    } catch {
      // Not JSON is like an empty object: a node that is cleared away sends no bytes at all.
    }
    if (topic !== this.replies) {
      const [node, kind] = topic.split("/").slice(-2);
      this.listener.told(node, kind, document);
    } else if (typeof document.event === "string") {
      this.listener.event(document);
    } else {
      this.waiting.get(document.transaction)?.(document);
    }
  }
}
