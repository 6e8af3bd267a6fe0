// From the server to this tab: the canvas, and the changes after it.

import { Feed, isAfter, refusal } from "./feed.js";

// A worker of an earlier release runs as long as one of its tabs is open. Change this name whenever
// the messages of feed.js change.
const WORKER = "pixel-4";
const UNSEEN = 60_000; // milliseconds after which a hidden tab no longer follows
const LARGE = 2 ** 20; // pixels; of a larger canvas only what is on the stage is followed
const GRID = 256; // pixels; where the followed part begins and ends, so that viewers share parts
const RESTED = 300; // milliseconds without a move after which another part is followed
const POLLING = 2_000; // milliseconds between two polls
const SETTLED = 10_000; // milliseconds after a load in which a resync means overload
const FIRST_PAUSE = 500;
const LONGEST_PAUSE = 8_000;

/**
 * Follows the canvas until the tab is closed. `on` receives
 *
 * - load([width, height], [x, y, w, h], bytes, event): the size of the canvas, all or a part of it,
 *   three bytes (R, G, B) a pixel, and the event of this snapshot,
 * - change(changes, event): arrays [x, y, channel, value], and the last event that they contain,
 * - status({viewers, writes, instance, release, maintenance}): of the fleet, null while Redis can't
 *   be asked; the instance and release that send it; and the message of a maintenance or null,
 * - state(state, text): "loading", "live", "lost", "private" if reading needs a key, "maintenance", or
 *   "polling" while a proxy holds the stream back; and details.
 */
export class Stream {
  #session;
  #on;
  #port;
  #subscription = 0;
  #event = ""; // the last one that is shown
  #least = ""; // the event that the next canvas must contain, if any
  #size = null; // width and height of the canvas
  #part = null; // [x, y, w, h] that is followed
  #shown = null; // [x, y, w, h] that is on the stage
  #moving = 0;
  #tag = ""; // ETag of the part that is followed, if no change has come since it was loaded
  #loading = false;
  #loaded = 0; // when
  #polling = false;
  #pause = FIRST_PAUSE;
  #timer = 0;
  #unseen = 0;

  /** @param {import("./session.js").Session} session */
  constructor(session, on) {
    this.#session = session;
    this.#on = on;
    this.#connect();
    addEventListener("online", () => this.#hurry());
    addEventListener("pagehide", () => this.#leave());
    addEventListener("pageshow", ({ persisted }) => persisted && this.#follow());
    document.addEventListener("visibilitychange", () => {
      clearTimeout(this.#unseen);
      if (document.hidden) this.#unseen = setTimeout(() => this.#leave(), UNSEEN);
      else this.#hurry();
    });
    this.#load();
  }

  /** Begin again: the user has signed in or out. */
  restart() {
    this.#tag = "";
    this.#load();
  }

  /** The part [x, y, w, h] of the canvas that is on the stage. */
  show(part) {
    this.#shown = part;
    clearTimeout(this.#moving);
    this.#moving = setTimeout(() => this.#move(), RESTED);
  }

  /** What to follow: all of a small canvas, of a large one what is on the stage. */
  #wanted() {
    const [width, height] = this.#size;
    if (!this.#shown || width * height <= LARGE) return [0, 0, width, height];
    const [x, y, w, h] = this.#shown;
    const [left, top] = [x, y].map((start) => Math.floor(start / GRID) * GRID);
    const [right, bottom] = [x + w, y + h].map((end) => Math.ceil(end / GRID) * GRID);
    return [left, top, Math.min(right, width) - left, Math.min(bottom, height) - top];
  }

  /** Follow what is on the stage now; it is loaded first if it wasn't followed before. */
  #move() {
    if (!this.#part || this.#loading || !this.#event) return;
    const [x, y, w, h] = this.#wanted();
    const [left, top, width, height] = this.#part;
    if (x === left && y === top && w === width && h === height) return;
    this.#tag = "";
    if (x >= left && y >= top && x + w <= left + width && y + h <= top + height) {
      this.#part = [x, y, w, h];
      if (!this.#polling) this.#follow();
    } else this.#load();
  }

  /** Use the feed shared by all tabs, or one for this tab if the browser has no shared workers. */
  #connect() {
    const own = () => {
      const { port1, port2 } = new MessageChannel();
      new Feed().attach(port1);
      this.#use(port2);
    };
    if (!globalThis.SharedWorker) {
      own();
      return;
    }
    const url = new URL("shared.js", import.meta.url);
    const worker = new SharedWorker(url, { type: "module", name: WORKER });
    worker.onerror = () => {
      own();
      if (this.#subscription) this.#follow();
    };
    this.#use(worker.port);
  }

  #use(port) {
    this.#port = port;
    port.onmessage = ({ data }) => {
      if (data.subscription === this.#subscription) this.#receive(data);
    };
  }

  #receive({ changes, event, status, state, text, resync }) {
    if (performance.now() - this.#loaded > SETTLED) this.#pause = FIRST_PAUSE;
    if (changes && isAfter(event, this.#event)) {
      this.#event = event;
      if (changes.length) this.#tag = "";
      this.#on.change(changes, event);
    } else if (status) {
      this.#on.status(status);
    } else if (resync) {
      this.#least = resync;
      this.#reload();
    } else if (state === "held") {
      this.#polling = true;
      this.#poll();
    } else if (state) {
      if (this.#polling) clearTimeout(this.#timer);
      this.#polling = false;
      this.#on.state(state, text ?? "");
    }
  }

  async #load() {
    clearTimeout(this.#timer);
    this.#subscription += 1; // what the feed has sent for the former canvas is ignored
    this.#polling = false;
    this.#loading = true;
    this.#on.state("loading", "");
    try {
      await this.#fetch((percent) => this.#on.state("loading", `${percent} %`));
      this.#follow();
    } catch (error) {
      this.#event = "";
      this.#on.state(error.state ?? "lost", error.message);
      this.#later(() => this.#load());
    } finally {
      this.#loading = false;
    }
    this.#move();
  }

  /** Load at once, or later if the last load is recent: then there are too many changes to send. */
  #reload() {
    this.#subscription += 1;
    this.#on.state("loading", "");
    if (performance.now() - this.#loaded > SETTLED) this.#load();
    else this.#later(() => this.#load());
  }

  #later(act) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(act, this.#pause * (0.5 + Math.random()));
    this.#pause = Math.min(2 * this.#pause, LONGEST_PAUSE);
  }

  #follow() {
    if (!this.#event) return;
    this.#subscription += 1;
    const url = new URL("events", document.baseURI).href;
    const part = this.#isAll(this.#part) ? null : this.#part;
    const { key } = this.#session;
    this.#port.postMessage({ follow: this.#event, part, subscription: this.#subscription, url, key });
  }

  #leave() {
    this.#subscription += 1;
    this.#port.postMessage({ leave: true });
    if (this.#polling) clearTimeout(this.#timer);
    this.#polling = false;
  }

  /** Reconnect now: the browser is online again, or the tab is visible again. */
  #hurry() {
    if (this.#loading) return;
    if (!this.#event) this.#load();
    else {
      this.#port.postMessage({ hurry: true });
      this.#follow();
    }
  }

  /** Without the stream: fetch the canvas whenever it has changed. */
  async #poll() {
    clearTimeout(this.#timer);
    const subscription = this.#subscription;
    let [state, text] = ["polling", ""];
    try {
      await this.#fetch();
    } catch (error) {
      [state, text] = [error.state ?? "lost", error.message];
    }
    if (!this.#polling || subscription !== this.#subscription) return;
    this.#on.state(state, text);
    this.#timer = setTimeout(() => this.#poll(), POLLING);
  }

  #isAll([, , w, h]) {
    return w === this.#size?.[0] && h === this.#size?.[1];
  }

  /** Fetch the wanted region if it has changed. Throws an Error with the reason, and the state that it means. */
  async #fetch(progress = () => {}) {
    const part = this.#size && this.#wanted();
    const all = !part || this.#isAll(part);
    const query = [];
    if (!all) {
      query.push(...["x", "y", "w", "h"].map((name, index) => `${name}=${part[index]}`));
    }
    if (this.#least) query.push(`after=${this.#least}`);
    // The balancer's cache may answer, the browser's own may not.
    const headers = { "Cache-Control": "max-age=0" };
    if (this.#tag) headers["If-None-Match"] = this.#tag;
    const url = `canvas.rgb${query.length ? "?" : ""}${query.join("&")}`;
    const answer = await this.#session.fetch(url, { cache: "no-store", headers });
    if (answer.status === 304) {
      this.#event = answer.headers.get("X-Pixel-Event") ?? this.#event;
      this.#on.change([], this.#event);
    } else {
      if (answer.status === 422) this.#size = null; // it has become smaller
      if (!answer.ok) {
        const [state, text] = await refusal(answer);
        throw Object.assign(new Error(text), { state });
      }
      const [width, height] = ["Width", "Height"].map(
        (name) => +answer.headers.get(`X-Pixel-${name}`),
      );
      const bytes = await readBytes(answer, width * height * 3, progress);
      this.#tag = answer.headers.get("ETag");
      this.#event = answer.headers.get("X-Pixel-Event");
      if (all) this.#size = [width, height];
      this.#part = all ? [0, 0, width, height] : part;
      this.#on.load(this.#size, this.#part, bytes, this.#event);
    }
    this.#least = "";
    this.#loaded = performance.now();
  }
}

async function readBytes(answer, size, progress) {
  const bytes = new Uint8Array(size);
  let length = 0;
  const reader = answer.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    bytes.set(value, length);
    length += value.length;
    progress(Math.floor((100 * length) / size));
  }
  if (length < size) throw new Error("The canvas arrived incomplete.");
  return bytes;
}
