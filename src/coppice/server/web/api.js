// Requests to the server, with the token and with its errors.

import { messages } from "./sse.js";

const STORED = "coppice.token";
const ATTEMPTS = 3; // of a request without an answer; the idempotency key makes repetitions harmless
const PAUSE_MS = 400;

/** An error that the server reported, or the lack of an answer. */
export class ApiError extends Error {
  /**
   * @param {number} status 0: no answer
   * @param {{code: string, message: string, hint?: string | null}} failure
   */
  constructor(status, failure) {
    super(failure.message);
    this.status = status;
    this.code = failure.code;
    this.hint = failure.hint ?? "";
  }
}

/** @type {(reason: ApiError) => Promise<string>} */
let askForToken = async (reason) => {
  throw reason;
};
/** @type {Promise<string> | null} */
let asking = null;

/**
 * Set how the user is asked for a token. Requests that were refused without one wait for it.
 * @param {(reason: ApiError) => Promise<string>} ask
 */
export function whenRefused(ask) {
  askForToken = ask;
}

/** @returns {string | null} */
export function token() {
  return sessionStorage.getItem(STORED);
}

/**
 * Send a request. If its token is refused, ask for another one and send it again.
 * @param {string} path
 * @param {RequestInit} [options]
 * @returns {Promise<Response>}
 */
export async function send(path, options = {}) {
  for (let attempt = 1; ; ) {
    const used = token();
    const headers = new Headers(options.headers);
    if (used) headers.set("authorization", `Bearer ${used}`);
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      if (attempt < ATTEMPTS) {
        await new Promise((resolve) => setTimeout(resolve, PAUSE_MS * attempt));
        attempt += 1;
        continue;
      }
      throw new ApiError(0, { code: "no_answer", message: "the server does not answer", hint: "is it running?" });
    }
    if (response.ok) return response;
    const failure = await failureOf(response);
    if (failure.status !== 401) throw failure;
    if (token() === used) {
      asking ??= askForToken(used ? failure : new ApiError(401, { code: "", message: "" })).finally(() => {
        asking = null;
      });
      sessionStorage.setItem(STORED, await asking);
    }
  }
}

/** @param {Response} response @returns {Promise<ApiError>} */
async function failureOf(response) {
  try {
    return new ApiError(response.status, await response.json());
  } catch {
    return new ApiError(response.status, { code: "error", message: `the server answered ${response.status}` });
  }
}

/**
 * @param {string} path
 * @returns {Promise<any>}
 */
export async function getJson(path) {
  return (await send(path)).json();
}

/**
 * Carry out an operation.
 * @param {string} operation
 * @param {object} parameters
 * @returns {Promise<any>}
 */
export async function call(operation, parameters) {
  const response = await send(`/call/${operation}`, posted(parameters));
  const text = await response.text();
  return text ? JSON.parse(text) : null;
}

/**
 * Carry out an operation, and report its progress.
 * @param {string} operation
 * @param {object} parameters
 * @param {(step: any) => void} progress
 * @returns {Promise<any>}
 */
export async function callWithProgress(operation, parameters, progress) {
  const options = posted(parameters, { accept: "text/event-stream" });
  for (let attempt = 1; attempt <= ATTEMPTS; attempt += 1) {
    const response = await send(`/call/${operation}`, options);
    try {
      for await (const message of messages(response)) {
        if (message.event === "progress") progress(JSON.parse(message.data));
        else if (message.event === "result") return JSON.parse(message.data);
        else if (message.event === "error") throw new ApiError(500, JSON.parse(message.data));
      }
    } catch (error) {
      if (error instanceof ApiError) throw error;
      // The connection was lost. The same key leads to the same operation.
    }
  }
  throw new ApiError(0, {
    code: "no_answer",
    message: `the connection was lost; the ${operation} goes on`,
    hint: "its result will appear in the tree",
  });
}

/**
 * @param {object} parameters
 * @param {Record<string, string>} [headers]
 * @returns {RequestInit}
 */
function posted(parameters, headers = {}) {
  return {
    method: "POST",
    body: JSON.stringify(parameters),
    headers: {
      "content-type": "application/json",
      "idempotency-key": crypto.getRandomValues(new Uint32Array(4)).join("-"),
      ...headers,
    },
  };
}

/**
 * Open a WebSocket. The token is sent as a subprotocol, so that it is in no URL.
 * @param {string} path
 * @returns {WebSocket}
 */
export function openSocket(path) {
  const url = new URL(path, location.href);
  url.protocol = url.protocol.replace("http", "ws");
  const used = token();
  const socket = new WebSocket(url, used ? ["coppice", `coppice.token.${used}`] : ["coppice"]);
  socket.binaryType = "arraybuffer";
  return socket;
}
