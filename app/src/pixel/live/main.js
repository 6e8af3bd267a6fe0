// The page: connects its parts.

import { Board } from "./board.js";
import { Budget } from "./budget.js";
import { Origin } from "./origin.js";
import { Moderation } from "./moderation.js";
import { Painter } from "./painter.js";
import { Session } from "./session.js";
import { Stream } from "./stream.js";
import { View } from "./view.js";

const COLOURS = {
  black: "#000000", slate: "#515966", silver: "#b4bcc8", white: "#ffffff",
  brown: "#7a4a2b", red: "#e5263a", orange: "#ff8c1a", yellow: "#ffd83d",
  lime: "#9be13b", green: "#13a350", teal: "#0fa3a3", sky: "#4fc3ff",
  blue: "#2563eb", violet: "#7c3aed", magenta: "#d946c4", pink: "#ffa3c4",
};
const CHANNELS = { R: 0, G: 1, B: 2 };
const STATES = {
  loading: "Loading", live: "Live", lost: "Reconnecting", private: "Sign in to see the canvas", polling: "Polling", maintenance: "Maintenance",
};
const HINTS = { polling: "A proxy holds back the stream of changes; the canvas is fetched every 2 s." };
const STATUS = ["viewers", "writes", "instance", "release"];
const TOAST = 5_000; // milliseconds
const STORED = "pixel-colour";

const $ = (id) => document.getElementById(id);
const hex = (rgb) => `#${rgb.map((value) => value.toString(16).padStart(2, "0")).join("")}`;
const rgb = (text) => [1, 3, 5].map((start) => parseInt(text.slice(start, start + 2), 16));

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

const stage = $("stage");
const picker = $("picker");
const board = new Board($("board"));
const budget = new Budget($("budget"));
const session = new Session({ change: (rights) => showRights(rights), budget: (state) => budget.show(state) });
const origin = new Origin(session, (text) => {
  $("origin").textContent = text;
  $("origin").hidden = !text;
});
const painter = new Painter(board, session, (reason) => toast(`Not painted: ${reason}`));

// The colour to paint in.

function choose(colour) {
  picker.value = colour;
  let known = false;
  for (const swatch of document.querySelectorAll("#palette [type=radio]")) {
    swatch.checked = swatch.value === colour;
    known ||= swatch.checked;
  }
  picker.classList.toggle("chosen", !known);
  try {
    localStorage.setItem(STORED, colour);
  } catch {
    // Storage may be forbidden; the colour is then not remembered.
  }
}

function storedColour() {
  try {
    const stored = localStorage.getItem(STORED);
    return /^#[0-9a-f]{6}$/.test(stored) ? stored : COLOURS.red;
  } catch {
    return COLOURS.red;
  }
}

for (const [name, colour] of Object.entries(COLOURS)) {
  const swatch = document.createElement("input");
  Object.assign(swatch, { type: "radio", name: "colour", value: colour, title: name });
  swatch.ariaLabel = name;
  swatch.style.backgroundColor = colour;
  swatch.addEventListener("change", () => choose(colour));
  // After a click, keys still work on the canvas; after Tab, they move among the colours.
  swatch.addEventListener("click", ({ detail }) => detail && stage.focus());
  picker.before(swatch);
}
picker.addEventListener("input", () => choose(picker.value));
choose(storedColour());

// The view.

let follow = () => {}; // what is on the stage, as soon as there is a stream
let select = () => {}; // what is selected, for moderators
let restart = () => {}; // the stream, for another user

const parts = { stage, canvas: $("board"), grid: $("grid"), mark: $("cursor"), area: $("area") };
const view = new View(parts, {
  paint(x, y) {
    if (!board.width) return;
    painter.paint(x, y, rgb(picker.value));
    describe(view.cursor);
    say(`Painted ${x}, ${y}`);
  },
  pick(x, y) {
    choose(hex(board.colour(board.place(x, y))));
    say(`Colour ${picker.value}`);
  },
  select() {
    select();
  },
  cursor(cell, byKey) {
    describe(cell);
    if (byKey) say(`${$("place").textContent}, ${$("colour").textContent}`);
  },
  view({ x, y, zoom, part }) {
    follow(part);
    $("fit").textContent = `${number.format(zoom * 100)} %`;
    rememberPlace(x, y, zoom);
  },
});

function describe(cell) {
  const colour = cell ? hex(board.colour(board.place(cell.x, cell.y))) : "";
  $("place").textContent = cell ? `${cell.x}, ${cell.y}` : "–";
  $("colour").textContent = colour || "\u00a0";
  $("sample").style.backgroundColor = colour;
  origin.ask(cell, colour);
}

let announcing = 0;

/** Announce a text to screen readers, not too often. */
function say(text) {
  clearTimeout(announcing);
  announcing = setTimeout(() => ($("announcement").textContent = text), 200);
}

let remembering = 0;

function rememberPlace(x, y, zoom) {
  clearTimeout(remembering);
  remembering = setTimeout(() => {
    const hash = view.fitted ? "" : `#${x},${y},${+zoom.toFixed(3)}`;
    history.replaceState(null, "", location.pathname + location.search + hash);
  }, 400);
}

/** Show the place in the address. */
function goToPlace() {
  const numbers = /^#(\d{1,5}),(\d{1,5})(?:,(\d{1,3}(?:\.\d{1,3})?))?$/.exec(location.hash);
  if (!numbers || !board.contains(+numbers[1], +numbers[2])) return;
  view.show(+numbers[1], +numbers[2], +(numbers[3] ?? 16));
}
addEventListener("hashchange", goToPlace);

// Buttons and keys.

stage.addEventListener("pointerdown", () => stage.focus({ preventScroll: true }));
$("zoom-in").addEventListener("click", () => view.step(1));
$("zoom-out").addEventListener("click", () => view.step(-1));
$("fit").addEventListener("click", () => view.fit());
$("show-help").addEventListener("click", () => $("help").showModal());

const moderation = new Moderation(board, view, session, say);
select = () => moderation.selected();
$("moderate").addEventListener("click", () => moderation.toggle());

addEventListener("keydown", ({ key, target, ctrlKey, metaKey, altKey }) => {
  if (document.querySelector("dialog[open]") || ctrlKey || metaKey || altKey) return;
  const typing = target.matches("#moderation :is(input, select)");
  if (key === "Escape") stage.focus();
  else if (!typing && key === "?") $("help").showModal();
  else if (!typing && (key === "m" || key === "M") && !$("moderate").hidden) moderation.toggle();
});

// Signing in.

let author; // who is signed in: null is nobody, undefined that the server hasn't answered yet

function showRights(rights) {
  $("account").textContent = rights.author ? "Sign out" : "Sign in";
  $("account").title = rights.author ? `Signed in as ${rights.author.replace(/^key:/, "")}` : "";
  $("moderate").hidden = !rights.scopes.includes("moderate");
  if ($("moderate").hidden) moderation.close();
  if (author !== undefined && author !== rights.author) {
    budget.clear();
    restart();
  }
  author = rights.author;
}

$("account").addEventListener("click", () => {
  if (session.key) {
    session.signOut();
    say("Signed out");
    return;
  }
  $("key").value = "";
  $("sign-in-problem").hidden = true;
  $("sign-in").showModal();
});
$("sign-in-cancel").addEventListener("click", () => $("sign-in").close());
$("sign-in-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await session.signIn($("key").value.trim());
    $("sign-in").close();
    say("Signed in");
  } catch (error) {
    $("sign-in-problem").textContent = error.message;
    $("sign-in-problem").hidden = false;
  }
});

let toasting = 0;

function toast(text) {
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(toasting);
  toasting = setTimeout(() => ($("toast").hidden = true), TOAST);
}

// Messages from the server.

let connected = "loading";

/** Show the state, with `text` in place of its name; the text of a maintenance is a notice. */
function showState(state, text = "") {
  const paused = state === "maintenance";
  if (paused && $("notice").textContent !== text) $("notice").textContent = text;
  // While the page tries to load, the notice stays.
  if (state !== "loading") $("notice").hidden = !paused;
  $("connection").dataset.state = state;
  $("connection").title = HINTS[state] ?? "";
  $("connection").textContent = (!paused && text) || STATES[state];
}

const stream = new Stream(session, {
  load(size, part, bytes, event) {
    const first = !board.width;
    board.load(size, part, bytes);
    painter.settleAll(event);
    view.measure(...size);
    if (first) goToPlace();
    $("board").classList.add("loaded");
    describe(view.cursor);
  },
  change(changes, event) {
    for (const [x, y, channel, value] of changes) board.change(x, y, CHANNELS[channel], value);
    painter.settle(event);
    const { cursor } = view;
    if (cursor && changes.length) describe(cursor);
  },
  status({ viewers, writes, instance, release, maintenance }) {
    $("instance").textContent = instance;
    $("release").textContent = release;
    $("viewers").textContent = viewers === null ? "–" : number.format(viewers);
    $("viewers-unit").textContent = viewers === 1 ? "viewer" : "viewers";
    $("writes").textContent = writes === null ? "–" : number.format(writes);
    if (connected !== "live") return;
    if (maintenance) showState("maintenance", maintenance);
    else if (writes === null) showState("lost", "Storage is unavailable");
    else showState("live");
  },
  state(state, text) {
    if (state === connected && state !== "loading") return;
    connected = state;
    const details = text && state !== "private" && state !== "maintenance";
    showState(state, details ? `${STATES[state]}: ${text}` : state === "maintenance" ? text : "");
    if (state !== "live" && state !== "loading") for (const id of STATUS) $(id).textContent = "–";
  },
});

follow = (part) => stream.show(part);
restart = () => stream.restart();
session.check().then((problem) => problem && toast(`Signed out: ${problem}`));

// Keys work at once; the focus is shown when one is used.
stage.focus({ preventScroll: true, focusVisible: false });
