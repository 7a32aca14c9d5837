// The panel of one instance: its facts, its memory, its actions, and its terminals.

import { ACTIONS } from "./actions.js";
import { el, setText } from "./dom.js";
import { age, bytes, counted, moment, ports } from "./format.js";
import { drawBar, makeBar, runs } from "./memory.js";
import { Screen } from "./terminal.js";

const TABS = [
  { id: "overview", name: "Overview" },
  { id: "terminal", name: "Terminal" },
  { id: "console", name: "Console" },
  { id: "vmm", name: "VMM log" },
];
const SHARING = {
  own: "its own memory file",
  hardlink: "a hard link to its parent's memory file",
  copy: "a copy of its parent's memory file",
};

/** @typedef {import("./forest.js").Node} Node */

export class Details {
  /**
   * @param {HTMLElement} place
   * @param {import("./forest.js").Forest} forest
   * @param {{lookUp: (id: string) => Promise<any>, select: (id: string) => void, closed: () => void}} does
   */
  constructor(place, forest, does) {
    this.place = place;
    this.forest = forest;
    this.does = does;
    /** @type {string | null} */
    this.id = null;
    this.tab = "overview";
    /** @type {any} */
    this.inspection = null;
    /** @type {Screen | null} */
    this.screen = null;
    this.title = el("h2", { tabindex: "-1" });
    this.state = el("span", { class: "pill" }, el("span", { class: "mark", "aria-hidden": "true" }), el("span"));
    this.buttons = el("div", { class: "actions", role: "toolbar", "aria-label": "Actions" });
    this.tabs = TABS.map(({ id, name }) =>
      el("button", { type: "button", role: "tab", id: `tab-${id}`, "aria-controls": "panel", onclick: () => this.show(id) }, name),
    );
    this.panel = el("div", { id: "panel", class: "panel", role: "tabpanel", tabindex: "-1" });
    place.append(
      el(
        "header",
        {},
        el(
          "div",
          { class: "title" },
          this.title,
          this.state,
          el("button", { type: "button", class: "close", "aria-label": "Close details", onclick: () => this.close() }, "×"),
        ),
        this.buttons,
        el("div", { role: "tablist", "aria-label": "Details", onkeydown: (/** @type {any} */ event) => this.tabKey(event) }, ...this.tabs),
      ),
      this.panel,
    );
    place.addEventListener("keydown", (event) => {
      const inTerminal = /** @type {Element} */ (event.target).closest(".screen");
      if (event.key === "Escape" && !inTerminal && !event.defaultPrevented) this.close();
    });
  }

  /** @returns {Node | undefined} */
  get node() {
    return this.id === null ? undefined : this.forest.nodes.get(this.id);
  }

  /** @param {string} id @param {string} [tab] */
  open(id, tab) {
    const other = id !== this.id;
    this.id = id;
    this.place.hidden = false;
    if (other) {
      this.inspection = null;
      this.leaveScreen();
    }
    if (other || (tab && tab !== this.tab)) this.show(tab ?? this.tab);
    this.refresh();
  }

  close() {
    if (this.id === null) return;
    this.leaveScreen();
    this.id = null;
    this.place.hidden = true;
    this.does.closed();
  }

  /** Look up what the tree does not have. */
  async refresh() {
    const id = this.id;
    if (id === null) return;
    try {
      const found = await this.does.lookUp(id);
      if (this.id === id && found) this.inspection = found;
    } catch {
      return; // the connection is lost; the header of the page says so
    }
    this.update();
  }

  /** Draw the instance as it is now. */
  update() {
    const node = this.node;
    if (!node) {
      if (this.id !== null && this.forest.removed.has(this.id)) this.close();
      return;
    }
    setText(this.title, node.name);
    setText(this.state.children[1], node.state);
    this.state.dataset.state = node.state;
    this.drawButtons(node);
    if (this.tab === "overview") this.overview(node);
  }

  /** @param {Node} node */
  drawButtons(node) {
    const offered = ACTIONS.filter(({ states }) => states.includes(node.state));
    const key = offered.map(({ name }) => name).join();
    if (this.buttons.dataset.offered === key && this.buttons.dataset.id === node.id) return;
    const focused = this.buttons.contains(document.activeElement) ? document.activeElement?.textContent : null;
    this.buttons.dataset.offered = key;
    this.buttons.dataset.id = node.id;
    this.buttons.replaceChildren(
      ...offered.map(({ name, danger, run }) =>
        el("button", { type: "button", class: danger ? "danger quiet" : "", onclick: () => this.node && run(this.node) }, name),
      ),
    );
    if (focused) {
      const buttons = /** @type {HTMLElement[]} */ ([...this.buttons.children]);
      (buttons.find((each) => each.textContent === focused) ?? buttons[0])?.focus();
    }
  }

  /** @param {string} id */
  show(id) {
    this.tab = id;
    this.leaveScreen();
    for (const tab of this.tabs) {
      const selected = tab.id === `tab-${id}`;
      tab.setAttribute("aria-selected", String(selected));
      tab.tabIndex = selected ? 0 : -1;
    }
    this.panel.setAttribute("aria-labelledby", `tab-${id}`);
    this.panel.replaceChildren();
    this.panel.classList.toggle("with-screen", id !== "overview");
    if (id !== "overview" && this.node) this.screen = new Screen(this.panel, this.node, /** @type {any} */ (id));
    this.update();
  }

  leaveScreen() {
    this.screen?.close();
    this.screen = null;
  }

  /** @param {KeyboardEvent} event */
  tabKey(event) {
    const index = this.tabs.findIndex((tab) => tab.getAttribute("aria-selected") === "true");
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = (index + step + this.tabs.length) % this.tabs.length;
    this.tabs[next].focus();
    this.show(TABS[next].id);
  }

  /** @param {Node} node */
  overview(node) {
    const found = this.inspection?.instance.id === node.id ? this.inspection : null;
    const instance = found?.instance;
    const machine = instance?.machine;
    const parent = node.parent ? this.forest.nodes.get(node.parent) : undefined;
    const forks = this.forest.forksOf(node.id);
    /** @type {[string, Node | string | HTMLElement | null | undefined | false][]} */
    const facts = [
      ["Id", el("code", {}, node.id)],
      ["Image", node.image],
      ["Parent", parent ? this.link(parent) : (instance?.parent_name && `${instance.parent_name} (removed)`)],
      ["Forks", forks.length > 0 && counted(forks.length, "fork")],
      ["Created", `${moment(node.createdAt)} (${age(Date.now() / 1000 - node.createdAt)} ago)`],
      ["Started", instance?.started_at && runs(node.state) && moment(instance.started_at)],
      ["Ended", !runs(node.state) && instance?.exit_reason],
      ["Process ended", instance?.process_end && ended(instance.process_end)],
      ["Ports", ports(node.publish)],
      ["Network", machine && machine.network],
      ["Command", instance?.process?.argv?.length > 0 && el("code", {}, instance.process.argv.join(" "))],
      ["Machine", machine && `${counted(machine.cpus ?? 1, "CPU")}, ${bytes(machine.memory_bytes)} RAM, ${instance.driver}`],
      ["Disk", found && `${bytes(found.disk_bytes)} used of ${bytes(machine.overlay_bytes)}`],
      ["Volumes", machine?.volumes?.map((/** @type {any} */ each) => `${each.volume_name} at ${each.mount_path}`).join(", ")],
      ["Tags", node.tags.join(", ")],
      ["Owner", instance?.owner],
    ];
    this.panel.replaceChildren(
      this.memory(node),
      el("dl", { class: "facts" }, ...facts.filter(([, value]) => value).flatMap(([name, value]) => [
        el("dt", {}, name),
        el("dd", {}, /** @type {any} */ (value)),
      ])),
    );
  }

  /** @param {Node} node @returns {HTMLElement} */
  memory(node) {
    const { memory } = node;
    if (memory === null) return el("section", { class: "figure" }, el("h3", {}, "Memory"), el("p", { class: "muted" }, "None: it has no VMM and no capture."));
    const bar = makeBar();
    const live = runs(node.state);
    drawBar(bar, memory, memory.mapped_bytes, live);
    const untouched = Math.max(0, memory.mapped_bytes - memory.unique_bytes - memory.shared_bytes);
    const legend = live
      ? [
          entry("unique", "Unique", memory.unique_bytes),
          entry("shared", "Shared", memory.shared_bytes),
          entry("rest", "Not touched", untouched),
          entry("vmm", "VMM", memory.vmm_overhead_bytes),
        ]
      : [entry("rest", "Saved in files", memory.mapped_bytes)];
    const kind = /** @type {Record<string, string>} */ (SHARING)[memory.sharing ?? ""];
    const links = memory.link_count > 1 ? ` (${counted(memory.link_count, "link")})` : "";
    return el(
      "section",
      { class: "figure" },
      el("h3", {}, `Memory `, el("span", { class: "muted" }, bytes(memory.mapped_bytes))),
      el("div", { class: "track large" }, bar),
      el("ul", { class: "legend" }, ...legend),
      kind ? el("p", { class: "muted" }, `Maps ${kind}${links}${memory.layers ? `, with ${counted(memory.layers, "layer")}` : ""}.`) : null,
    );
  }

  /** @param {Node} node @returns {HTMLElement} */
  link(node) {
    return el("button", { type: "button", class: "link", onclick: () => this.does.select(node.id) }, node.name);
  }
}

/** @param {{exit_code: number, signal: number | null, at: number}} end @returns {string} */
function ended(end) {
  return `${end.signal ? `by signal ${end.signal}` : `with status ${end.exit_code}`}, ${moment(end.at)}`;
}

/** @param {string} kind @param {string} name @param {number} size @returns {HTMLElement} */
function entry(kind, name, size) {
  return el("li", {}, el("span", { class: `swatch ${kind}`, "aria-hidden": "true" }), `${name} `, el("b", {}, bytes(size)));
}
