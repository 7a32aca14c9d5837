// The tree of instances, as a grid of rows. Only the rows in view are elements, so that thousands
// of instances cost no more than a screenful.

import { el, setAttribute, setText } from "./dom.js";
import { age, bytes, ports } from "./format.js";
import { described, drawBar, makeBar, runs, scaleOf } from "./memory.js";

/** @typedef {import("./forest.js").Row} Row */

const SPARE = 6; // rows drawn outside of the view
const DEEPEST = 12; // deeper rows are not indented further
const COLUMNS = ["Name", "State", "Memory", "Forks", "Age", "Ports"];

export class Tree {
  /**
   * @param {HTMLElement} place
   * @param {import("./forest.js").Forest} forest
   * @param {{opened: (id: string) => void, key: (key: string, id: string) => boolean}} does
   */
  constructor(place, forest, does) {
    this.forest = forest;
    this.does = does;
    /** @type {Row[]} */
    this.rows = [];
    /** @type {string | null} */
    this.active = null;
    /** @type {string | null} */
    this.opened = null;
    /** @type {Map<string, HTMLElement>} */
    this.drawn = new Map();
    this.scale = el("span", { class: "scale" });
    const heads = COLUMNS.map((name) =>
      el("span", { role: "columnheader", class: name.toLowerCase() }, name, name === "Memory" && this.scale),
    );
    this.body = el("div", { class: "rows", role: "rowgroup" });
    this.message = el("div", { class: "message" });
    this.grid = el(
      "div",
      { class: "grid", role: "treegrid", tabindex: "0", "aria-label": "Instances", "aria-busy": "true" },
      el("div", { role: "rowgroup", class: "head" }, el("div", { role: "row" }, ...heads)),
      this.body,
    );
    place.append(this.grid, this.message);
    this.rowHeight = 0;
    this.grid.addEventListener("scroll", () => this.draw(), { passive: true });
    this.grid.addEventListener("keydown", (event) => this.pressed(event));
    this.body.addEventListener("click", (event) => this.clicked(event));
    new ResizeObserver(() => this.draw()).observe(this.grid);
    this.loading();
  }

  loading() {
    this.message.replaceChildren(
      ...Array.from({ length: 6 }, (_, index) => el("div", { class: "skeleton", "data-depth": String(Math.min(index, 1)) })),
    );
  }

  /** Draw the forest as it is now. */
  update() {
    this.rows = this.forest.rows();
    if (this.active === null || !this.rows.some((row) => row.node.id === this.active)) {
      const parent = this.active && this.lastPlace;
      this.active = this.rows[Math.min(Number(parent) || 0, this.rows.length - 1)]?.node.id ?? null;
    }
    setAttribute(this.grid, "aria-rowcount", String(this.rows.length + 1));
    setAttribute(this.grid, "aria-busy", "false");
    this.largest = scaleOf(this.forest.nodes.values());
    setText(this.scale, this.largest > 1 ? `0 – ${bytes(this.largest)}` : "");
    this.message.replaceChildren(...this.emptiness());
    this.draw();
  }

  /** @returns {Node[]} what to say if there is no row */
  emptiness() {
    if (this.rows.length > 0) return [];
    if (this.forest.nodes.size > 0) {
      return [el("p", {}, `No instance matches “${this.forest.filter}”.`), el("p", {}, "Press Escape in the filter to clear it.")];
    }
    return [
      el("h2", {}, "No instances yet"),
      el("p", {}, "Start one, and make it a template that can be forked:"),
      el("pre", {}, "coppice run debian --name oak\ncoppice standby oak\ncoppice promote oak"),
      el("p", {}, "It appears here as soon as it exists."),
    ];
  }

  /** @returns {string[]} ids of the rows in view */
  shown() {
    return [...this.drawn.keys()];
  }

  draw() {
    const height = (this.rowHeight = parseFloat(getComputedStyle(this.grid).getPropertyValue("--row")) || 36);
    this.body.style.blockSize = `${this.rows.length * height}px`;
    const first = Math.max(0, Math.floor(this.grid.scrollTop / height) - SPARE);
    const last = Math.min(this.rows.length, Math.ceil((this.grid.scrollTop + this.grid.clientHeight) / height) + SPARE);
    const wanted = new Set();
    const now = Date.now() / 1000;
    for (let index = first; index < last; index += 1) {
      const row = this.rows[index];
      wanted.add(row.node.id);
      let element = this.drawn.get(row.node.id);
      if (!element) {
        element = makeRow(row.node.id);
        this.drawn.set(row.node.id, element);
        this.body.append(element);
      }
      this.fill(element, row, index, now);
    }
    for (const [id, element] of this.drawn) {
      if (!wanted.has(id)) {
        element.remove();
        this.drawn.delete(id);
      }
    }
    if (this.active && this.drawn.has(this.active)) setAttribute(this.grid, "aria-activedescendant", `row-${this.active}`);
    else this.grid.removeAttribute("aria-activedescendant");
  }

  /** @param {HTMLElement} element @param {Row} row @param {number} index @param {number} now */
  fill(element, row, index, now) {
    const { node } = row;
    element.style.transform = `translateY(${index * this.rowHeight}px)`;
    element.style.setProperty("--depth", String(Math.min(row.depth, DEEPEST)));
    setAttribute(element, "aria-rowindex", String(index + 2));
    setAttribute(element, "aria-level", String(row.depth + 1));
    setAttribute(element, "aria-posinset", String(row.place));
    setAttribute(element, "aria-setsize", String(row.siblings));
    if (row.forks > 0) setAttribute(element, "aria-expanded", String(row.open));
    else element.removeAttribute("aria-expanded");
    setAttribute(element, "aria-selected", String(node.id === this.opened));
    element.classList.toggle("active", node.id === this.active);
    element.classList.toggle("context", !row.matches);
    setAttribute(element, "data-state", node.state);
    const [name, state, memory, forks, since, published] = element.children;
    setText(name.children[1], node.name);
    setText(state.children[1], node.state);
    const [track, amount] = memory.children;
    const bar = /** @type {HTMLElement} */ (track.children[0]);
    bar.hidden = node.memory === null;
    if (node.memory) drawBar(bar, node.memory, this.largest ?? 1, runs(node.state));
    setText(amount, node.memory ? (runs(node.state) ? bytes(node.memory.unique_bytes) : "saved") : "");
    setAttribute(memory, "title", described(node.memory, node.state));
    setText(forks, row.forks > 0 ? row.forks.toLocaleString() : "");
    setText(since, age(now - node.createdAt));
    setText(published, ports(node.publish));
    setAttribute(published, "title", published.textContent ?? "");
  }

  /** @param {MouseEvent} event */
  clicked(event) {
    const target = /** @type {Element} */ (event.target);
    const id = target.closest("[role=row]")?.id.slice("row-".length);
    if (!id) return;
    this.activate(id);
    if (target.closest(".twist")) this.fold(id);
    else this.does.opened(id);
  }

  /** @param {KeyboardEvent} event */
  pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || this.active === null) return;
    const index = this.rows.findIndex((row) => row.node.id === this.active);
    const row = this.rows[index];
    if (!row) return;
    const page = Math.max(1, Math.floor(this.grid.clientHeight / this.rowHeight) - 2);
    /** @type {Record<string, () => void>} */
    const moves = {
      ArrowDown: () => this.goTo(index + 1),
      ArrowUp: () => this.goTo(index - 1),
      PageDown: () => this.goTo(index + page),
      PageUp: () => this.goTo(index - page),
      Home: () => this.goTo(0),
      End: () => this.goTo(this.rows.length - 1),
      ArrowRight: () => {
        if (row.forks > 0 && !row.open) this.fold(row.node.id);
        else if (row.forks > 0) this.goTo(index + 1);
      },
      ArrowLeft: () => {
        if (row.open) this.fold(row.node.id);
        else if (row.depth > 0) this.goTo(this.rows.findIndex((each) => each.node.id === row.node.parent));
      },
      Enter: () => this.does.opened(row.node.id),
      " ": () => this.does.opened(row.node.id),
    };
    const move = moves[event.key];
    if (move) move();
    else if (!this.does.key(event.key, row.node.id)) return;
    event.preventDefault();
  }

  /** @param {number} index */
  goTo(index) {
    const row = this.rows[Math.max(0, Math.min(index, this.rows.length - 1))];
    if (row) this.activate(row.node.id);
  }

  /** @param {string} id make this the row of the keyboard, and show it */
  activate(id) {
    this.active = id;
    const index = this.rows.findIndex((row) => row.node.id === id);
    this.lastPlace = index;
    const top = index * this.rowHeight;
    const head = /** @type {HTMLElement} */ (this.grid.children[0]).offsetHeight;
    const view = this.grid.clientHeight - head - this.rowHeight;
    if (top < this.grid.scrollTop) this.grid.scrollTop = top;
    else if (top > this.grid.scrollTop + view) this.grid.scrollTop = top - view;
    this.draw();
  }

  /** @param {string} id */
  fold(id) {
    if (!this.forest.folded.delete(id)) this.forest.folded.add(id);
    this.update();
  }

  focus() {
    this.grid.focus();
  }
}

/** @param {string} id @returns {HTMLElement} */
function makeRow(id) {
  const cell = (/** @type {string} */ name, /** @type {Node[]} */ ...children) =>
    el("span", { role: "gridcell", class: name }, ...children);
  return el(
    "div",
    { role: "row", id: `row-${id}`, class: "row" },
    cell("name", el("span", { class: "twist", "aria-hidden": "true" }), el("span", { class: "label" })),
    cell("state", el("span", { class: "mark", "aria-hidden": "true" }), el("span")),
    cell("memory", el("span", { class: "track" }, makeBar()), el("span", { class: "amount" })),
    cell("forks"),
    cell("age"),
    cell("ports"),
  );
}

