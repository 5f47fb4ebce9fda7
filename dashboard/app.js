// The page: connects, keeps the nodes, draws what has changed, asks for figures.

import { Asking } from "./ask.js";
import { Broker, ReplyError } from "./broker.js";
import { setSentence, setText } from "./dom.js";
import { NodeCard } from "./node_card.js";
import { Nodes } from "./nodes.js";

const HEALTH_MS = 2000;
const STORED = "nestd-broker-login";
const byId = (id) => document.getElementById(id);

const { broker: url, prefix } = await (await fetch("settings.json")).json();
const nodes = new Nodes();
const cards = new Map();
const broker = new Broker(url, prefix, { up, down, refused, told, event: (event) => asking.take(event) });
const asking = new Asking(broker, nodes);
let login = JSON.parse(sessionStorage.getItem(STORED) ?? "{}");
let drawing = false;

// The connection

function up(complete) {
  pill("good", "connected");
  setSentence(byId("trouble"), complete ? null
    : "The broker does not let this user read everything: docs/mqtt.md lists the rights that a client needs.");
  if (login.username) sessionStorage.setItem(STORED, JSON.stringify(login));
  byId("login").close();
  setText(byId("account"), login.username ? "Sign out" : "Sign in");
  asking.again();
  askHealth();
  draw();
}

function down() {
  pill("bad", "no broker");
  setSentence(byId("trouble"), `The broker at ${url} does not answer. What is shown may be old; trying again.`);
  draw();
}

function refused(sentence) {
  sessionStorage.removeItem(STORED);
  pill("bad", "not signed in");
  setSentence(byId("trouble"), null);
  setSentence(byId("login-error"), login.username ? sentence : null);
  openLogin();
}

function pill(state, words) {
  setText(byId("connection"), words);
  byId("connection").dataset.state = state;
}

function openLogin() {
  setText(byId("login-broker"), url);
  if (!byId("login").open) byId("login").showModal();
}

byId("account").addEventListener("click", () => {
  if (!login.username) {
    setSentence(byId("login-error"), null);
    openLogin();
    return;
  }
  sessionStorage.removeItem(STORED);
  location.reload();
});
byId("login-cancel").addEventListener("click", () => byId("login").close());
byId("login-form").addEventListener("submit", (event) => {
  event.preventDefault();
  login = { username: byId("username").value, password: byId("password").value };
  byId("password").value = "";
  pill("waiting", "connecting");
  broker.connect(login);
});

// The nodes

function told(name, kind, document) {
  if (nodes.take(name, kind, document) === "back") asking.again(name);
  draw();
}

// Draws once a frame at most, whatever comes in.
function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    drawNodes();
    asking.draw();
  });
}

function drawNodes() {
  const all = nodes.all;
  for (const [name, card] of cards) {
    if (nodes.get(name)) continue;
    card.root.remove();
    cards.delete(name);
  }
  let before = byId("empty");
  for (const node of all) {
    if (!cards.has(node.name)) {
      cards.set(node.name, new NodeCard(node.name, (verb, fields) => broker.control(node.name, verb, fields)));
    }
    const { root } = cards.get(node.name);
    if (before.nextElementSibling !== root) before.after(root);
    cards.get(node.name).draw(node, Date.now());
    before = root;
  }
  byId("empty").hidden = all.length > 0;
  setText(byId("empty"), broker.online
    ? "No node has been seen on this broker yet. `nestd run` on a board makes one appear here."
    : "Looking for nodes…");
}

async function askHealth() {
  if (!broker.online || document.hidden) return;
  await Promise.all(nodes.all.filter((node) => node.online).map(async ({ name }) => {
    try {
      told(name, "health", await broker.control(name, "health"));
    } catch (error) {
      if (!(error instanceof ReplyError)) throw error; // it shows as a gap in the charts
    }
  }));
}

setInterval(askHealth, HEALTH_MS);
document.addEventListener("visibilitychange", askHealth);
draw();
broker.connect(login);
