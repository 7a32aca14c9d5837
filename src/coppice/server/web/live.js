// Keeps the forest as it is on the server: the tree once, then every event, from the last one on if
// the connection is lost.

import { ApiError, call, getJson, send } from "./api.js";
import { messages } from "./sse.js";

const SILENCE_MS = 45_000; // the server sends a comment every 15 s
const LONGEST_PAUSE_MS = 10_000;
const GATHER_MS = 150; // changes within this time are looked up together
const MANY = 40; // more changes than this are looked up with one request for the tree
const AT_ONCE = 6;
const MEMORY_MS = 4_000;

export class Live {
  /**
   * @param {import("./forest.js").Forest} forest
   * @param {{changed: (ids: string[] | null) => void, status: (status: string, detail?: ApiError) => void}} seen
   */
  constructor(forest, seen) {
    this.forest = forest;
    this.seen = seen;
    /** @type {Set<string>} */
    this.dirty = new Set();
    this.lastId = "";
    this.loaded = false;
    /** @type {(() => void) | null} */
    this.retry = null;
    this.refreshing = false;
  }

  /** Follow the server until the page is closed. */
  async run() {
    let pause = 500;
    for (;;) {
      try {
        await this.follow(() => {
          pause = 500;
        });
      } catch (error) {
        this.seen.status("offline", error instanceof ApiError ? error : undefined);
      }
      await new Promise((resolve) => {
        this.retry = () => resolve(undefined);
        setTimeout(resolve, pause);
      });
      pause = Math.min(pause * 2, LONGEST_PAUSE_MS);
    }
  }

  /** Connect again now. */
  retryNow() {
    this.retry?.();
  }

  /** @param {() => void} connected */
  async follow(connected) {
    const abort = new AbortController();
    /** @type {number | undefined} */
    let silence;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => abort.abort(), SILENCE_MS);
    };
    try {
      const headers = this.lastId && this.loaded ? { "last-event-id": this.lastId } : {};
      const response = await send("/events", { headers, signal: abort.signal });
      if (!this.loaded || !this.lastId) {
        this.lastId = response.headers.get("last-event-id") ?? "";
        await this.load();
      }
      connected();
      this.seen.status("live");
      heard();
      for await (const message of messages(response)) {
        heard();
        if (message.id) this.lastId = message.id;
        if (message.event === "lost") await this.load();
        else if (message.event) this.apply(JSON.parse(message.data));
      }
    } finally {
      clearTimeout(silence);
      abort.abort();
    }
  }

  async load() {
    this.forest.replace(await getJson("/tree"));
    this.loaded = true;
    this.seen.changed(null);
  }

  /** @param {any} event */
  apply(event) {
    this.forest.apply(event);
    this.seen.changed([event.instance]);
    if (event.kind !== "removed") this.touch(event.instance);
  }

  /**
   * Look up an instance soon: its event does not have its memory and ports.
   * @param {string} id
   */
  touch(id) {
    this.dirty.add(id);
    if (!this.refreshing) {
      this.refreshing = true;
      setTimeout(() => this.refresh(), GATHER_MS);
    }
  }

  async refresh() {
    try {
      while (this.dirty.size > 0) {
        const ids = [...this.dirty].filter((id) => this.forest.nodes.has(id));
        this.dirty.clear();
        if (ids.length > MANY) await this.load();
        else await inParallel(ids, (id) => this.lookUp(id));
      }
    } catch {
      // The connection is lost: the stream of events ends too, and is followed again.
    } finally {
      this.refreshing = false;
    }
  }

  /** @param {string} id @returns {Promise<any>} its inspection; null if it was removed */
  async lookUp(id) {
    try {
      const found = await call("inspect", { instance: id });
      this.forest.put(found.instance, found.memory);
      this.seen.changed([id]);
      return found;
    } catch (error) {
      if (!(error instanceof ApiError) || error.code !== "not_found") throw error;
      return null;
    }
  }

  /**
   * Keep the memory of running instances fresh. It changes without events.
   * @param {() => string[]} shown ids of those that the user sees
   */
  async watchMemory(shown) {
    for (;;) {
      await new Promise((resolve) => setTimeout(resolve, MEMORY_MS));
      if (document.hidden || !this.loaded) continue;
      const ids = shown().filter((id) => this.forest.nodes.get(id)?.state === "Running");
      try {
        await inParallel(ids, async (id) => {
          const [memory] = Object.values(await call("stats", { instance: id }));
          const node = this.forest.nodes.get(id);
          if (node && memory) node.memory = /** @type {any} */ (memory);
        });
        this.seen.changed(ids);
      } catch {
        // An instance has just been removed, or the connection is lost.
      }
    }
  }
}

/**
 * @template T
 * @param {T[]} all
 * @param {(each: T) => Promise<any>} work
 */
async function inParallel(all, work) {
  const left = [...all];
  const workers = Array.from({ length: Math.min(AT_ONCE, left.length) }, async () => {
    for (let next = left.shift(); next !== undefined; next = left.shift()) await work(next);
  });
  await Promise.all(workers);
}
