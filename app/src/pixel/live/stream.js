// The way from the server: the canvas, and the events after it.

const SILENCE = 10_000; // milliseconds; a server that is there says something every two seconds
const UNSEEN = 60_000; // milliseconds for which nobody looks before the stream is let go
const FIRST_PAUSE = 500;
const LONGEST_PAUSE = 8_000;

/** Whether an event's id, as in 1795225898442-0, is that of a later one. */
export function isAfter(one, other) {
  const [[a, b], [c, d]] = [one, other].map((id) => id.split("-").map(Number));
  return a > c || (a === c && b > d);
}

/**
 * Follows the canvas, for ever. `on` is told of
 *
 * - load(width, height, bytes, event): the canvas as a whole, three bytes (R, G, B) a pixel, and the
 *   event at which it stands,
 * - change(changes, event): arrays [x, y, channel, value], and the event up to which they tell,
 * - status({viewers, writes, instance, release}): of the fleet, null while its storage can't be
 *   asked; and which instance of which release says so,
 * - state(state, text): "loading", "live" or "lost", with more about it.
 */
export class Stream {
  #on;
  #source = null;
  #event = ""; // up to which everything has been heard
  #loading = false;
  #pause = FIRST_PAUSE;
  #timer = 0;
  #unseen = 0;

  constructor(on) {
    this.#on = on;
    addEventListener("online", () => this.#hurry());
    document.addEventListener("visibilitychange", () => {
      clearTimeout(this.#unseen);
      if (!document.hidden) this.#hurry();
      else this.#unseen = setTimeout(() => this.#stop(), UNSEEN);
    });
    this.#load();
  }

  async #load() {
    this.#stop();
    this.#loading = true;
    this.#on.state("loading", "");
    try {
      this.#event = await fetchCanvas(this.#on);
      this.#pause = FIRST_PAUSE;
      this.#listen();
    } catch (error) {
      this.#event = "";
      this.#lose(error.message);
    } finally {
      this.#loading = false;
    }
  }

  #listen() {
    this.#stop();
    const source = (this.#source = new EventSource(`events?after=${this.#event}`));
    this.#expect();
    source.onmessage = ({ data, lastEventId }) => {
      this.#expect();
      this.#pause = FIRST_PAUSE;
      this.#event = lastEventId;
      this.#on.state("live", "");
      this.#on.change(JSON.parse(data), lastEventId);
    };
    source.addEventListener("status", ({ data }) => {
      this.#expect();
      this.#on.status(JSON.parse(data));
    });
    source.addEventListener("resync", () => this.#load());
    source.onerror = () => {
      // It comes back by itself where the connection was lost, and never where it was refused.
      if (source.readyState === EventSource.CLOSED) this.#lose("");
      else this.#on.state("lost", "");
    };
  }

  /** Something is to be heard soon, or the connection is as good as lost. */
  #expect() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#lose(""), SILENCE);
  }

  #lose(reason) {
    this.#stop();
    this.#on.state("lost", reason);
    this.#timer = setTimeout(() => this.#resume(), this.#pause * (0.5 + Math.random()));
    this.#pause = Math.min(2 * this.#pause, LONGEST_PAUSE);
  }

  #resume() {
    if (this.#event) this.#listen();
    else this.#load();
  }

  /** There is reason to think that it works now. */
  #hurry() {
    if (!this.#loading && this.#source?.readyState !== EventSource.OPEN) this.#resume();
  }

  #stop() {
    clearTimeout(this.#timer);
    this.#source?.close();
    this.#source = null;
  }
}

/** Returns the event at which the canvas stands. Throws an Error that says why there is none. */
async function fetchCanvas(on) {
  const answer = await fetch("canvas.rgb", { cache: "no-cache" });
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({}));
    throw new Error(problem.detail ?? "");
  }
  const [width, height] = ["Width", "Height"].map((name) => +answer.headers.get(`X-Pixel-${name}`));
  const bytes = new Uint8Array(width * height * 3);
  let length = 0;
  const reader = answer.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    bytes.set(value, length);
    length += value.length;
    on.state("loading", `${Math.floor((100 * length) / bytes.length)} %`);
  }
  if (length < bytes.length) throw new Error("The canvas came in part only.");
  const event = answer.headers.get("X-Pixel-Event");
  on.load(width, height, bytes, event);
  return event;
}
