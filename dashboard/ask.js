// The box to ask: form -> request -> events. Requests are published again after each new connection
// of ours or of the node, under the same id, as docs/mqtt.md recommends.

import { Answer } from "./answer.js";
import { ReplyError } from "./broker.js";
import { setOptions, setSentence } from "./dom.js";
import { Attachments } from "./media.js";
import { contentOf } from "./upload.js";
import { newId, number, object } from "./values.js";

const EXPIRES_SECONDS = 300;
const MOST_ANSWERS = 30;
const byId = (id) => document.getElementById(id);

export class Asking {
  constructor(broker, nodes) {
    this.broker = broker;
    this.nodes = nodes;
    this.open = new Map(); // by request id: {node, topic, fields, answer, timer}
    const limits = () => (this.node?.info.media ? object(this.node.info.media) : null);
    this.attachments = new Attachments(limits, (sentence) => setSentence(byId("ask-error"), sentence));
    byId("ask-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      byId("ask-form").requestSubmit();
    });
    byId("ask-node").addEventListener("change", () => this.draw());
  }

  get node() {
    return this.nodes.get(byId("ask-node").value);
  }

  // Fills the lists of nodes and sizes.
  draw() {
    const online = this.nodes.all.filter((node) => node.online).map((node) => node.name);
    setOptions(byId("ask-node"), online);
    setOptions(byId("ask-submodel"), ["auto", ...(this.node?.submodels ?? []).map((item) => item.name)]);
    const media = Boolean(this.node?.info.media);
    for (const id of ["attach", "camera", "microphone"]) byId(id).hidden = !media;
    byId("send").disabled = online.length === 0 || !this.broker.online;
  }

  // After a new connection of ours, or of `node`.
  again(node = null) {
    for (const request of this.open.values()) {
      if (node === null || request.node === node) this.#publish(request);
    }
  }

  take(event) {
    const request = this.open.get(event.id);
    if (request?.answer.take(event)) this.#close(event.id);
  }

  async #submit() {
    setSentence(byId("ask-error"), null);
    const prompt = byId("prompt").value.trim();
    const node = this.node;
    const fields = this.#fields();
    if (!node || fields === null) return;
    if (!prompt && this.attachments.media.length === 0) {
      setSentence(byId("ask-error"), "Write a question first.");
      byId("prompt").focus();
      return;
    }
    const media = this.attachments.take();
    byId("prompt").value = "";
    const answer = new Answer(prompt, media, (submodel) => node.rank(submodel), () => this.#cancel(fields.id));
    const request = { node: node.name, fields: null, answer, cancelled: false, timer: null };
    this.open.set(fields.id, request);
    byId("answers").prepend(answer.root);
    while (byId("answers").children.length > MOST_ANSWERS) byId("answers").lastElementChild.remove();
    try {
      const words = prompt ? [{ type: "text", text: prompt }] : [];
      const size = JSON.stringify(fields).length + 6 * prompt.length;
      const parts = await contentOf(media, this.broker, node, size, (done) => answer.progress(done));
      if (!this.open.has(fields.id)) return; // cancelled meanwhile
      const content = parts.length ? [...parts, ...words] : prompt;
      request.fields = { ...fields, messages: [{ role: "user", content }] };
      request.timer = setTimeout(() => this.#expire(fields.id), (EXPIRES_SECONDS + 5) * 1000);
      answer.progress("Asking…");
      this.#publish(request);
    } catch (error) {
      if (!(error instanceof ReplyError)) throw error;
      answer.fail(error.message);
      this.#close(fields.id);
    }
  }

  // The request's fields without its messages, or null where the form holds something wrong.
  #fields() {
    const schema = byId("schema").value.trim();
    let format;
    setSentence(byId("schema-error"), null);
    byId("schema").removeAttribute("aria-invalid");
    if (schema) {
      try {
        format = { type: "json_schema", json_schema: JSON.parse(schema) };
      } catch (error) {
        setSentence(byId("schema-error"), `The schema is no JSON: ${error.message}.`);
        byId("schema").setAttribute("aria-invalid", "true");
        byId("schema").focus();
        return null;
      }
    }
    const given = (id) => (byId(id).value === "" ? undefined : number(byId(id).valueAsNumber) ?? undefined);
    return {
      id: newId(),
      stream: true,
      expires_in: EXPIRES_SECONDS,
      submodel: byId("ask-submodel").value || "auto",
      effort: byId("effort").value,
      max_tokens: given("max-tokens"),
      temperature: given("temperature"),
      response_format: format,
    };
  }

  #publish(request) {
    if (!request.fields || !this.broker.online) return; // `again` comes with the connection
    this.broker.publish(`${this.broker.base}/${request.node}/request/generate`, request.fields).catch(() => {
      // The connection went; `again` comes with the next one.
    });
  }

  async #cancel(id) {
    const request = this.open.get(id);
    if (!request) return;
    if (!request.fields) {
      request.answer.fail("Cancelled before it was sent.");
      this.#close(id);
      return;
    }
    request.answer.progress("Cancelling…");
    try {
      await this.broker.control(request.node, "cancel", { id, client: this.broker.owner });
    } catch (error) {
      request.answer.progress(error.message);
    }
  }

  #expire(id) {
    this.open.get(id)?.answer.fail(`No answer came within ${EXPIRES_SECONDS} s: is the node alive?`);
    this.#close(id);
  }

  #close(id) {
    clearTimeout(this.open.get(id)?.timer);
    this.open.delete(id);
  }
}
