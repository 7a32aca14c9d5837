// Messages about operations: progress, results, and errors with their hints.

import { el, setText } from "./dom.js";
import { ApiError } from "./api.js";

const GOOD_NEWS_MS = 6_000;

/** One message. */
export class Notice {
  /** @param {string} text */
  constructor(text) {
    this.text = el("p", { class: "text" }, text);
    this.progress = /** @type {HTMLProgressElement} */ (el("progress", { hidden: true, "aria-label": text }));
    this.rest = el("div");
    this.element = el(
      "div",
      { class: "notice", role: "status" },
      el("div", { class: "body" }, this.text, this.progress, this.rest),
      el("button", { type: "button", class: "close", "aria-label": "Dismiss", onclick: () => this.dismiss() }, "×"),
    );
    document.getElementById("notices")?.append(this.element);
  }

  /** @param {string} text @param {number} [done] @param {number} [total] */
  step(text, done, total) {
    setText(this.text, text);
    this.progress.hidden = total === undefined;
    if (total !== undefined) {
      this.progress.max = total;
      this.progress.value = done ?? 0;
    }
  }

  /** @param {string} text */
  succeed(text) {
    this.step(text);
    this.element.classList.add("good");
    setTimeout(() => this.dismiss(), GOOD_NEWS_MS);
  }

  /**
   * Show errors until the user dismisses them.
   * @param {string} text
   * @param {{message: string, hint?: string}[]} errors
   */
  fail(text, errors) {
    this.step(text);
    this.element.classList.add("bad");
    this.element.setAttribute("role", "alert");
    this.rest.replaceChildren(
      ...errors.map(({ message, hint }) =>
        el("div", { class: "error" }, el("p", { class: "reason" }, message), hint && el("p", { class: "hint" }, hint)),
      ),
    );
  }

  dismiss() {
    this.element.remove();
  }
}

/**
 * @param {string} what failed
 * @param {unknown} error
 * @param {Notice} [notice]
 */
export function showError(what, error, notice = new Notice(what)) {
  if (!(error instanceof ApiError)) console.error(error);
  const { message, hint } =
    error instanceof ApiError ? error : { message: String(error), hint: "reload the page, and see the browser's console" };
  notice.fail(what, [{ message, hint }]);
}
