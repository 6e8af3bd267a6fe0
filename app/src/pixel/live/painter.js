// Painting: a pixel is shown at once, sent, and taken back if it is refused.

import { isAfter } from "./feed.js";
import { reason, unreachable } from "./session.js";

const TIMEOUT = 10_000; // milliseconds for an answer

export class Painter {
  #board;
  #session;
  #refused;
  #received = "0-0"; // the last event that the board contains
  #strokes = new Map(); // place of a pixel -> the colour painted there whose event hasn't arrived

  /**
   * @param {import("./board.js").Board} board
   * @param {import("./session.js").Session} session
   * @param {(reason: string) => void} refused
   */
  constructor(board, session, refused) {
    this.#board = board;
    this.#session = session;
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
      if (stroke.sending) return; // it is sent after the former one, which keeps the order
      this.#send(x, y, stroke);
    } else {
      const fresh = { rgb, event: "", sending: false };
      this.#strokes.set(place, fresh);
      this.#send(x, y, fresh);
    }
  }

  /** The board contains everything up to an event: show what the server has sent again. */
  settle(event) {
    this.#received = event;
    for (const [place, stroke] of this.#strokes) {
      if (stroke.event && !isAfter(stroke.event, event)) this.#forget(place);
    }
  }

  /** The whole canvas was loaded: all strokes that were answered by then are in it, or lost. */
  settleAll(event) {
    this.#received = event;
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
        event = await this.#put(x, y, sent);
      } while (sent !== stroke.rgb);
      // The colour stays until its event arrives: changes by others may arrive before it.
      if (isAfter(event, this.#received)) stroke.event = event;
      else this.#forget(this.#board.place(x, y));
    } catch (error) {
      this.#forget(this.#board.place(x, y));
      this.#refused(error.message);
    } finally {
      stroke.sending = false;
    }
  }
  /** Returns the event that contains the change. Throws an Error with the reason for a refusal. */
  async #put(x, y, [R, G, B]) {
    const options = {
      method: "PUT",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ R, G, B }),
      signal: AbortSignal.timeout(TIMEOUT),
    };
    const answer = await this.#session.fetch(`pixel/${x}/${y}`, options).catch(unreachable);
    if (!answer.ok) throw new Error(await reason(answer));
    return answer.headers.get("X-Pixel-Event") ?? "0-0";
  }
}
