// The pixels: as the server has sent them, and the colours painted over them until they are answered.

/** Width of the squares that are redrawn, in pixels. */
const TILE = 64;

export class Board {
  #context;
  #shown; // ImageData: what is drawn with the next frame
  #known; // three bytes (R, G, B) a pixel: as the server has sent them
  #painted = new Map(); // place of a pixel -> the [R, G, B] painted over it
  #stale = new Set(); // numbers of tiles to redraw
  #frame = 0;

  /** @param {HTMLCanvasElement} canvas shows the pixels, one for one */
  constructor(canvas) {
    this.canvas = canvas;
    this.#context = canvas.getContext("2d", { alpha: false });
    this.width = 0;
    this.height = 0;
  }

  /**
   * Replace the pixels of a part [x, y, w, h] of a canvas of this size: three bytes (R, G, B) each,
   * row by row. The part is all of it if the size is another one than before.
   */
  load([width, height], [left, top, w, h], bytes) {
    if (width !== this.width || height !== this.height) {
      [this.width, this.height] = [this.canvas.width, this.canvas.height] = [width, height];
      this.#shown = new ImageData(width, height);
      this.#shown.data.fill(255);
      this.#known = bytes;
    }
    const shown = this.#shown.data;
    for (let row = 0; row < h; row += 1) {
      const place = this.place(left, top + row);
      const [start, end] = [row * w * 3, (row + 1) * w * 3];
      if (this.#known !== bytes) this.#known.set(bytes.subarray(start, end), place * 3);
      for (let from = start, to = place * 4; from < end; from += 3, to += 4) {
        shown[to] = bytes[from];
        shown[to + 1] = bytes[from + 1];
        shown[to + 2] = bytes[from + 2];
      }
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

  /** A change from the server: channel 0, 1, 2 for R, G, B, and its new value. */
  change(x, y, channel, value) {
    if (!this.contains(x, y)) return; // the canvas has become larger since it was loaded
    const place = this.place(x, y);
    this.#known[place * 3 + channel] = value;
    this.#show(place);
  }

  /** Show a colour [R, G, B] over the server's pixel, until unpaint. */
  paint(place, rgb) {
    this.#painted.set(place, rgb);
    this.#show(place);
  }

  /** Show the server's pixel again. */
  unpaint(place) {
    this.#painted.delete(place);
    this.#show(place);
  }

  /** The [R, G, B] that is shown at a place. */
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
