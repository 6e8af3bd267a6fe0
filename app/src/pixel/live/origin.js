// Who painted the pixel under the cursor, and when. Without a history service there is no answer.

const REST = 400; // milliseconds for which the cursor rests on a pixel before the server is asked
const TIMEOUT = 5_000; // milliseconds for an answer
const UNITS = { day: 86_400, hour: 3600, minute: 60, second: 1 };
const NAMES = { key: "", operator: "operator " };

const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });

export class Origin {
  #session;
  #show;
  #question = ""; // the pixel and its colour
  #timer = 0;
  #available = true;

  /**
   * @param {import("./session.js").Session} session
   * @param {(text: string) => void} show
   */
  constructor(session, show) {
    this.#session = session;
    this.#show = show;
  }

  /** The cursor is on a pixel {x, y} of this colour, or on none (null). */
  ask(cell, colour) {
    const question = cell ? `${cell.x}/${cell.y} ${colour}` : "";
    if (question === this.#question) return;
    this.#question = question;
    clearTimeout(this.#timer);
    this.#show("");
    if (cell && this.#available) this.#timer = setTimeout(() => this.#answer(cell, question), REST);
  }

  async #answer({ x, y }, question) {
    let changes;
    try {
      const options = { signal: AbortSignal.timeout(TIMEOUT) };
      const answer = await this.#session.fetch(`pixel/${x}/${y}/history?limit=1`, options);
      if (answer.status === 404) this.#available = false;
      if (!answer.ok) return;
      ({ changes } = await answer.json());
    } catch {
      return; // the next pixel is asked for again
    }
    if (question === this.#question && changes.length) this.#show(describe(changes[0]));
  }
}

/** As in "alice, 5 minutes ago". */
function describe({ author, time }) {
  const seconds = Math.max((Date.now() - Date.parse(time)) / 1000, 0);
  const [unit, length] = Object.entries(UNITS).find(([, least]) => seconds >= least) ?? ["second", 1];
  const [kind, ...rest] = (author ?? "unknown").split(":");
  const name = rest.length ? `${NAMES[kind] ?? `${kind} `}${rest.join(":")}` : kind;
  return `${name}, ${relative.format(-Math.floor(seconds / length), unit)}`;
}
