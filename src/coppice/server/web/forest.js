// The known instances as a tree: which rows are to be shown, in which order.

/**
 * @typedef {object} Memory
 * @property {number} mapped_bytes
 * @property {number} shared_bytes
 * @property {number} unique_bytes
 * @property {number} vmm_overhead_bytes
 * @property {number | null} inode
 * @property {number} link_count
 * @property {number} [layers]
 * @property {string | null} sharing
 */

/**
 * @typedef {object} Node
 * @property {string} id
 * @property {string} name
 * @property {string} state
 * @property {string | null} parent
 * @property {number} createdAt
 * @property {string} image
 * @property {import("./format.js").Publish[]} publish
 * @property {string[]} tags
 * @property {Memory | null} memory
 */

/**
 * @typedef {object} Row
 * @property {Node} node
 * @property {number} depth
 * @property {number} forks
 * @property {boolean} open
 * @property {number} place among its siblings, from 1
 * @property {number} siblings
 * @property {boolean} matches false: it is shown only because one of its forks matches
 */

const byNumber = new Intl.Collator(undefined, { numeric: true });

export class Forest {
  constructor() {
    /** @type {Map<string, Node>} */
    this.nodes = new Map();
    /** @type {Set<string>} ids are never reused; a late answer must not bring an instance back */
    this.removed = new Set();
    /** @type {Set<string>} */
    this.folded = new Set();
    this.filter = "";
    /** @type {Map<string | null, Node[]> | null} */
    this.children = null;
  }

  /**
   * Take the answer of GET /tree.
   * @param {{instance: any, memory: Memory | null}[]} listed
   */
  replace(listed) {
    const before = this.nodes;
    this.nodes = new Map();
    this.children = null;
    for (const { instance, memory } of listed) {
      if (!this.removed.has(instance.id)) {
        this.nodes.set(instance.id, nodeOf(instance, memory ?? before.get(instance.id)?.memory ?? null));
      }
    }
  }

  /**
   * Take a new record of one instance.
   * @param {any} instance
   * @param {Memory | null} memory
   */
  put(instance, memory) {
    if (this.removed.has(instance.id)) return;
    this.nodes.set(instance.id, nodeOf(instance, memory));
    this.children = null;
  }

  /**
   * Take an event.
   * @param {{kind: string, instance: string, name: string, state: string, parent: string | null, at: number}} event
   */
  apply(event) {
    const known = this.nodes.get(event.instance);
    if (event.kind === "removed") {
      this.remove(event.instance);
    } else if (known) {
      known.state = event.state;
    } else if (!this.removed.has(event.instance)) {
      this.nodes.set(event.instance, {
        id: event.instance,
        name: event.name,
        state: event.state,
        parent: event.parent,
        createdAt: event.at,
        image: "",
        publish: [],
        tags: [],
        memory: null,
      });
      this.children = null;
    }
  }

  /** @param {string} id */
  remove(id) {
    this.removed.add(id);
    this.nodes.delete(id);
    this.folded.delete(id);
    this.children = null;
  }

  /** @param {string | null} id @returns {Node[]} oldest first */
  forksOf(id) {
    if (this.children === null) {
      this.children = new Map();
      for (const node of this.nodes.values()) {
        const parent = node.parent !== null && this.nodes.has(node.parent) ? node.parent : null;
        const siblings = this.children.get(parent);
        if (siblings) siblings.push(node);
        else this.children.set(parent, [node]);
      }
      for (const siblings of this.children.values()) siblings.sort(inOrder);
    }
    return this.children.get(id) ?? [];
  }

  /** @returns {Row[]} the rows to show, each followed by its forks unless it is folded */
  rows() {
    const wanted = this.matching();
    /** @type {Row[]} */
    const rows = [];
    /** @type {{node: Node, depth: number, place: number, siblings: number}[]} */
    const pending = [];
    const push = (/** @type {Node[]} */ nodes, /** @type {number} */ depth) => {
      const shown = wanted ? nodes.filter((node) => wanted.has(node.id)) : nodes;
      for (let place = shown.length; place > 0; place -= 1) {
        pending.push({ node: shown[place - 1], depth, place, siblings: shown.length });
      }
    };
    push(this.forksOf(null), 0);
    for (let next = pending.pop(); next; next = pending.pop()) {
      const forks = this.forksOf(next.node.id);
      const open = forks.length > 0 && (wanted !== null || !this.folded.has(next.node.id));
      rows.push({ ...next, forks: forks.length, open, matches: wanted?.get(next.node.id) ?? true });
      if (open) push(forks, next.depth + 1);
    }
    return rows;
  }

  /** @returns {Map<string, boolean> | null} null: no filter; false: an ancestor of a match */
  matching() {
    const words = this.filter.toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length === 0) return null;
    const wanted = new Map();
    for (const node of this.nodes.values()) {
      const text = [node.name, node.id, node.image, node.state, ...node.tags].join(" ").toLowerCase();
      if (!words.every((word) => text.includes(word))) continue;
      wanted.set(node.id, true);
      let parent = node.parent;
      while (parent !== null && !wanted.has(parent)) {
        wanted.set(parent, false);
        parent = this.nodes.get(parent)?.parent ?? null;
      }
    }
    return wanted;
  }
}

/** @param {Node} one @param {Node} other */
function inOrder(one, other) {
  return one.createdAt - other.createdAt || byNumber.compare(one.name, other.name);
}

/** @param {any} instance @param {Memory | null} memory @returns {Node} */
function nodeOf(instance, memory) {
  return {
    id: instance.id,
    name: instance.name,
    state: instance.state,
    parent: instance.parent ?? null,
    createdAt: instance.created_at,
    image: instance.image_name,
    publish: instance.publish ?? [],
    tags: Object.entries(instance.tags ?? {}).map(([key, value]) => (value ? `${key}=${value}` : key)),
    memory,
  };
}
