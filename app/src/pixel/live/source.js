// An event stream that is read with a key: the browser's EventSource can't send one.

/** The part of EventSource's interface that feed.js uses. A lost connection is not reopened. */
export class KeyedSource {
  readyState = EventSource.CONNECTING;
  onmessage = null;
  onerror = null;
  #listeners = { message: (event) => this.onmessage?.(event) };
  #request = new AbortController();
  #id = ""; // of the last message that has one

  constructor(url, key) {
    this.#read(url, key);
  }

  addEventListener(type, listener) {
    this.#listeners[type] = listener;
  }

  close() {
    this.readyState = EventSource.CLOSED;
    this.#request.abort();
  }

  async #read(url, key) {
    try {
      const headers = { Authorization: `Bearer ${key}`, Accept: "text/event-stream" };
      const answer = await fetch(url, { headers, cache: "no-store", signal: this.#request.signal });
      if (answer.ok) {
        this.readyState = EventSource.OPEN;
        await this.#events(answer.body.pipeThrough(new TextDecoderStream()).getReader());
      }
    } catch {
      // The connection is lost, or closed by this page.
    }
    if (this.readyState === EventSource.CLOSED) return;
    this.readyState = EventSource.CLOSED;
    this.onerror?.();
  }

  async #events(reader) {
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done || this.readyState === EventSource.CLOSED) return;
      const messages = (rest + value).split("\n\n");
      rest = messages.pop();
      for (const message of messages) this.#dispatch(message);
    }
  }

  #dispatch(message) {
    const fields = Object.fromEntries(
      message.split("\n").map((line) => [line.split(":", 1)[0], line.slice(line.indexOf(":") + 1).trimStart()]),
    );
    const { event = "message", data, id = this.#id } = fields;
    this.#id = id;
    if (data !== undefined) this.#listeners[event]?.({ data, lastEventId: id });
  }
}
