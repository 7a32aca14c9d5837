// xterm.js over the sockets of the server: a shell, the console, and the VMM's log.

import { openSocket } from "./api.js";
import { el, setText } from "./dom.js";

const SHELL = ["/bin/sh", "-c", "command -v bash >/dev/null 2>&1 && exec bash -l; exec sh -l"];
const STDOUT_BYTES = 1; // before the output of a command, the number of its stream
const TAIL = 1000;

/**
 * xterm.js makes style elements. The policy of the page allows those that have its nonce.
 */
function giveStylesTheNonce() {
  const nonce = /** @type {HTMLElement} */ (document.querySelector("link[nonce]")).nonce;
  const create = document.createElement.bind(document);
  document.createElement = /** @type {any} */ (
    (/** @type {string} */ tag, /** @type {any} */ options) => {
      const element = create(tag, options);
      if (tag === "style") element.nonce = nonce;
      return element;
    }
  );
}

/** @type {Promise<{Terminal: any, FitAddon: any}> | null} */
let library = null;

async function load() {
  giveStylesTheNonce();
  const [{ Terminal }, { FitAddon }] = await Promise.all([
    import(/** @type {any} */ ("./vendor/xterm/xterm.mjs")),
    import(/** @type {any} */ ("./vendor/xterm/addon-fit.mjs")),
  ]);
  return { Terminal, FitAddon };
}

/** @returns {object} colours of the page */
function theme() {
  const style = getComputedStyle(document.documentElement);
  const colour = (/** @type {string} */ name) => style.getPropertyValue(name).trim();
  return {
    background: colour("--screen"),
    foreground: colour("--screen-ink"),
    cursor: colour("--screen-cursor"),
    selectionBackground: colour("--screen-selection"),
  };
}

/** A terminal in the page, over one socket. */
export class Screen {
  /**
   * @param {HTMLElement} place
   * @param {{id: string, name: string}} node
   * @param {"terminal" | "console" | "vmm"} kind
   */
  constructor(place, node, kind) {
    this.node = node;
    this.kind = kind;
    /** @type {WebSocket | null} */
    this.socket = null;
    this.screen = el("div", { class: "screen" });
    this.status = el("span", { class: "screen-status", role: "status" }, "Connecting");
    this.again = /** @type {HTMLButtonElement} */ (
      el("button", { type: "button", hidden: true, onclick: () => this.connect() }, "Reconnect")
    );
    const keys = kind === "terminal" && el("span", { class: "muted" }, el("kbd", {}, "F6"), " leaves the terminal");
    place.append(this.screen, el("div", { class: "screen-bar" }, this.status, this.again, keys));
    this.closed = false;
    this.open();
  }

  async open() {
    library ??= load();
    const { Terminal, FitAddon } = await library;
    if (this.closed) return;
    this.terminal = new Terminal({
      theme: theme(),
      fontFamily: getComputedStyle(document.documentElement).getPropertyValue("--mono"),
      fontSize: 13,
      scrollback: 5000,
      disableStdin: this.kind !== "terminal",
      convertEol: this.kind !== "terminal",
      cursorBlink: false,
      macOptionIsMeta: true,
    });
    this.fit = new FitAddon();
    this.terminal.loadAddon(this.fit);
    this.terminal.open(this.screen);
    this.terminal.textarea?.setAttribute("aria-label", `${this.kind} of ${this.node.name}`);
    this.terminal.attachCustomKeyEventHandler((/** @type {KeyboardEvent} */ event) => {
      if (event.key !== "F6") return true;
      if (event.type === "keydown") {
        event.preventDefault();
        /** @type {HTMLElement | null} */ (document.querySelector("[role=tab][aria-selected=true]"))?.focus();
      }
      return false;
    });
    this.terminal.onData((/** @type {string} */ text) => this.input(new TextEncoder().encode(text)));
    this.terminal.onBinary((/** @type {string} */ text) => this.input(Uint8Array.from(text, (each) => each.charCodeAt(0))));
    this.terminal.onResize(({ rows, cols }) => this.control({ resize: [rows, cols] }));
    this.sizes = new ResizeObserver(() => this.screen.clientHeight > 0 && this.fit.fit());
    this.sizes.observe(this.screen);
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.recolour = () => {
      this.terminal.options.theme = theme();
    };
    this.dark.addEventListener("change", this.recolour);
    this.connect();
  }

  connect() {
    this.again.hidden = true;
    this.ended = "";
    this.started = false;
    setText(this.status, "Connecting");
    this.fit.fit();
    this.terminal.reset();
    const socket = openSocket(this.path());
    this.socket = socket;
    socket.onopen = () => {
      const first = this.request();
      if (first) socket.send(JSON.stringify(first));
      else this.begin();
    };
    socket.onmessage = ({ data }) => {
      if (typeof data === "string") this.told(JSON.parse(data));
      else this.output(new Uint8Array(data));
    };
    socket.onclose = () => {
      if (this.socket !== socket) return;
      this.socket = null;
      this.terminal.options.cursorBlink = false;
      setText(this.status, this.ended || (this.started ? "The connection was lost" : "The server refused the connection"));
      this.again.hidden = false;
    };
  }

  /** @returns {string} */
  path() {
    if (this.kind === "terminal") return "/stream/exec";
    if (this.kind === "vmm") return "/stream/logs";
    return `/instances/${encodeURIComponent(this.node.id)}/console?tail=${TAIL}`;
  }

  /** @returns {object | null} the first frame */
  request() {
    if (this.kind === "console") return null;
    if (this.kind === "vmm") return { instance: this.node.id, source: "vmm", tail: TAIL, follow: true };
    const { rows, cols } = this.terminal;
    return { instance: this.node.id, argv: SHELL, tty: true, size: [rows, cols], term: "xterm-256color" };
  }

  begin() {
    this.started = true;
    setText(this.status, "Connected");
    if (this.kind === "terminal") this.terminal.focus();
  }

  /** @param {any} message a text frame */
  told(message) {
    if (message.pid !== undefined || message.end) this.begin();
    if (message.end) this.ended = "The machine has ended";
    if (message.exit) this.ended = `Ended with exit code ${message.exit.exit_code}`;
    if (message.error) {
      const { message: text, hint } = message.error;
      this.ended = hint ? `${text} (${hint})` : text;
    }
  }

  /** @param {Uint8Array} data a binary frame */
  output(data) {
    if (!this.started) this.begin();
    if (this.kind === "terminal") {
      this.terminal.write(data.subarray(STDOUT_BYTES));
    } else {
      this.terminal.write(data);
      if (this.kind === "vmm") this.terminal.write("\n");
    }
  }

  /** @param {Uint8Array} data */
  input(data) {
    if (this.kind === "terminal" && this.started && this.socket?.readyState === WebSocket.OPEN) this.socket.send(data);
  }

  /** @param {object} message */
  control(message) {
    if (this.kind === "terminal" && this.started && this.socket?.readyState === WebSocket.OPEN) {
      this.socket.send(JSON.stringify(message));
    }
  }

  close() {
    this.closed = true;
    this.sizes?.disconnect();
    if (this.recolour) this.dark?.removeEventListener("change", this.recolour);
    const socket = this.socket;
    this.socket = null;
    socket?.close();
    this.terminal?.dispose();
  }
}
