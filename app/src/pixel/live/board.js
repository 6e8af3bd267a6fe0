// The pixels: what the server says of them, and what is painted over that for the time being.

/** Pixels on a side of the squares in which the picture is brought up to date. */
const TILE = 64;

export class Board {
  #context;
  #shown; // ImageData: what is to be seen, of which the picture is a frame late at most
  #known; // three bytes (R, G, B) a pixel: what the server has said
  #painted = new Map(); // place of a pixel -> the [R, G, B] painted over it
  #stale = new Set(); // numbers of tiles
  #frame = 0;

  /** @param {HTMLCanvasElement} canvas shows the pixels, one for one */
  constructor(canvas) {
    this.canvas = canvas;
    this.#context = canvas.getContext("2d", { alpha: false });
    this.width = 0;
    this.height = 0;
  }

  /** Take all pixels anew: three bytes (R, G, B) each, row by row. */
  load(width, height, bytes) {
    if (width !== this.width || height !== this.height) {
      [this.width, this.height] = [this.canvas.width, this.canvas.height] = [width, height];
      this.#shown = new ImageData(width, height);
      this.#shown.data.fill(255);
    }
    this.#known = bytes;
    const shown = this.#shown.data;
    for (let from = 0, to = 0; from < bytes.length; from += 3, to += 4) {
      shown[to] = bytes[from];
      shown[to + 1] = bytes[from + 1];
      shown[to + 2] = bytes[from + 2];
    }
    this.#stale.clear();
    for (const place of this.#painted.keys()) this.#show(place);
    this.#stale.clear();
    this.#context.putImageData(this.#shown, 0, 0);
  }

  /** The place of a pixel: its number, row by row. */
  place(x, y) {
    return y * this.width + x;
  }

  contains(x, y) {
    return x >= 0 && y >= 0 && x < this.width && y < this.height;
  }

  /** What the server says: channel 0, 1, 2 for R, G, B has become a value. */
  change(x, y, channel, value) {
    if (!this.contains(x, y)) return; // of a canvas that has become larger since
    const place = this.place(x, y);
    this.#known[place * 3 + channel] = value;
    this.#show(place);
  }

  /** Show a colour [R, G, B] over what the server says, until it is taken off. */
  paint(place, rgb) {
    this.#painted.set(place, rgb);
    this.#show(place);
  }

  /** Take off what was painted. */
  unpaint(place) {
    this.#painted.delete(place);
    this.#show(place);
  }

  /** The [R, G, B] that is to be seen at a place. */
  colour(place) {
    return this.#painted.get(place) ?? [...this.#known.subarray(place * 3, place * 3 + 3)];
  }

  #show(place) {
    this.#shown.data.set(this.colour(place), place * 4);
    const [x, y] = [place % this.width, Math.floor(place / this.width)];
    this.#stale.add(Math.floor(y / TILE) * this.#columns() + Math.floor(x / TILE));
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    this.#frame = 0;
    const columns = this.#columns();
    for (const tile of this.#stale) {
      const [left, top] = [(tile % columns) * TILE, Math.floor(tile / columns) * TILE];
      this.#context.putImageData(this.#shown, 0, 0, left, top, TILE, TILE);
    }
    this.#stale.clear();
  }

  #columns() {
    return Math.ceil(this.width / TILE);
  }
}
