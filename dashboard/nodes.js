// What the nodes have said about themselves, and the figures of the last minutes.

import { list, number, object, text, texts } from "./values.js";

export const HISTORY_MS = 10 * 60 * 1000;
// A stranger may announce any number of nodes; the page stays usable.
const MOST_NODES = 100;
const MOST_SUBMODELS = 64;

export class Node {
  constructor(name) {
    this.name = name;
    this.availability = null;
    this.birth = null; // tells a node that came back from one that stayed
    this.state = {};
    this.info = {};
    this.health = {};
    this.history = []; // {time, used, model, celsius, watts}, the oldest first
  }

  get online() {
    return this.availability === "online";
  }

  // All sizes, the smallest first: {name, params, rung}.
  get submodels() {
    return list(this.info.submodels)
      .slice(0, MOST_SUBMODELS)
      .map(object)
      .filter((item) => text(item.name) !== null)
      .map((item) => ({ name: item.name, params: number(item.effective_params) ?? 0, rung: item.rung !== false }))
      .sort((a, b) => a.params - b.params);
  }

  // Where a size stands in the order of sizes, 0 to 1: its colour.
  rank(submodel) {
    const names = this.submodels.map((item) => item.name);
    return names.length > 1 ? Math.max(0, names.indexOf(submodel)) / (names.length - 1) : 0;
  }

  get encoders() {
    return texts(this.info.modalities).filter((name) => name !== "text");
  }

  // Bytes; null where the board cannot tell, or sets no limit.
  get memory() {
    const total = number(this.health.memory_total_bytes);
    const free = number(this.health.memory_available_bytes);
    const elastic = object(object(this.info.config).elastic);
    return {
      total,
      free,
      used: total === null || free === null ? null : Math.max(0, total - free),
      model: number(this.health.engine_rss_bytes),
      reserve: number(object(elastic.memory).reserve_bytes),
    };
  }

  remember(health, time) {
    this.health = health;
    const { used, model } = this.memory;
    this.history.push({
      time, used, model, celsius: number(health.temperature_celsius), watts: number(health.watts),
    });
    while (this.history[0].time < time - HISTORY_MS) this.history.shift();
  }
}

export class Nodes {
  constructor() {
    this.byName = new Map();
  }

  // By name, those that are online first.
  get all() {
    return [...this.byName.values()].sort((a, b) => b.online - a.online || a.name.localeCompare(b.name));
  }

  get(name) {
    return this.byName.get(name);
  }

  // Takes in one message; returns "back" if the node has connected anew, "gone" if it was cleared.
  take(name, kind, document, time = Date.now()) {
    let node = this.byName.get(name);
    if (kind === "availability" && text(document.state) === null) {
      this.byName.delete(name);
      return "gone";
    }
    if (!node) {
      // Figures may come late, of a node that has been cleared away.
      if (kind === "health" || this.byName.size >= MOST_NODES) return null;
      node = new Node(name);
      this.byName.set(name, node);
    }
    if (kind === "availability") {
      const birth = JSON.stringify([document.boot ?? null, document.n ?? null]);
      const back = document.state === "online" && node.birth !== null && node.birth !== birth;
      if (document.state === "online") node.birth = birth;
      node.availability = document.state;
      return back ? "back" : null;
    }
    if (kind === "health") node.remember(document, time);
    else if (kind === "state") node.state = document;
    else if (kind === "info") node.info = document;
    return null;
  }
}
