// The page: the tree, the panel of one instance, and the connection to the server.

import { ACTIONS } from "./actions.js";
import { whenRefused } from "./api.js";
import { Details } from "./details.js";
import { askForToken } from "./dialogs.js";
import { byId, el, setText } from "./dom.js";
import { Forest } from "./forest.js";
import { Live } from "./live.js";
import { Summary } from "./memory.js";
import { Tree } from "./tree.js";

const CLOCK_MS = 1_000;
const STATUS = { connecting: "Connecting", live: "Live", offline: "Offline" };

whenRefused(askForToken);

const forest = new Forest();
const summary = new Summary(byId("summary"));
const filter = /** @type {HTMLInputElement} */ (byId("filter"));
const connection = byId("connection");
const banner = byId("banner");

const tree = new Tree(byId("tree"), forest, { opened: open, key: pressed });
const details = new Details(byId("details"), forest, {
  lookUp: (id) => live.lookUp(id),
  select: open,
  closed: () => {
    history.replaceState(null, "", location.pathname);
    byId("main").classList.remove("with-details");
    tree.opened = null;
    tree.draw();
    tree.focus();
  },
});
const live = new Live(forest, { changed, status });

/** @param {string} id @param {string} [tab] */
function open(id, tab) {
  history.replaceState(null, "", `#${id}`);
  byId("main").classList.add("with-details");
  tree.opened = id;
  details.open(id, tab);
  tree.activate(id);
}

/**
 * @param {string} key @param {string} id
 * @returns {boolean} whether the key means something
 */
function pressed(key, id) {
  const node = forest.nodes.get(id);
  if (!node) return false;
  if (key === "t") open(id, "terminal");
  else if (key === "Escape" && details.id !== null) details.close();
  else {
    const action = ACTIONS.find((each) => each.key === key && each.states.includes(node.state));
    if (!action) return false;
    action.run(node);
  }
  return true;
}

let drawing = false;

/** @param {string[] | null} ids those that changed; null: all */
function changed(ids) {
  if (details.id !== null && (ids === null || ids.includes(details.id))) details.update();
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    tree.update();
    summary.draw(forest.nodes.values());
    const wanted = decodeURIComponent(location.hash.slice(1));
    if (wanted && details.id === null && forest.nodes.has(wanted)) open(wanted);
  });
}

/** @param {"connecting" | "live" | "offline" | string} now @param {import("./api.js").ApiError} [error] */
function status(now, error) {
  connection.dataset.status = now;
  setText(connection, /** @type {any} */ (STATUS)[now]);
  document.body.classList.toggle("stale", now === "offline" && live.loaded);
  banner.hidden = now !== "offline";
  if (now === "offline") {
    const reason = error && error.status !== 0 ? error.message : "The server does not answer";
    const since = live.loaded ? ` The tree is as of ${new Date().toLocaleTimeString()}.` : "";
    banner.replaceChildren(
      el("span", {}, `${reason}.${since} Trying again.`, error?.hint && error.status !== 0 ? el("code", {}, error.hint) : null),
      el("button", { type: "button", onclick: () => live.retryNow() }, "Try now"),
    );
  }
}

filter.addEventListener("input", () => {
  forest.filter = filter.value;
  tree.update();
});
filter.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && filter.value) {
    filter.value = "";
    forest.filter = "";
    tree.update();
  } else if (event.key === "Enter" || event.key === "ArrowDown" || event.key === "Escape") {
    tree.focus();
  } else {
    return;
  }
  event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  const target = /** @type {Element} */ (event.target);
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (target.closest("input, textarea, .screen, dialog")) return;
  filter.focus();
  filter.select();
  event.preventDefault();
});

setInterval(() => {
  if (!document.hidden) tree.draw();
}, CLOCK_MS);
live.run();
live.watchMemory(() => [...new Set([...tree.shown(), ...(details.id ? [details.id] : [])])]);
tree.focus();
