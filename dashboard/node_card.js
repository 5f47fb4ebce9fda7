// One node's card: what it says, in words and small charts, and its controls.

import { Chart } from "./chart.js";
import { element, fromTemplate, setOptions, setSentence, setText } from "./dom.js";
import { drawLadder } from "./ladder.js";
import { UNKNOWN, bytes, duration, figure, number, object, text, texts } from "./values.js";

const REASONS = [
  ["Sub-model", "submodel"],
  ["Largest allowed", "largest"],
  ["Context", "context_length", "context_reason"],
  ["Side by side", "concurrency"],
  ["Encoders", "modalities"],
];

export class NodeCard {
  // `control(verb, fields)` sends a control request for this node and returns the reply's data.
  constructor(name, control) {
    this.control = control;
    const { root, parts } = fromTemplate("node-template");
    this.root = root;
    this.parts = parts;
    setText(parts.name, name);
    root.setAttribute("aria-label", `Node ${name}`);
    this.charts = {
      used: new Chart({ title: "Memory used", pick: (point) => point.used, format: bytes }),
      celsius: new Chart({ title: "Temperature", pick: (point) => point.celsius, format: (v) => figure(v, 0, "°C") }),
      watts: new Chart({ title: "Power", pick: (point) => point.watts, format: (v) => figure(v, 1, "W") }),
    };
    parts.charts.append(...Object.values(this.charts).map((chart) => chart.root));
    parts.wanted.addEventListener("change", () => this.#ask("submodel", { submodel: parts.wanted.value }));
    parts.unload.addEventListener("click", () => this.#ask("modality", { modality: "all", unload: true }));
  }

  draw(node, now) {
    const { parts } = this;
    const { state } = node;
    const told = node.online && Object.keys(state).length > 0;
    this.#head(node);
    parts.body.hidden = !told;
    this.root.classList.toggle("offline", !node.online);
    if (!told) return;
    this.#running(node);
    drawLadder(parts.ladder, node);
    const sizes = ["auto", ...node.submodels.map((item) => item.name)];
    setOptions(parts.wanted, sizes, text(state.submodel_wanted) ?? undefined);
    this.#memory(node);
    this.#charts(node, now);
    this.#encoders(node);
    this.#details(node);
  }

  #head(node) {
    const { parts } = this;
    const phase = node.online ? text(node.state.phase) ?? "online" : "offline";
    setText(parts.phase, phase);
    parts.phase.dataset.state = { ready: "good", online: "good", offline: "off" }[phase] ?? "waiting";
    const uptime = number(node.health.uptime_seconds);
    const about = [text(node.info.bundle), node.online && uptime !== null ? `up ${duration(uptime)}` : null];
    setText(parts.about, about.filter(Boolean).join(" · "));
    setSentence(parts.phaseReason, node.online ? sentence(node.state.phase_reason) : null);
  }

  #running(node) {
    const { parts } = this;
    const { state, health } = node;
    const running = text(state.submodel);
    const queue = object(state.queue);
    setText(parts.submodel, running ?? "none");
    parts.submodel.style.setProperty("--rank", node.rank(running));
    setText(parts.submodelReason, sentence(state.submodel_reason) ?? "");
    const largest = text(state.largest);
    const most = largest === null ? "No request is taken now" : `At most ${largest}`;
    setText(parts.largest, `${most}: ${text(state.largest_reason) ?? "no reason is told"}`);
    setText(parts.speed, figure(health.decode_tokens_per_second, 1));
    setText(parts.queue, `${count(queue.running)} running, ${count(queue.waiting)} waiting of ${count(queue.limit)}`);
  }

  #memory(node) {
    const { parts } = this;
    const { total, free, used, model, reserve } = node.memory;
    const share = (part) => (total ? Math.min(1, (part ?? 0) / total) : 0);
    parts.memoryBar.style.setProperty("--used", share(used));
    parts.memoryBar.style.setProperty("--model", share(model));
    parts.memoryBar.style.setProperty("--limit", 1 - share(reserve));
    setText(parts.memoryTotal, total === null ? "" : `${bytes(total)} in all`);
    setText(parts.memoryUsed, bytes(used));
    setText(parts.memoryModel, bytes(model));
    setText(parts.memoryFree, bytes(free));
    setText(parts.memoryLimit, reserve === null ? UNKNOWN : bytes(reserve));
    parts.memoryBar.setAttribute("aria-label",
      `${bytes(used)} of ${bytes(total)} used, ${bytes(free)} free; the model holds ${bytes(model)}`);
    setSentence(parts.memoryReason, sentence(against(node, "memory_reason")));
  }

  #charts(node, now) {
    const { parts, charts } = this;
    const { health, history } = node;
    const { total, reserve } = node.memory;
    const throttle = number(health.throttle_celsius);
    charts.used.draw(history, now, {
      top: total, limit: total === null || reserve === null ? null : total - reserve,
    });
    charts.celsius.draw(history, now, {
      limit: throttle, least: 20, note: throttle === null ? "" : `slows down at ${figure(throttle, 0, "°C")}`,
    });
    charts.watts.draw(history, now, { note: text(health.watts_scope) ?? "" });
    parts.charts.hidden = Object.values(charts).every((chart) => chart.root.hidden);
    const alarms = [
      health.under_voltage === true ? "the supply is too weak" : null,
      health.throttled === true ? "the firmware holds the clock down" : null,
      against(node, "power_reason"),
    ];
    setSentence(parts.powerReason, sentence(alarms.filter(Boolean).join("; ")));
  }

  #encoders(node) {
    const { parts } = this;
    const loaded = texts(node.state.modalities);
    const off = texts(node.state.modalities_off);
    parts.encoders.hidden = node.encoders.length === 0;
    const how = (name) => (off.includes(name) ? "off" : loaded.includes(name) ? "loaded" : "idle");
    const rows = node.encoders.map((name) => [name, how(name)]);
    const stated = JSON.stringify(rows);
    if (parts.encoderList.dataset.stated !== stated) {
      parts.encoderList.dataset.stated = stated;
      parts.encoderList.replaceChildren(...rows.map((row) => this.#encoder(...row)));
    }
    parts.unload.disabled = !node.encoders.some((name) => loaded.includes(name));
    setText(parts.modalitiesReason, sentence(node.state.modalities_reason) ?? "");
  }

  #encoder(name, how) {
    const words = { off: "switched off", loaded: "in memory", idle: "on demand" }[how];
    const action = how === "off" ? "Switch on" : "Switch off";
    const button = element("button", { type: "button", className: "quiet", textContent: action });
    button.setAttribute("aria-label", `${action} ${name}`);
    button.addEventListener("click", () => this.#ask("modality", { modality: name, enabled: how === "off" }));
    const item = element("li", {}, element("span", { className: "dot" }), element("b", { textContent: name }),
      element("span", { className: "muted", textContent: words }), button);
    item.dataset.how = how;
    return item;
  }

  #details(node) {
    const { parts } = this;
    const { state, health } = node;
    const reasons = REASONS.map(([label, key, reason = `${key}_reason`]) => (
      [label, words(state[key]), sentence(state[reason]) ?? ""]));
    const counters = object(health.counters);
    const errors = Object.values(object(counters.errors)).filter(Number.isFinite).reduce((a, b) => a + b, 0);
    const figures = [
      ["Prompts", figure(health.prefill_tokens_per_second, 0, "tokens/s")],
      ["Energy", figure(health.joules_per_token, 2, "J/token")],
      ["Memory pressure", figure(health.memory_pressure_percent, 1, "%")],
      ["Daemon", bytes(health.rss_bytes)],
      ["Battery", figure(health.battery_percent, 0, "%")],
      ["Input", figure(health.volts, 2, "V")],
      ["Answers", count(counters.done)],
      ["Errors", counters.errors === undefined ? UNKNOWN : String(errors)],
      ["nestd", text(object(node.info.versions).nestd) ?? UNKNOWN],
    ];
    fill(parts.reasons, reasons);
    fill(parts.figures, figures);
  }

  async #ask(verb, fields) {
    const { said } = this.parts;
    setText(said, "…");
    try {
      const data = await this.control(verb, fields);
      setText(said, sentence(data.reason) ?? "Done.");
      said.classList.remove("error");
    } catch (error) {
      setText(said, error.message);
      said.classList.add("error");
      delete this.parts.wanted.dataset.options; // what is chosen is not what holds
    }
  }
}

// Terms, values and perhaps a second line, made anew only where something has changed.
function fill(target, rows) {
  const stated = JSON.stringify(rows);
  if (target.dataset.stated === stated) return;
  target.dataset.stated = stated;
  target.replaceChildren(...rows.map(([term, value, more]) => element("div", {},
    element("dt", { textContent: term }), element("dd", { textContent: value }),
    ...(more ? [element("dd", { className: "reason", textContent: more })] : []))));
}

// What stands against the largest sub-model, unless the line below the ladder says so.
function against({ state }, key) {
  const reason = text(state[key]);
  return reason === state.largest_reason ? null : reason;
}

const count = (value) => figure(value, 0);

function words(value) {
  if (Array.isArray(value)) return texts(value).join(", ") || "none";
  return text(value) ?? (number(value) === null ? "none" : String(value));
}

// Reasons are clauses ("the battery is below 20 %"); here they stand alone.
function sentence(value) {
  const clause = text(value);
  if (!clause) return null;
  return clause[0].toUpperCase() + clause.slice(1) + (/[.!?…]$/.test(clause) ? "" : ".");
}
