// The event stream, of which all tabs of a browser share one: browsers open few connections to a host.

import { KeyedSource } from "./source.js";

const SILENCE = 10_000; // milliseconds; a stream that works receives something every two seconds
const HELD_BACK = 6_000; // milliseconds; a stream that works receives something at once
const HELD_BACK_RETRY = 20_000;
const FIRST_PAUSE = 500;
const LONGEST_PAUSE = 8_000;
const HISTORY = 20_000; // changes that are kept for a tab that joins

/** Whether an event ID, as in 1795225898442-0, is that of a later event. */
export function isAfter(one, other) {
  const [[a, b], [c, d]] = [one, other].map((id) => id.split("-").map(Number));
  return a > c || (a === c && b > d);
}

/** The configuration epoch in an event ID, as in 1795225898442-0-7; 0 outside clusters. */
const epoch = (id) => Number(id.split("-")[2] ?? 0);

/** The state that the answer to a refused request means, and the reason. */
export async function refusal(answer) {
  const { maintenance, detail = "" } = await answer.json().catch(() => ({}));
  const state = answer.status === 401 ? "private" : "lost";
  return [maintenance ? "maintenance" : state, detail];
}

/**
 * Follows the event stream for the tabs at some message ports. A tab sends
 *
 * - {follow: event, part, subscription, url, key}: send me the changes after an event, at least those
 *   of a region [x, y, w, h] of the canvas, or of all of it if part is null; the key may be null,
 * - {hurry: true}: the network may be back,
 * - {leave: true}: stop sending.
 *
 * It receives messages with the number of its subscription and one of
 *
 * - {event, changes}: arrays [x, y, channel, value], and the last event that they contain,
 * - {status}: as the server sends it,
 * - {state, text}: "live", "lost", "private" if reading needs a key, "maintenance" with its message, or
 *   "held" if a proxy holds the stream back,
 * - {resync: event}: fetch the canvas as of this event or later, and follow again.
 */
export class Feed {
  #subscriptions = new Map(); // port -> {subscription, part}
  #url = "";
  #key = null;
  #part = null; // that the stream is about
  #source = null;
  #state = ""; // empty without a subscription
  #text = ""; // that belongs to the state
  #event = ""; // the last one received
  #history = []; // messages with changes
  #complete = ""; // the event after which the history is complete
  #kept = 0; // changes in it
  #received = false; // whether this source has received anything
  #pause = FIRST_PAUSE;
  #timer = 0;

  attach(port) {
    port.onmessage = ({ data }) => {
      if (data.follow) this.#follow(port, data);
      else if (data.leave) this.#leave(port);
      else if (data.hurry && this.#source?.readyState !== EventSource.OPEN) this.#listen();
    };
  }

  #follow(port, { follow, part, subscription, url, key }) {
    this.#subscriptions.set(port, { subscription, part });
    const renewed = key !== this.#key;
    this.#key = key;
    if (!this.#state) {
      this.#url = url;
      this.#restart(follow);
      this.#state = "lost";
      this.#listen();
    } else if (isAfter(this.#complete, follow) || epoch(follow) < epoch(this.#event)) {
      // Of an earlier epoch, it may be the event of a deposed master that the stream doesn't have.
      this.#send({ resync: this.#complete }, [port]);
    } else if (renewed || String(this.#wanted()) !== String(this.#part)) {
      // Begin again with another part or key, where those are who know the least.
      this.#restart(isAfter(this.#event, follow) ? follow : this.#event);
      this.#listen();
      this.#send({ state: this.#state, text: this.#text }, [port]);
    } else {
      for (const message of this.#history) {
        if (isAfter(message.event, follow)) this.#send(message, [port]);
      }
      this.#send({ state: this.#state, text: this.#text }, [port]);
    }
  }

  /** The smallest part that has those of all tabs; null for all of the canvas. */
  #wanted() {
    const parts = [...this.#subscriptions.values()].map(({ part }) => part);
    if (parts.includes(null)) return null;
    const [left, top] = [0, 1].map((axis) => Math.min(...parts.map((part) => part[axis])));
    const [right, bottom] = [0, 1].map((axis) =>
      Math.max(...parts.map((part) => part[axis] + part[axis + 2])),
    );
    return [left, top, right - left, bottom - top];
  }

  #leave(port) {
    this.#subscriptions.delete(port);
    if (this.#subscriptions.size) return;
    this.#stop();
    this.#state = "";
  }

  #send(message, ports = this.#subscriptions.keys()) {
    for (const port of ports) {
      const { subscription } = this.#subscriptions.get(port);
      port.postMessage({ ...message, subscription });
    }
  }

  /** Begin with an empty history after an event. */
  #restart(event) {
    this.#event = this.#complete = event;
    this.#history = [];
    this.#kept = 0;
  }

  #listen() {
    this.#stop();
    if (!this.#subscriptions.size) return;
    this.#part = this.#wanted();
    const names = ["x", "y", "w", "h"];
    const part = this.#part?.map((value, index) => `${names[index]}=${value}&`).join("") ?? "";
    const url = `${this.#url}?${part}after=${this.#event}`;
    const source = (this.#source = this.#key ? new KeyedSource(url, this.#key) : new EventSource(url));
    this.#received = false;
    this.#expect(HELD_BACK);
    source.onmessage = ({ data, lastEventId }) => {
      this.#expect();
      this.#pause = FIRST_PAUSE;
      this.#event = lastEventId;
      this.#tell("live");
      this.#keep({ event: lastEventId, changes: JSON.parse(data) });
    };
    source.addEventListener("status", ({ data, lastEventId }) => {
      this.#expect();
      if (isAfter(lastEventId, this.#event)) {
        // Of a part, it tells how far the stream is.
        this.#event = lastEventId;
        this.#send({ event: lastEventId, changes: [] });
      }
      this.#send({ status: JSON.parse(data) });
    });
    source.addEventListener("resync", ({ lastEventId }) => {
      this.#expect();
      this.#restart(lastEventId);
      this.#send({ resync: lastEventId });
    });
    source.onerror = () => {
      // The browser reopens a lost connection, but not a refused one.
      if (source.readyState === EventSource.CLOSED) {
        this.#lose();
        this.#explain(url);
      } else this.#tell("lost");
      this.#received = true; // it was lost, not held back
    };
  }

  #keep(message) {
    this.#send(message);
    this.#history.push(message);
    this.#kept += message.changes.length;
    while (this.#kept > HISTORY) {
      const { event, changes } = this.#history.shift();
      this.#complete = event;
      this.#kept -= changes.length;
    }
  }

  #tell(state, text = "") {
    if (state === this.#state) return;
    this.#state = state;
    this.#text = text;
    this.#send({ state, text });
  }

  /** Report maintenance or a missing key, if that is why a stream was refused: the browser doesn't say. */
  async #explain(url) {
    const request = new AbortController();
    try {
      const headers = this.#key ? { Authorization: `Bearer ${this.#key}` } : {};
      const answer = await fetch(url, { headers, signal: request.signal });
      if (answer.ok) return;
      const [state, text] = await refusal(answer);
      if (this.#state === "lost") this.#tell(state, text);
    } catch {
      // The server can't be reached.
    } finally {
      request.abort();
    }
  }

  /** If nothing arrives within this time, the connection counts as lost, or as held back. */
  #expect(milliseconds = SILENCE) {
    this.#received ||= milliseconds === SILENCE;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => (this.#received ? this.#lose() : this.#hold()), milliseconds);
  }

  #hold() {
    this.#stop();
    this.#tell("held");
    this.#timer = setTimeout(() => this.#listen(), HELD_BACK_RETRY);
  }

  #lose() {
    this.#stop();
    if (this.#state !== "maintenance" && this.#state !== "private") this.#tell("lost");
    this.#timer = setTimeout(() => this.#listen(), this.#pause * (0.5 + Math.random()));
    this.#pause = Math.min(2 * this.#pause, LONGEST_PAUSE);
  }

  #stop() {
    clearTimeout(this.#timer);
    this.#source?.close();
    this.#source = null;
  }
}
