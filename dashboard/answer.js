// One question and its answer: a piece of text for each sub-model that made some of it.

import { element, fromTemplate, setSentence, setText } from "./dom.js";
import { shown } from "./media.js";
import { list, number, object, text } from "./values.js";

export class Answer {
  // `rank(submodel)` is its place among the sizes, 0 to 1.
  constructor(question, media, rank, cancel) {
    const { root, parts } = fromTemplate("answer-template");
    this.root = root;
    this.parts = parts;
    this.rank = rank;
    this.attempt = 0;
    this.whole = "";
    this.last = null; // the piece that grows
    setText(parts.question, question);
    parts.shown.append(...media.map(shown));
    parts.cancel.addEventListener("click", cancel);
    this.progress("Sending…");
  }

  progress(words) {
    setText(this.parts.progress, words);
    this.parts.progress.hidden = !words;
  }

  // Takes in an event of the request; true once it was the last.
  take(event) {
    const attempt = number(event.attempt) ?? 1;
    if (attempt > this.attempt) {
      this.#startOver();
      this.attempt = attempt;
    }
    if (event.event === "accepted") this.#accepted(number(event.ahead) ?? 0);
    else if (event.event === "delta") this.#add(text(event.text) ?? "", text(event.submodel));
    else if (event.event === "done") this.#done(event);
    else if (event.event === "error") this.fail(errorSentence(event));
    return event.event === "done" || event.event === "error";
  }

  fail(sentence) {
    setSentence(this.parts.error, sentence);
    this.#end();
  }

  #accepted(ahead) {
    const again = this.attempt > 1 ? `Attempt ${this.attempt}. ` : "";
    this.progress(ahead ? `${again}Waiting, ${ahead} before it…` : `${again}Reading…`);
  }

  #add(words, submodel) {
    this.progress("");
    this.whole += words;
    if (this.last?.dataset.submodel !== submodel) {
      this.last = element("span", { className: "piece tone", title: submodel });
      this.last.dataset.submodel = submodel;
      this.last.style.setProperty("--rank", this.rank(submodel));
      this.parts.text.append(this.last);
    }
    this.last.append(words);
  }

  #done(event) {
    const whole = text(event.text) ?? "";
    if (whole.startsWith(this.whole)) {
      if (whole.length > this.whole.length) this.#add(whole.slice(this.whole.length), text(event.submodel));
    } else {
      // Deltas were lost: who made which letter is not known any more.
      this.parts.text.replaceChildren(whole);
    }
    const switches = list(event.switches).map(object);
    this.parts.route.replaceChildren(...switches.map((step) => this.#step(step)));
    setText(this.parts.figures, figuresOf(event));
    this.#end();
  }

  #step(step) {
    const name = text(step.submodel) ?? "";
    const chip = element("b", { className: "chip tone", textContent: name });
    chip.style.setProperty("--rank", this.rank(name));
    const from = number(step.token) ? `from token ${step.token}: ` : "";
    const why = ` ${from}${text(step.reason) ?? ""}`;
    return element("li", {}, chip, element("span", { className: "muted", textContent: why }));
  }

  #startOver() {
    this.whole = "";
    this.last = null;
    this.parts.text.replaceChildren();
  }

  #end() {
    this.progress("");
    this.parts.cancel.hidden = true;
    this.parts.text.setAttribute("aria-busy", "false");
  }
}

function figuresOf(event) {
  const tokens = number(object(event.usage).completion_tokens);
  const prompt = number(object(event.usage).prompt_tokens);
  const { queue_ms: queue, prefill_ms: prefill, decode_ms: decode } = object(event.timings);
  const joules = number(event.joules);
  return [
    tokens === null ? null : `${tokens} tokens`,
    tokens && number(decode) ? `${((tokens / decode) * 1000).toFixed(1)} tokens/s` : null,
    prompt === null || !number(prefill) ? null : `prompt of ${prompt} read in ${seconds(prefill)}`,
    number(queue) > 50 ? `waited ${seconds(queue)}` : null,
    joules === null ? null : `${joules.toFixed(1)} J`,
    event.finish_reason === "length" ? "cut off at the longest answer" : null,
  ].filter(Boolean).map((part) => part.replaceAll(" ", "\u00a0")).join(" · ");
}

const seconds = (ms) => (ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(1)} s`);

function errorSentence(event) {
  const again = number(event.retry_after_ms);
  const words = text(event.message) ?? "The node answered with an error.";
  const first = words[0].toUpperCase() + words.slice(1);
  return again === null ? `${first}.` : `${first}. Try again in ${Math.max(1, Math.ceil(again / 1000))} s.`;
}
