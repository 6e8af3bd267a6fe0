// What is left of the user's budget, as it grows again.

const PIXEL = 3; // channel writes
const STEP = 1_000; // milliseconds

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export class Budget {
  #element;
  #state = null; // {left, size, seconds} as the server has sent it
  #at = 0; // when
  #timer = 0;

  /** @param {HTMLElement} element shows it */
  constructor(element) {
    this.#element = element;
  }

  /** The server's answer: the channel writes that are left, those of a full budget, and its seconds. */
  show(state) {
    this.#state = state;
    this.#at = performance.now();
    clearInterval(this.#timer);
    this.#timer = setInterval(() => this.#render(), STEP);
    this.#render();
  }

  /** Nothing is known any more. */
  clear() {
    clearInterval(this.#timer);
    this.#element.hidden = true;
  }

  #render() {
    const { left, size, seconds } = this.#state;
    const rate = size / seconds; // channel writes a second
    const now = Math.min(left + ((performance.now() - this.#at) / 1000) * rate, size);
    const pixels = Math.floor(now / PIXEL);
    if (now === size) clearInterval(this.#timer);
    this.#element.hidden = false;
    if (size < PIXEL) this.#element.textContent = "The budget is too small for a pixel";
    else if (!pixels) this.#element.textContent = `Next pixel in ${Math.ceil((PIXEL - now) / rate)} s`;
    else this.#element.textContent = `${number.format(pixels)} ${pixels === 1 ? "pixel" : "pixels"} left`;
  }
}
