// The key that the user has signed in with. It is kept in this browser only, and sent with every request.

const STORED = "pixel-key";
const TIMEOUT = 10_000; // milliseconds for an answer

/**
 * `on` receives
 *
 * - change({author, scopes}): who is signed in now; without a key, what everybody may do,
 * - budget({left, size, seconds}): after an answer that names them: the channel writes that are left, those
 *   of a full budget, and the seconds in which an empty one is full again.
 */
export class Session {
  #on;
  #key = stored();

  constructor(on) {
    this.#on = on;
    addEventListener("storage", ({ key }) => {
      // Another tab has signed in or out.
      if (key !== STORED && key !== null) return;
      this.#key = stored();
      this.check();
    });
  }

  /** The key, or null. */
  get key() {
    return this.#key;
  }

  /** Headers that identify the user. */
  get headers() {
    return this.#key ? { Authorization: `Bearer ${this.#key}` } : {};
  }

  /** Find out who is signed in. Returns why not, if the key isn't valid, which is then forgotten. */
  async check() {
    const key = this.#key;
    const answer = await this.fetch("access").catch(() => null);
    if (key !== this.#key || !answer) return "";
    if (answer.status === 401 && key) {
      const { detail } = await answer.json();
      this.signOut();
      return detail;
    }
    if (answer.ok) this.#on.change(await answer.json());
    return "";
  }

  /** Sign in. Throws an Error with the reason if the key isn't valid. */
  async signIn(key) {
    const answer = await send("access", { headers: { Authorization: `Bearer ${key}` } });
    if (!answer.ok) throw new Error(await reason(answer));
    this.#key = key;
    store(key);
    this.#on.change(await answer.json());
  }

  signOut() {
    this.#key = null;
    store(null);
    this.check();
  }

  /** As fetch, with the key. */
  async fetch(url, { headers, ...options } = {}) {
    const answer = await fetch(url, { headers: { ...headers, ...this.headers }, ...options });
    const [rest, policy] = ["RateLimit", "RateLimit-Policy"].map((name) => answer.headers.get(name));
    const numbers = [/;r=(\d+)/.exec(rest), /;q=(\d+);w=(\d+)/.exec(policy)];
    if (numbers.every(Boolean)) {
      const [[, left], [, size, seconds]] = numbers;
      this.#on.budget({ left: +left, size: +size, seconds: +seconds });
    }
    return answer;
  }

  /** Send JSON, or nothing, and return the JSON of the answer. Throws an Error with the reason for a refusal. */
  async ask(url, { method = "GET", body } = {}) {
    const headers = body ? { "Content-Type": "application/json" } : {};
    const options = { method, headers, body: body && JSON.stringify(body), signal: AbortSignal.timeout(TIMEOUT) };
    const answer = await this.fetch(url, options).catch(unreachable);
    if (!answer.ok) throw new Error(await reason(answer));
    return answer.json();
  }
}

/** Why an answer is a refusal. */
export async function reason(answer) {
  const problem = await answer.json().catch(() => ({}));
  return problem.detail ?? problem.title ?? `The server answered ${answer.status}.`;
}

export function unreachable() {
  throw new Error("The server can’t be reached.");
}

function send(url, options) {
  return fetch(url, { ...options, signal: AbortSignal.timeout(TIMEOUT) }).catch(unreachable);
}

function stored() {
  try {
    return localStorage.getItem(STORED);
  } catch {
    return null; // storage may be forbidden; the user is then signed in until the page is closed
  }
}

function store(key) {
  try {
    if (key) localStorage.setItem(STORED, key);
    else localStorage.removeItem(STORED);
  } catch {
    // As above.
  }
}
