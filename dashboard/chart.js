// A small line chart of the last minutes: SVG, one line, an optional limit. Gaps stay gaps.

import { HISTORY_MS } from "./nodes.js";
import { element, setText } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [300, 72];
// Readings further apart are not joined: the page was hidden, or the node away.
const GAP_MS = 15_000;
// The axis grows with what has been seen, from this to the whole history.
const SHORTEST_MS = 2 * 60 * 1000;

export class Chart {
  // `pick` gives a point's value or null, `format` its words.
  constructor({ title, pick, format }) {
    this.title = title;
    this.pick = pick;
    this.format = format;
    this.area = path("area");
    this.line = path("line");
    this.mark = path("mark");
    this.limitLine = path("limit");
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    svg.append(this.area, this.limitLine, this.line, this.mark);
    this.value = element("strong");
    this.note = element("p", { className: "muted note" });
    this.since = element("span");
    this.plot = element("div", { className: "plot" }, svg);
    this.root = element("figure", { className: "chart" },
      element("figcaption", {}, element("h3", { textContent: title }), this.value), this.plot,
      element("div", { className: "axis muted" }, this.since, element("span", { textContent: "now" })), this.note);
    this.points = [];
    this.plot.addEventListener("pointermove", (event) => this.#point(event));
    this.plot.addEventListener("pointerleave", () => this.#forget());
  }

  // Draws; hidden while nothing is known. `limit` and `top` are values or null.
  draw(history, now, { limit = null, top = null, least = 0, note = "" } = {}) {
    this.points = history.map((point) => [point.time, this.pick(point)]).filter(([, value]) => value !== null);
    this.root.hidden = this.points.length === 0;
    if (this.root.hidden) return;
    const values = this.points.map(([, value]) => value);
    this.low = Math.min(least, ...values);
    this.high = top ?? Math.max(limit ?? 0, ...values) * 1.1;
    if (this.high <= this.low) this.high = this.low + 1;
    const range = `${this.low.toFixed(0)} to ${this.format(this.high)}`;
    this.about = note ? `${range}; ${note}` : range;
    this.now = now;
    this.span = Math.min(HISTORY_MS, Math.max(SHORTEST_MS, now - this.points[0][0]));
    setText(this.since, `${Math.ceil(this.span / 60_000)} min ago`);
    const runs = this.#runs();
    this.line.setAttribute("d", runs.map(trace).join(""));
    const filled = (run) => `${trace(run)}L${run.at(-1)[0]},${HEIGHT}L${run[0][0]},${HEIGHT}Z`;
    this.area.setAttribute("d", runs.map(filled).join(""));
    this.limitLine.setAttribute("d", limit === null ? "" : `M0,${this.#y(limit)}H${WIDTH}`);
    if (!this.plot.matches(":hover")) this.#forget();
  }

  #forget() {
    this.mark.setAttribute("d", "");
    const last = this.points.at(-1);
    if (last) this.#say(last[1], this.about);
  }

  #point(event) {
    const box = this.plot.getBoundingClientRect();
    const time = this.now - this.span * (1 - (event.clientX - box.left) / box.width);
    const near = this.points.reduce((a, b) => (Math.abs(b[0] - time) < Math.abs(a[0] - time) ? b : a));
    this.mark.setAttribute("d", `M${this.#x(near[0])},0V${HEIGHT}`);
    this.#say(near[1], `at ${new Date(near[0]).toLocaleTimeString()}`);
  }

  #say(value, note) {
    setText(this.value, this.format(value));
    setText(this.note, note);
  }

  #runs() {
    const runs = [];
    let before = -Infinity;
    for (const [time, value] of this.points) {
      if (time - before > GAP_MS) runs.push([]);
      runs.at(-1).push([this.#x(time), this.#y(value)]);
      before = time;
    }
    return runs;
  }

  #x(time) {
    return round(WIDTH * (1 - (this.now - time) / this.span));
  }

  #y(value) {
    return round(HEIGHT * (1 - (value - this.low) / (this.high - this.low)));
  }
}

function path(name) {
  const made = document.createElementNS(SVG, "path");
  made.setAttribute("class", name);
  return made;
}

function trace(run) {
  // A single reading becomes a dot: a line of no length with a round cap.
  return run.map(([x, y], index) => `${index ? "L" : "M"}${x},${y}`).join("") + (run.length === 1 ? "h0" : "");
}

const round = (value) => Math.round(value * 10) / 10;
