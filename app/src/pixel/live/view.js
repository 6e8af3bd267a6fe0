// The visible part of the board, its zoom, and the gestures and keys that change them.

const STEPS = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64]; // pixels of the screen
const GRID_FROM = 10; // the zoom from which a grid is shown
const CURSOR_SIZE = 9; // at least
const SLACK = { mouse: 4, touch: 10, pen: 6 }; // how far a pointer may move in a click

const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

/**
 * Lengths are CSS pixels from the upper left corner of the stage. `on` receives
 *
 * - paint(x, y), pick(x, y): a click on a pixel,
 * - select([x, y, w, h]): the area that was marked by a drag, while `selecting` is set,
 * - cursor(cell, byKey): the pixel {x, y} that is now under the cursor; null if none,
 * - view({x, y, zoom, part}): the pixel in the middle of the stage, the size of a pixel, and the part
 *   [x, y, w, h] of the canvas that is on the stage.
 */
export class View {
  #stage;
  #canvas;
  #grid;
  #mark;
  #frameOfArea;
  #on;
  #width = 0; // of the canvas, in pixels
  #height = 0;
  #zoom = 1; // as shown: whole pixels of the screen
  #wanted = 1; // as a gesture has set it
  #left = 0;
  #top = 0;
  #size = { width: 0, height: 0 }; // of the stage
  #fitted = true; // until the first zoom or move
  #cursor = null;
  #pointers = new Map(); // pressed ones
  #selecting = false;
  #anchor = null; // the pixel {x, y} where a drag began that selects
  #area = null; // [x, y, w, h] that is selected
  #click = null; // where a pointer went down that may become a click
  #frame = 0;

  constructor({ stage, canvas, grid, mark, area }, on) {
    [this.#stage, this.#canvas, this.#grid, this.#mark, this.#frameOfArea] = [stage, canvas, grid, mark, area];
    this.#on = on;
    new ResizeObserver(() => this.#resize()).observe(stage);
    for (const type of ["down", "move", "up", "cancel", "leave"]) {
      stage.addEventListener(`pointer${type}`, (event) => this[`_${type}`](event));
    }
    stage.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    stage.addEventListener("contextmenu", (event) => {
      event.preventDefault();
      this.#click = null;
      const cell = this.#cell(this.#point(event));
      if (cell) on.pick(cell.x, cell.y);
    });
    stage.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Whether the zoom follows the size of the window, to show all of the canvas. */
  get fitted() {
    return this.#fitted;
  }

  get cursor() {
    return this.#cursor;
  }

  /** Whether a drag selects an area instead of moving the view; two fingers still move it. */
  get selecting() {
    return this.#selecting;
  }

  set selecting(selecting) {
    this.#selecting = selecting;
    this.#stage.classList.toggle("selecting", selecting);
  }

  /** The selected area [x, y, w, h], or null. */
  get area() {
    return this.#area;
  }

  set area(area) {
    this.#area = area;
    this.#render();
  }

  /** The part [x, y, w, h] of the canvas that is on the stage. */
  get part() {
    return this.#part(this.#left, this.#top);
  }

  /** The canvas has this many pixels. */
  measure(width, height) {
    if (width === this.#width && height === this.#height) return;
    [this.#width, this.#height] = [width, height];
    if (this.#fitted) this.fit();
  }

  /** Show the whole canvas. */
  fit() {
    this.#fitted = true;
    this.#zoomTo(this.#fitting(), { x: 0, y: 0 });
    this.#left = (this.#size.width - this.#width * this.#zoom) / 2;
    this.#top = (this.#size.height - this.#height * this.#zoom) / 2;
  }

  /** Show a pixel in the middle, at a zoom. */
  show(x, y, zoom) {
    this.#fitted = false;
    this.#zoomTo(zoom, { x: 0, y: 0 });
    this.#left = this.#size.width / 2 - (x + 0.5) * this.#zoom;
    this.#top = this.#size.height / 2 - (y + 0.5) * this.#zoom;
    this.#moveBy(0, 0);
  }

  /** Zoom in (1) or out (-1) by a step around a point; by default, the middle. */
  step(direction, at = this.#middle()) {
    this.#fitted = false;
    const now = this.#zoom * devicePixelRatio;
    const steps = [0.125, 0.25, 0.5, ...STEPS];
    const next =
      direction > 0
        ? steps.find((size) => size > now * 1.01)
        : steps.findLast((size) => size < now * 0.99);
    if (next) this.#zoomTo(next / devicePixelRatio, at);
  }

  #fitting() {
    const sides = [this.#size.width / this.#width, this.#size.height / this.#height];
    const size = Math.min(...sides) * 0.96 * devicePixelRatio;
    return (size < 1 ? size : Math.floor(size)) / devicePixelRatio;
  }

  #middle() {
    return { x: this.#size.width / 2, y: this.#size.height / 2 };
  }

  #zoomTo(wanted, at) {
    const least = Math.min(this.#fitting() / 2, 1 / devicePixelRatio);
    this.#wanted = clamp(wanted, least, STEPS.at(-1) / devicePixelRatio);
    // Above one pixel of the screen, sizes are whole, so that all pixels are equally large.
    const size = this.#wanted * devicePixelRatio;
    const zoom = (size < 1 ? size : Math.round(size)) / devicePixelRatio;
    const ratio = zoom / this.#zoom;
    this.#zoom = zoom;
    this.#left = at.x - (at.x - this.#left) * ratio;
    this.#top = at.y - (at.y - this.#top) * ratio;
    this.#moveBy(0, 0);
  }

  #moveBy(x, y) {
    // The middle of the stage stays on the canvas.
    const { x: middleX, y: middleY } = this.#middle();
    this.#left = clamp(this.#left + x, middleX - this.#width * this.#zoom, middleX);
    this.#top = clamp(this.#top + y, middleY - this.#height * this.#zoom, middleY);
    this.#render();
  }

  #resize() {
    const { clientWidth: width, clientHeight: height } = this.#stage;
    this.#left += (width - this.#size.width) / 2;
    this.#top += (height - this.#size.height) / 2;
    this.#size = { width, height };
    if (!this.#width) return;
    if (this.#fitted) this.fit();
    else this.#moveBy(0, 0);
  }

  #render() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      const zoom = this.#zoom;
      const [left, top] = [this.#left, this.#top].map(
        (length) => Math.round(length * devicePixelRatio) / devicePixelRatio,
      );
      this.#canvas.style.transform = `translate(${left}px, ${top}px) scale(${zoom})`;
      this.#canvas.classList.toggle("reduced", zoom * devicePixelRatio < 1);
      this.#renderGrid(left, top);
      this.#renderCursor(left, top);
      this.#renderArea(left, top);
      const { x, y } = this.#middle();
      this.#on.view({
        x: clamp(Math.floor((x - left) / zoom), 0, this.#width - 1),
        y: clamp(Math.floor((y - top) / zoom), 0, this.#height - 1),
        zoom,
        part: this.#part(left, top),
      });
    });
  }

  /** The part [x, y, w, h] of the canvas that is on the stage, with its upper left corner there. */
  #part(left, top) {
    const zoom = this.#zoom;
    const [x, y] = [
      clamp(Math.floor(-left / zoom), 0, this.#width - 1),
      clamp(Math.floor(-top / zoom), 0, this.#height - 1),
    ];
    const [right, bottom] = [
      clamp(Math.ceil((this.#size.width - left) / zoom), x + 1, this.#width),
      clamp(Math.ceil((this.#size.height - top) / zoom), y + 1, this.#height),
    ];
    return [x, y, right - x, bottom - y];
  }

  #renderGrid(left, top) {
    const { style } = this.#grid;
    this.#grid.hidden = this.#zoom < GRID_FROM;
    if (this.#grid.hidden) return;
    // Only over the visible part, from the edge of a pixel.
    const [x, y] = [left, top].map((length) => (length < 0 ? length % this.#zoom : length));
    style.transform = `translate(${x}px, ${y}px)`;
    style.width = `${Math.min(this.#size.width, left + this.#width * this.#zoom) - x}px`;
    style.height = `${Math.min(this.#size.height, top + this.#height * this.#zoom) - y}px`;
    style.backgroundSize = `${this.#zoom}px ${this.#zoom}px`;
  }

  #renderCursor(left, top) {
    const { style } = this.#mark;
    this.#mark.hidden = !this.#cursor;
    if (!this.#cursor) return;
    const size = Math.max(this.#zoom, CURSOR_SIZE);
    const [x, y] = [
      left + (this.#cursor.x + 0.5) * this.#zoom - size / 2,
      top + (this.#cursor.y + 0.5) * this.#zoom - size / 2,
    ];
    style.transform = `translate(${x}px, ${y}px)`;
    style.width = style.height = `${size}px`;
  }

  #renderArea(left, top) {
    const { style } = this.#frameOfArea;
    this.#frameOfArea.hidden = !this.#area;
    if (!this.#area) return;
    const [x, y, w, h] = this.#area.map((length) => length * this.#zoom);
    style.transform = `translate(${left + x}px, ${top + y}px)`;
    style.width = `${w}px`;
    style.height = `${h}px`;
  }

  /** Select from the anchor to the pixel at a point. */
  #extend(point) {
    const end = this.#nearest(point);
    const [x, y] = [Math.min(this.#anchor.x, end.x), Math.min(this.#anchor.y, end.y)];
    const [right, bottom] = [Math.max(this.#anchor.x, end.x), Math.max(this.#anchor.y, end.y)];
    this.area = [x, y, right - x + 1, bottom - y + 1];
  }

  /** The pixel {x, y} of the canvas that is nearest to a point. */
  #nearest(point) {
    return {
      x: clamp(Math.floor((point.x - this.#left) / this.#zoom), 0, this.#width - 1),
      y: clamp(Math.floor((point.y - this.#top) / this.#zoom), 0, this.#height - 1),
    };
  }

  /** The pixel {x, y} at a point, or null. */
  #cell(point) {
    const x = Math.floor((point.x - this.#left) / this.#zoom);
    const y = Math.floor((point.y - this.#top) / this.#zoom);
    return x >= 0 && y >= 0 && x < this.#width && y < this.#height ? { x, y } : null;
  }

  #point(event) {
    const { left, top } = this.#stage.getBoundingClientRect();
    return { x: event.clientX - left, y: event.clientY - top };
  }

  #setCursor(cell, byKey = false) {
    this.#cursor = cell;
    this.#on.cursor(cell, byKey);
    this.#render();
  }

  // Pointers.

  _down(event) {
    this.#stage.setPointerCapture(event.pointerId);
    this.#pointers.set(event.pointerId, this.#point(event));
    const alone = this.#pointers.size === 1 && event.button === 0;
    this.#click = alone && !this.#selecting ? this.#point(event) : null;
    this.#anchor = alone && this.#selecting && this.#width ? this.#nearest(this.#point(event)) : null;
  }

  _move(event) {
    const point = this.#point(event);
    const before = this.#pointers.get(event.pointerId);
    if (!before) {
      this.#setCursor(this.#cell(point));
      return;
    }
    if (this.#anchor) {
      this.#extend(point);
      return;
    }
    if (this.#click) {
      const slip = Math.hypot(point.x - this.#click.x, point.y - this.#click.y);
      if (slip <= (SLACK[event.pointerType] ?? SLACK.pen)) return;
      this.#click = null;
    }
    this.#fitted = false;
    this.#stage.classList.add("panning");
    const other = [...this.#pointers].find(([id]) => id !== event.pointerId)?.[1];
    this.#pointers.set(event.pointerId, point);
    if (!other) {
      this.#moveBy(point.x - before.x, point.y - before.y);
      return;
    }
    // A pinch: the point between two fingers stays there.
    const [was, is] = [before, point].map((end) => ({
      x: (end.x + other.x) / 2,
      y: (end.y + other.y) / 2,
      length: Math.hypot(end.x - other.x, end.y - other.y) || 1,
    }));
    this.#moveBy(is.x - was.x, is.y - was.y);
    this.#zoomTo((this.#wanted * is.length) / was.length, is);
  }

  _up(event) {
    if (!this.#pointers.delete(event.pointerId) || this.#pointers.size) return;
    this.#stage.classList.remove("panning");
    if (this.#anchor) {
      this.#extend(this.#point(event));
      this.#anchor = null;
      this.#on.select(this.#area);
      return;
    }
    const cell = this.#click && this.#cell(this.#click);
    this.#click = null;
    if (!cell) return;
    this.#setCursor(cell);
    // A finger can't hit small pixels: the first tap zooms in.
    if (event.pointerType === "touch" && this.#zoom < 4) this.show(cell.x, cell.y, 16);
    else this.#on.paint(cell.x, cell.y);
  }

  _cancel(event) {
    this.#pointers.delete(event.pointerId);
    this.#click = this.#anchor = null;
    this.#stage.classList.remove("panning");
  }

  _leave(event) {
    if (event.pointerType === "mouse" && !this.#pointers.size) this.#setCursor(null);
  }

  #wheel(event) {
    event.preventDefault();
    const point = this.#point(event);
    if (event.deltaMode || (Math.abs(event.deltaY) >= 50 && !event.ctrlKey)) {
      this.step(-Math.sign(event.deltaY), point); // a notch of a wheel
    } else {
      this.#fitted = false;
      const speed = event.ctrlKey ? 0.01 : 0.004; // a pinch on a touchpad comes as a wheel with Ctrl
      this.#zoomTo(this.#wanted * Math.exp(-event.deltaY * speed), point);
    }
    this.#setCursor(this.#cell(point));
  }

  // Keys.

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[
      event.key
    ];
    if (arrow && event.shiftKey) this.#pan(...arrow);
    else if (arrow) this.#walk(...arrow);
    else if (event.key === "+" || event.key === "=") this.step(1, this.#cursorPoint());
    else if (event.key === "-" || event.key === "_") this.step(-1, this.#cursorPoint());
    else if (event.key === "0") this.fit();
    else if (event.key === " " || event.key === "Enter") this.#useCursor("paint");
    else if (event.key === "c" || event.key === "C") this.#useCursor("pick");
    else return;
    event.preventDefault();
  }

  #pan(x, y) {
    this.#fitted = false;
    this.#moveBy((-x * this.#size.width) / 5, (-y * this.#size.height) / 5);
  }

  #useCursor(name) {
    if (!this.#cursor) this.#walk(0, 0);
    else this.#on[name](this.#cursor.x, this.#cursor.y);
  }

  /** Move the cursor, which starts in the middle; the view follows. */
  #walk(x, y) {
    const from = this.#cursor ?? this.#cell(this.#middle());
    if (!from) return;
    const steps = this.#cursor ? 1 : 0;
    this.#setCursor(
      {
        x: clamp(from.x + x * steps, 0, this.#width - 1),
        y: clamp(from.y + y * steps, 0, this.#height - 1),
      },
      true,
    );
    const { x: right, y: down } = this.#cursorPoint();
    const edge = Math.max(2 * this.#zoom, 24);
    const shift = (at, length) => clamp(at, edge, length - edge) - at;
    const [byX, byY] = [shift(right, this.#size.width), shift(down, this.#size.height)];
    if (!byX && !byY) return;
    this.#fitted = false;
    this.#moveBy(byX, byY);
  }

  #cursorPoint() {
    if (!this.#cursor) return this.#middle();
    return {
      x: this.#left + (this.#cursor.x + 0.5) * this.#zoom,
      y: this.#top + (this.#cursor.y + 0.5) * this.#zoom,
    };
  }
}
