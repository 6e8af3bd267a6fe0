// The moderators' panel: select an area, see who painted there, undo, protect, block.

const $ = (id) => document.getElementById(id);
const CHANNELS = { R: 0, G: 1, B: 2 };
const FIELDS = ["x", "y", "w", "h"];
const COUNTS = ["changed", "equal", "painted_over", "unknown", "busy"];
const BLOCKABLE = /^(key|addr):/;

const number = new Intl.NumberFormat("en");
const moment = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "short" });

export class Moderation {
  #board;
  #view;
  #session;
  #say;
  #form = $("selection").elements;
  #previewed = new Map(); // place of a pixel -> the [R, G, B] that an undo would give it
  #asked = 0; // number of the newest question; answers to earlier ones are ignored
  #done = null; // selects what the last undo has changed

  /**
   * @param {import("./board.js").Board} board
   * @param {import("./view.js").View} view
   * @param {import("./session.js").Session} session
   * @param {(text: string) => void} say
   */
  constructor(board, view, session, say) {
    [this.#board, this.#view, this.#session, this.#say] = [board, view, session, say];
    $("selection").addEventListener("submit", (event) => event.preventDefault());
    for (const name of FIELDS) this.#form[name].addEventListener("change", () => this.#typed());
    this.#form.period.addEventListener("change", () => this.#ask());
    $("mark").addEventListener("click", () => this.#mark(!view.selecting));
    $("take-view").addEventListener("click", () => {
      view.area = view.part;
      this.selected();
    });
    $("authors").addEventListener("change", () => this.#chosen());
    $("preview").addEventListener("click", () => (this.#previewed.size ? this.#forget() : this.#preview()));
    $("undo").addEventListener("click", () => this.#undo(this.#selection()));
    $("undo-back").addEventListener("click", () => this.#undo(this.#done));
    $("protect").addEventListener("click", () => this.#protect());
    $("block").addEventListener("click", () => this.#block());
  }

  toggle() {
    if (!$("moderation").hidden) {
      this.close();
      return;
    }
    $("moderation").hidden = false;
    $("moderate").ariaExpanded = "true";
    this.#mark(true);
    this.#list();
    this.#form.x.focus();
  }

  close() {
    if ($("moderation").hidden) return;
    $("moderation").hidden = true;
    $("moderate").ariaExpanded = "false";
    this.#mark(false);
    this.#view.area = null;
    this.selected();
    $("stage").focus();
  }

  /** The view has another selected area. */
  selected() {
    const area = this.#view.area;
    FIELDS.forEach((name, index) => (this.#form[name].value = area ? area[index] : ""));
    this.#ask();
  }

  #mark(selecting) {
    this.#view.selecting = selecting;
    $("mark").ariaPressed = String(selecting);
  }

  #typed() {
    const [x, y, w, h] = FIELDS.map((name) => this.#form[name].valueAsNumber);
    const { width, height } = this.#board;
    const valid = x >= 0 && y >= 0 && w > 0 && h > 0 && x + w <= width && y + h <= height;
    this.#view.area = valid ? [x, y, w, h] : null;
    this.#ask();
  }

  /** Ask who has painted in the area. */
  async #ask() {
    this.#forget();
    const asked = (this.#asked += 1);
    $("authors").replaceChildren();
    $("authors-box").hidden = true;
    this.#tell("");
    this.#chosen();
    if (!this.#view.area) return;
    const { area, since } = this.#selection();
    const query = new URLSearchParams({ area, ...(since && { since }) });
    await this.#try(async () => {
      const { authors, examined } = await this.#session.ask(`history/authors?${query}`);
      if (asked !== this.#asked) return;
      $("authors").replaceChildren(...authors.map(authorItem));
      $("authors-box").hidden = !authors.length;
      if (!authors.length) this.#tell("Nobody has painted here in this time.");
      else if (examined) this.#tell(`Changes before ${moment.format(new Date(examined))} were not examined.`);
    });
  }

  /** The changes to undo, as the server wants them. */
  #selection() {
    const seconds = this.#form.period.value;
    return {
      area: this.#view.area?.join(","),
      authors: this.#authors(),
      since: seconds ? new Date(Date.now() - seconds * 1000).toISOString() : undefined,
    };
  }

  #authors() {
    return [...$("authors").querySelectorAll(":checked")].map(({ value }) => value);
  }

  /** Other authors, or another area, are chosen. */
  #chosen() {
    this.#forget();
    const authors = this.#authors();
    $("preview").disabled = $("undo").disabled = !this.#view.area || !authors.length;
    $("protect").disabled = !this.#view.area;
    $("block").disabled = !authors.some((author) => BLOCKABLE.test(author));
  }

  /** Show the canvas as it would be. */
  async #preview() {
    const asked = (this.#asked += 1);
    await this.#try(async () => {
      const total = await this.#parts({ ...this.#selection(), cells: true }, (cells) => {
        if (asked !== this.#asked) return false;
        for (const [x, y, channel, value] of cells) {
          const place = this.#board.place(x, y);
          const rgb = this.#previewed.get(place) ?? this.#board.colour(place);
          rgb[CHANNELS[channel]] = value;
          this.#previewed.set(place, rgb);
          this.#board.paint(place, rgb);
        }
        return true;
      });
      if (asked !== this.#asked) return;
      $("preview").textContent = this.#previewed.size ? "End the preview" : "Preview undo";
      this.#tell(`${count(total.changed)} would change.${rest(total)}`);
    });
  }

  /** End the preview. */
  #forget() {
    for (const place of this.#previewed.keys()) this.#board.unpaint(place);
    this.#previewed.clear();
    $("preview").textContent = "Preview undo";
  }

  async #undo(selection) {
    $("undo").disabled = $("undo-back").disabled = true;
    this.#asked += 1;
    await this.#try(async () => {
      const total = await this.#parts({ ...selection, apply: true });
      this.#done = { authors: [total.author], since: total.since, until: total.until };
      $("undo-back").hidden = !total.changed;
      this.#tell(`${count(total.changed)} changed.${rest(total)}`);
    });
    $("undo-back").disabled = false;
    this.#chosen();
  }

  /** An undo is done in parts, whose cells `each` receives; it ends early if that returns false. */
  async #parts(selection, each = () => true) {
    let total = null;
    let after = 0;
    do {
      const part = await this.#session.ask("history/undo", { method: "POST", body: { ...selection, after } });
      after = part.next;
      if (total) for (const name of COUNTS) total[name] += part[name];
      else total = part;
      total.until = part.until;
      this.#tell(`${count(total.changed)} so far …`);
      if (!each(part.cells)) break;
    } while (after !== null);
    return total;
  }

  async #protect() {
    await this.#try(async () => {
      const area = this.#view.area.join(",");
      await this.#session.ask("moderation/areas", { method: "POST", body: { area, reason: this.#form.reason.value } });
      this.#tell("The area is protected.");
      await this.#list();
    });
  }

  async #block() {
    await this.#try(async () => {
      const clients = this.#authors().filter((author) => BLOCKABLE.test(author));
      const [minutes, reason] = [+this.#form.minutes.value, this.#form.reason.value];
      for (const client of clients) {
        await this.#session.ask("moderation/blocks", { method: "POST", body: { client, minutes, reason } });
      }
      this.#tell(`Blocked: ${clients.map(named).join(", ")}.`);
      await this.#list();
    });
  }

  /** Show what is in force. */
  async #list() {
    await this.#try(async () => {
      const { areas, blocks } = await this.#session.ask("moderation");
      const items = [
        ...areas.map((area) => [`${area.area} is protected`, area, "areas"]),
        ...blocks.map((block) => [`${named(block.client)} until ${moment.format(new Date(block.until))}`, block, "blocks"]),
      ];
      $("restrictions").replaceChildren(...items.map(([text, item, kind]) => this.#restriction(text, item, kind)));
      if (!items.length) $("restrictions").replaceChildren(element("li", "Nothing"));
    });
  }

  #restriction(text, { id, reason, by, area }, kind) {
    const line = element(area ? "button" : "span", text);
    line.title = [reason, `by ${named(by)}`].filter(Boolean).join(", ");
    const remove = element("button", "Remove");
    remove.type = "button";
    remove.ariaLabel = `Remove: ${text}`;
    remove.addEventListener("click", () =>
      this.#try(async () => {
        await this.#session.ask(`moderation/${kind}/${id}`, { method: "DELETE" });
        await this.#list();
      }),
    );
    if (area) {
      line.type = "button";
      line.addEventListener("click", () => {
        this.#view.area = area.split(",").map(Number);
        this.selected();
      });
    }
    const item = element("li");
    item.append(line, remove);
    return item;
  }

  async #try(act) {
    try {
      await act();
    } catch (error) {
      this.#tell(error.message);
    }
  }

  #tell(text) {
    $("outcome").textContent = text;
    if (text) this.#say(text);
  }
}

function element(name, text = "") {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

/** An author with the number of their changes, to choose. */
function authorItem({ author, changes, last }) {
  const box = Object.assign(document.createElement("input"), { type: "checkbox", value: author ?? "" });
  box.disabled = author === null;
  const label = element("label");
  label.append(box, element("b", named(author ?? "unknown")), element("span", number.format(changes)));
  label.title = `${number.format(changes)} changes, the last on ${moment.format(new Date(last))}`;
  const item = element("li");
  item.append(label);
  return item;
}

/** A name without its kind, as in alice, 192.0.2.7 or operator olga. */
function named(author) {
  return author.replace(/^(key|addr):/, "").replace(/^operator:/, "operator ");
}

function count(changes) {
  return `${number.format(changes)} ${changes === 1 ? "channel" : "channels"}`;
}

/** What an undo leaves alone. */
function rest({ painted_over: over, unknown, busy }) {
  const texts = [
    over && `${number.format(over)} painted over by others since`,
    unknown && `${number.format(unknown)} older than the history`,
    busy && `${number.format(busy)} changed too often: try again`,
  ].filter(Boolean);
  return texts.length ? ` Left alone: ${texts.join(", ")}.` : "";
}
