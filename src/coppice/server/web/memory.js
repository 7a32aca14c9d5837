// Memory as bars. All bars of the page have one scale.

import { el, setText } from "./dom.js";
import { bytes } from "./format.js";

/** @typedef {import("./forest.js").Memory} Memory */
/** @typedef {import("./forest.js").Node} Node */

const KINDS = ["unique", "shared"];

/** @returns {HTMLElement} an empty bar */
export function makeBar() {
  return el("span", { class: "ram" }, ...KINDS.map((kind) => el("span", { class: kind })));
}

/**
 * Draw one guest's memory.
 * @param {HTMLElement} bar made by `makeBar`
 * @param {Memory} memory
 * @param {number} scale bytes of the full width
 * @param {boolean} runs false: its memory is in files
 */
export function drawBar(bar, memory, scale, runs) {
  bar.style.inlineSize = `${Math.min(100, (100 * memory.mapped_bytes) / scale)}%`;
  bar.classList.toggle("at-rest", !runs);
  const parts = [memory.unique_bytes, memory.shared_bytes];
  parts.forEach((size, index) => {
    const part = /** @type {HTMLElement} */ (bar.children[index]);
    part.style.inlineSize = size > 0 ? `max(2px, ${(100 * size) / memory.mapped_bytes}%)` : "0";
  });
}

/** @param {Memory | null} memory @param {string} state @returns {string} */
export function described(memory, state) {
  if (memory === null) return "no memory";
  if (!runs(state)) return `${bytes(memory.mapped_bytes)} saved`;
  return `${bytes(memory.unique_bytes)} unique, ${bytes(memory.shared_bytes)} shared of ${bytes(memory.mapped_bytes)}`;
}

/** @param {string} state @returns {boolean} whether an instance in this state has a VMM */
export function runs(state) {
  return ["Running", "Paused", "Initializing", "Shutdown"].includes(state);
}

/** @param {Iterable<Node>} nodes @returns {number} the largest guest RAM: the full width of bars */
export function scaleOf(nodes) {
  let largest = 1;
  for (const { memory } of nodes) largest = Math.max(largest, memory?.mapped_bytes ?? 0);
  return largest;
}

/**
 * Add up the memory of running instances. Pages of one mem-file are in memory once.
 * @param {Iterable<Node>} nodes
 */
export function totals(nodes) {
  const sum = { instances: 0, running: 0, mapped: 0, unique: 0, shared: 0, overhead: 0 };
  /** @type {Map<number, number>} */
  const files = new Map();
  for (const { memory, state } of nodes) {
    sum.instances += 1;
    if (state === "Running") sum.running += 1;
    if (memory === null || !runs(state)) continue;
    sum.mapped += memory.mapped_bytes;
    sum.unique += memory.unique_bytes;
    sum.overhead += memory.vmm_overhead_bytes;
    const file = memory.inode ?? -1;
    files.set(file, Math.max(files.get(file) ?? 0, memory.shared_bytes));
  }
  for (const size of files.values()) sum.shared += size;
  return sum;
}

/** The sum of all memory, in the header. */
export class Summary {
  /** @param {HTMLElement} place */
  constructor(place) {
    this.counts = el("span", { class: "counts" });
    this.bar = makeBar();
    this.text = el("span", { class: "sum" });
    this.memory = el("span", { class: "memory" }, el("span", { class: "track" }, this.bar), this.text);
    place.append(this.counts, this.memory);
  }

  /** @param {Iterable<Node>} nodes */
  draw(nodes) {
    const sum = totals(nodes);
    setText(this.counts, `${sum.instances.toLocaleString()} instances, ${sum.running.toLocaleString()} running`);
    this.memory.hidden = sum.mapped === 0;
    if (sum.mapped === 0) return;
    const used = sum.unique + sum.shared;
    drawBar(
      this.bar,
      /** @type {any} */ ({ mapped_bytes: Math.max(sum.mapped, used), unique_bytes: sum.unique, shared_bytes: sum.shared }),
      Math.max(sum.mapped, used),
      true,
    );
    setText(this.text, `${bytes(used)} in use for ${bytes(sum.mapped)} of guest RAM`);
    this.memory.title =
      `unique to one guest: ${bytes(sum.unique)}; shared pages, counted once: ${bytes(sum.shared)}; ` +
      `VMM processes: ${bytes(sum.overhead)} more`;
  }
}
