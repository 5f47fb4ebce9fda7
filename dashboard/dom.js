// Building and filling elements. Text is only ever set as text: nothing here parses HTML.

// Returns a new element; `properties` are set as they are, `children` are elements or strings.
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  Object.assign(made, properties);
  made.append(...children);
  return made;
}

// Returns a copy of a template's first element, and the elements in it that have a data-ref.
export function fromTemplate(id) {
  const root = document.getElementById(id).content.firstElementChild.cloneNode(true);
  const parts = {};
  for (const part of root.querySelectorAll("[data-ref]")) parts[part.dataset.ref] = part;
  return { root, parts };
}

// Sets a text only where it has changed, so that selections and screen readers are left alone.
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

// Shows a sentence, or hides its place where there is none.
export function setSentence(target, sentence) {
  setText(target, sentence ?? "");
  target.hidden = !sentence;
}

// Fills a <select> with these values, and keeps what is chosen where it is still there.
export function setOptions(select, options, chosen) {
  const stated = JSON.stringify(options);
  if (select.dataset.options !== stated) {
    const before = select.value;
    select.replaceChildren(...options.map((value) => element("option", { value, textContent: value })));
    select.dataset.options = stated;
    if (options.includes(before)) select.value = before;
  }
  if (chosen !== undefined && select.value !== chosen && options.includes(chosen)) select.value = chosen;
}
