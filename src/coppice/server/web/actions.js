// What a user can do with an instance, by its state.

import { call, callWithProgress } from "./api.js";
import { askForCount, confirmRemoval } from "./dialogs.js";
import { counted } from "./format.js";
import { Notice, showError } from "./notices.js";

/** @typedef {import("./forest.js").Node} Node */
/**
 * @typedef {object} Action
 * @property {string} name
 * @property {string} [key] of the keyboard
 * @property {string[]} states in which it is offered
 * @property {boolean} [danger]
 * @property {(node: Node) => Promise<void>} run
 */

const ANY = ["Created", "Initializing", "Running", "Paused", "Shutdown", "Stopped", "Standby", "Template", "Unknown"];

/** @type {Action[]} */
export const ACTIONS = [
  { name: "Fork…", key: "f", states: ["Running", "Standby", "Template", "Stopped"], run: fork },
  { name: "Start", states: ["Stopped"], run: simple("start", "Starting") },
  { name: "Restore", states: ["Standby"], run: simple("restore", "Restoring") },
  { name: "Standby", states: ["Running", "Paused"], run: simple("standby", "Putting into standby:") },
  { name: "Promote", states: ["Standby"], run: simple("promote", "Promoting") },
  { name: "Demote", states: ["Template"], run: simple("demote", "Demoting") },
  { name: "Stop", states: ["Running", "Paused"], run: simple("stop", "Stopping") },
  { name: "Remove…", key: "Delete", states: ANY, danger: true, run: remove },
];

/** @param {string} operation @param {string} doing @returns {(node: Node) => Promise<void>} */
function simple(operation, doing) {
  return async (node) => {
    const notice = new Notice(`${doing} ${node.name}`);
    try {
      await call(operation, { instance: node.id });
      notice.dismiss();
    } catch (error) {
      showError(`Cannot ${operation === "rm" ? "remove" : operation} ${node.name}`, error, notice);
    }
  };
}

/** @param {Node} node */
async function fork(node) {
  const count = await askForCount(node.name);
  if (count === null) return;
  const notice = new Notice(`Forking ${node.name}`);
  try {
    const target = node.state === "Stopped" ? { target: "Stopped" } : {};
    const report = await callWithProgress(
      "fork",
      { instance: node.id, count, from_running: node.state === "Running", ...target },
      (step) => {
        if (step.fork || step.stage === "fork") notice.step(`Forking ${node.name}: ${step.done} of ${count}`, step.done, count);
      },
    );
    const failed = report.results.filter((/** @type {any} */ each) => !each.ok);
    const result = `${counted(report.succeeded, "fork")} of ${node.name} in ${Math.round(report.wall_ms).toLocaleString()} ms`;
    if (failed.length === 0) notice.succeed(result);
    else notice.fail(`${result}; ${failed.length.toLocaleString()} failed`, grouped(failed));
  } catch (error) {
    showError(`Cannot fork ${node.name}`, error, notice);
  }
}

/**
 * Join forks that failed for the same reason.
 * @param {{name: string, error: string}[]} failed
 * @returns {{message: string}[]}
 */
function grouped(failed) {
  /** @type {Map<string, string[]>} */
  const reasons = new Map();
  for (const { name, error } of failed) reasons.set(error, [...(reasons.get(error) ?? []), name]);
  return [...reasons].map(([error, names]) => ({
    message: `${names.slice(0, 3).join(", ")}${names.length > 3 ? ` and ${names.length - 3} more` : ""}: ${error}`,
  }));
}

/** @param {Node} node */
async function remove(node) {
  if (!(await confirmRemoval(node.name, node.state))) return;
  await simple("rm", "Removing")(node);
}
