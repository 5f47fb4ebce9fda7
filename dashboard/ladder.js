// The ladder: one step for each size, as high as it is large. One runs, those above `largest` may not.

import { element } from "./dom.js";
import { text } from "./values.js";

export function drawLadder(root, node) {
  const running = text(node.state.submodel);
  const largest = text(node.state.largest);
  const items = node.submodels;
  const stated = JSON.stringify([items, running, largest]);
  if (root.dataset.stated === stated) return;
  root.dataset.stated = stated;
  root.hidden = items.length === 0;
  const most = Math.max(1, ...items.map((item) => item.params));
  const limit = items.find((item) => item.name === largest)?.params ?? -1;
  root.replaceChildren(...items.map((item) => {
    const step = element("div", { className: "step tone" }, element("i"), element("span", { textContent: item.name }));
    step.style.setProperty("--height", item.params / most);
    step.style.setProperty("--rank", node.rank(item.name));
    step.classList.toggle("running", item.name === running);
    step.classList.toggle("largest", item.name === largest);
    step.classList.toggle("above", item.params > limit);
    step.classList.toggle("between", !item.rung && item.name !== running && item.name !== largest);
    step.title = `${item.name}: ${parameters(item.params)} effective parameters`;
    return step;
  }));
  root.setAttribute("aria-label",
    `Sizes from ${items[0]?.name} to ${items.at(-1)?.name}; ${running ?? "none"} runs, `
    + `the largest allowed is ${largest ?? "none"}`);
}

function parameters(count) {
  return count >= 1e9 ? `${(count / 1e9).toFixed(2)} B` : `${(count / 1e6).toFixed(2)} M`;
}
