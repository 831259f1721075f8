// The server's HTTP API as the page uses it. Paths are relative, so that a proxy may serve the page under a prefix.

import { load, save } from "./store.js";

/** A request that was not answered as hoped. `status` 0: no answer at all. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }
}

/** The key that requests carry, or null. */
export function readKey() {
  return load("tab", "key");
}

/** Remember a key until the tab closes; null forgets it. */
export function keepKey(key) {
  save("tab", "key", key || null);
}

/** The response, whatever its status; ApiError only where there is none. */
export async function ask(path, options = {}) {
  const key = readKey();
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  try {
    return await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Your message is kept; send it again when it is back.");
  }
}

/** The JSON of a successful answer, else ApiError with the server's own message. */
export async function getJson(path) {
  const response = await ask(path);
  if (!response.ok) throw await failure(response);
  return response.json();
}

/** Events of a streamed chat completion, as objects. Throws ApiError, or AbortError once `signal` says so. */
export async function* streamChat(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await failure(response);
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message, event.error);
    yield event;
  }
  throw new ApiError("The connection ended before the answer did.");
}

/** The `data` of server-sent events. */
async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The connection ended before the answer did.");
    }
    if (piece.done) return;
    const events = (rest + piece.value).split("\n\n");
    rest = events.pop();
    for (const event of events) if (event.startsWith("data: ")) yield event.slice(6);
  }
}

async function failure(response) {
  const wait = Number(response.headers.get("Retry-After"));
  const known = { status: response.status, retryAfter: wait > 0 ? wait : null };
  try {
    const { error } = await response.json();
    return new ApiError(error.message, { ...known, code: error.code, param: error.param });
  } catch {
    return new ApiError(`The server answered ${response.status} ${response.statusText}`.trim() + ".", known);
  }
}
