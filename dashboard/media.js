// What is attached to the question: files, dropped and pasted pictures, the camera, the microphone.

import { element, setText } from "./dom.js";
import { bytes as inWords, number, object } from "./values.js";
import { recordWav } from "./microphone.js";

const KINDS = { image: "picture", audio: "clip", video: "video" };
const byId = (id) => document.getElementById(id);

export class Attachments {
  // `limits()` returns the chosen node's info.media, null where it takes text only; `complain(sentence)`.
  constructor(limits, complain) {
    this.limits = limits;
    this.complain = complain;
    this.media = []; // {kind, name, bytes, url}
    this.recorder = null;
    this.stream = null;
    byId("attach").addEventListener("click", () => byId("file").click());
    for (const input of [byId("file"), byId("capture")]) {
      input.addEventListener("change", async () => {
        await this.add(input.files);
        input.value = "";
      });
    }
    this.#takeDropsAndPastes();
    byId("camera").addEventListener("click", () => this.#openCamera());
    byId("camera-cancel").addEventListener("click", () => byId("viewfinder").close());
    byId("viewfinder").addEventListener("close", () => this.#closeCamera());
    byId("shutter").addEventListener("click", () => this.#takePicture());
    byId("microphone").addEventListener("click", () => this.#toggleMicrophone());
  }

  // Takes what is attached away from here and returns it.
  take() {
    const taken = this.media;
    this.media = [];
    this.#draw();
    return taken;
  }

  async add(files) {
    for (const file of files) {
      const kind = file.type.split("/")[0];
      const limits = this.limits();
      const most = number(object(limits).max_bytes) ?? Infinity;
      const size = inWords(file.size);
      if (!(kind in KINDS)) this.complain(`${file.name} is no picture, clip or video.`);
      else if (limits === null) this.complain("This node takes text only.");
      else if (file.size > most) this.complain(`${file.name} has ${size}; the node takes ${inWords(most)}.`);
      else {
        const data = new Uint8Array(await file.arrayBuffer());
        this.media.push({ kind, name: file.name, bytes: data, url: URL.createObjectURL(file) });
      }
    }
    this.#draw();
  }

  #draw() {
    byId("attachments").replaceChildren(...this.media.map((medium) => {
      const remove = element("button", { type: "button", className: "remove", textContent: "×" });
      remove.setAttribute("aria-label", `Remove ${medium.name}`);
      remove.addEventListener("click", () => {
        URL.revokeObjectURL(medium.url);
        this.media = this.media.filter((other) => other !== medium);
        this.#draw();
        byId("prompt").focus();
      });
      const item = shown(medium);
      item.append(remove);
      return item;
    }));
  }

  #takeDropsAndPastes() {
    const zone = byId("ask");
    const box = byId("composer");
    zone.addEventListener("dragover", (event) => {
      event.preventDefault();
      box.classList.add("over");
    });
    zone.addEventListener("dragleave", () => box.classList.remove("over"));
    zone.addEventListener("drop", (event) => {
      event.preventDefault();
      box.classList.remove("over");
      this.add(event.dataTransfer.files);
    });
    byId("prompt").addEventListener("paste", (event) => {
      if (event.clipboardData.files.length === 0) return;
      event.preventDefault();
      this.add(event.clipboardData.files);
    });
  }

  async #openCamera() {
    // Phones have a camera of their own for a file input, also where the page is not secure.
    if (!navigator.mediaDevices || matchMedia("(pointer: coarse)").matches) {
      byId("capture").click();
      return;
    }
    try {
      this.stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch (error) {
      this.complain(`The camera cannot be used: ${error.message}.`);
      return;
    }
    byId("preview").srcObject = this.stream;
    byId("viewfinder").showModal();
  }

  #closeCamera() {
    byId("preview").srcObject = null;
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.stream = null;
  }

  async #takePicture() {
    const preview = byId("preview");
    if (preview.videoWidth === 0) return; // it is not there yet
    const canvas = element("canvas", { width: preview.videoWidth, height: preview.videoHeight });
    canvas.getContext("2d").drawImage(preview, 0, 0);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
    byId("viewfinder").close();
    if (blob) await this.add([new File([blob], "camera.jpg", { type: blob.type })]);
  }

  async #toggleMicrophone() {
    const button = byId("microphone");
    if (this.recorder) {
      this.recorder.stop();
      return;
    }
    if (!navigator.mediaDevices) {
      this.complain("Browsers give the microphone only to pages from https or localhost: attach a clip instead.");
      return;
    }
    try {
      this.recorder = await recordWav((seconds) => setText(byId("recording"), `recording, ${seconds} s`));
      button.setAttribute("aria-pressed", "true");
      await this.add([await this.recorder.file]);
    } catch (error) {
      this.complain(`The microphone cannot be used: ${error.message}.`);
    } finally {
      this.recorder = null;
      button.setAttribute("aria-pressed", "false");
      setText(byId("recording"), "");
    }
  }
}

// Returns a list item that shows a medium.
export function shown({ kind, name, url, bytes }) {
  if (kind === "image") return element("li", {}, element("img", { src: url, alt: name }));
  const player = element(kind, { src: url, controls: true });
  player.setAttribute("aria-label", name);
  return element("li", { title: inWords(bytes.length) }, player);
}
