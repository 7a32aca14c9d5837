// The questions that the page asks: a token, how many forks, and whether to remove.

import { el } from "./dom.js";

/**
 * Ask a question. The answer is null if the user closes it.
 * @param {{title: string, text: string, hint?: string, field?: HTMLInputElement, label?: string, action: string,
 *   danger?: boolean, required?: boolean}} question
 * @returns {Promise<string | null>} the field's value, or "" without a field
 */
function ask({ title, text, hint, field, label, action, danger = false, required = false }) {
  return new Promise((resolve) => {
    const go = el("button", { type: "submit", class: danger ? "danger" : "primary", autofocus: !field }, action);
    const form = el(
      "form",
      { method: "dialog" },
      el("h2", { id: "question" }, title),
      text && el("p", {}, text),
      hint && el("p", { class: "hint" }, hint),
      field && el("label", {}, el("span", {}, label ?? ""), field),
      el(
        "div",
        { class: "buttons" },
        !required && el("button", { type: "button", onclick: () => dialog.close() }, "Cancel"),
        go,
      ),
    );
    const dialog = /** @type {HTMLDialogElement} */ (el("dialog", { "aria-labelledby": "question" }, form));
    /** @type {string | null} */
    let answer = null;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      answer = field ? field.value.trim() : "";
      dialog.close();
    });
    if (required) dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(answer);
    });
    document.body.append(dialog);
    dialog.showModal();
    field?.select();
  });
}

/**
 * @param {import("./api.js").ApiError} reason
 * @returns {Promise<string>}
 */
export async function askForToken(reason) {
  const field = /** @type {HTMLInputElement} */ (
    el("input", { type: "password", required: true, autocomplete: "off", spellcheck: "false", autofocus: true, name: "token" })
  );
  const answer = await ask({
    title: "Connect to this server",
    text: reason.message ? sentence(reason.message) : "This server needs an access token. It is kept until you close this tab.",
    hint: "coppice token create --ttl 8h",
    field,
    label: "Token",
    action: "Connect",
    required: true,
  });
  return answer ?? "";
}

/** @param {string} name @returns {Promise<number | null>} */
export async function askForCount(name) {
  const field = /** @type {HTMLInputElement} */ (
    el("input", { type: "number", min: "1", max: "4096", value: "1", required: true, autofocus: true, name: "count" })
  );
  const answer = await ask({
    title: `Fork ${name}`,
    text: "The forks start from its memory, and share it until they change it.",
    field,
    label: "How many",
    action: "Fork",
  });
  return answer === null ? null : Number(answer);
}

/** @param {string} name @param {string} state @returns {Promise<boolean>} */
export async function confirmRemoval(name, state) {
  const ends = state === "Running" ? "Its machine is ended. " : "";
  return (
    (await ask({
      title: `Remove ${name}?`,
      text: `${ends}Its disk and memory are deleted. This cannot be undone.`,
      action: "Remove",
      danger: true,
    })) !== null
  );
}

/** @param {string} text @returns {string} */
function sentence(text) {
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}.`;
}
