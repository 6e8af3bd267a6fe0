// Painting: shown at once, sent, and taken back if it is refused.

import { isAfter } from "./stream.js";

const PATIENCE = 10_000; // milliseconds until an answer isn't waited for any longer

export class Painter {
  #board;
  #refused;
  #heard = "0-0"; // the event up to which everything has been heard
  #strokes = new Map(); // place of a pixel -> what is painted there and isn't yet known to be

  /**
   * @param {import("./board.js").Board} board
   * @param {(reason: string) => void} refused
   */
  constructor(board, refused) {
    this.#board = board;
    this.#refused = refused;
  }

  /** Paint a pixel in a colour [R, G, B]. */
  paint(x, y, rgb) {
    const place = this.#board.place(x, y);
    this.#board.paint(place, rgb);
    const stroke = this.#strokes.get(place);
    if (stroke) {
      stroke.rgb = rgb;
      stroke.event = "";
      if (stroke.sending) return; // and it is sent after what is on its way, which keeps the order
      this.#send(x, y, stroke);
    } else {
      const fresh = { rgb, event: "", sending: false };
      this.#strokes.set(place, fresh);
      this.#send(x, y, fresh);
    }
  }

  /** Everything up to an event has been heard: what the server says counts again. */
  settle(event) {
    this.#heard = event;
    for (const [place, stroke] of this.#strokes) {
      if (stroke.event && !isAfter(stroke.event, event)) this.#forget(place);
    }
  }

  /** All of the canvas was fetched: what had been answered by then is in it, or lost. */
  settleAll(event) {
    this.#heard = event;
    for (const [place, stroke] of this.#strokes) if (stroke.event) this.#forget(place);
  }

  #forget(place) {
    this.#strokes.delete(place);
    this.#board.unpaint(place);
  }

  async #send(x, y, stroke) {
    stroke.sending = true;
    try {
      let sent, event;
      do {
        sent = stroke.rgb;
        event = await put(x, y, sent);
      } while (sent !== stroke.rgb);
      // The colour stays until its event is heard: another's may be on its way before it.
      if (isAfter(event, this.#heard)) stroke.event = event;
      else this.#forget(this.#board.place(x, y));
    } catch (error) {
      this.#forget(this.#board.place(x, y));
      this.#refused(error.message);
    } finally {
      stroke.sending = false;
    }
  }
}

/** Returns the event that tells of it. Throws an Error that says why it isn't so. */
async function put(x, y, [R, G, B]) {
  let answer;
  try {
    answer = await fetch(`pixel/${x}/${y}`, {
      method: "PUT",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ R, G, B }),
      signal: AbortSignal.timeout(PATIENCE),
    });
  } catch {
    throw new Error("The server can’t be reached.");
  }
  if (answer.ok) return answer.headers.get("X-Pixel-Event") ?? "0-0";
  const problem = await answer.json().catch(() => ({}));
  throw new Error(problem.detail ?? problem.title ?? `The server answered ${answer.status}.`);
}
