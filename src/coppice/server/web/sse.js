// Server-sent events of a fetched response. EventSource cannot send a token, so it cannot be used.

/**
 * @typedef {{event: string, data: string, id: string}} Message
 */

/**
 * Yield the events of a response. Comments are yielded as events without a name: they show that the
 * connection lives.
 * @param {Response} response
 * @returns {AsyncGenerator<Message>}
 */
export async function* messages(response) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const blocks = rest.split(/\r?\n\r?\n/);
      rest = /** @type {string} */ (blocks.pop());
      for (const block of blocks) yield parsed(block);
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/** @param {string} block @returns {Message} */
function parsed(block) {
  const message = { event: "", data: "", id: "" };
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") data.push(value);
    else if (field === "event") message.event = value;
    else if (field === "id") message.id = value;
  }
  message.data = data.join("\n");
  return message;
}
