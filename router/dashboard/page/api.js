// Requests to the gateway this page came from. The token travels in a header, never in an address.

const BASE = new URL("../admin/", import.meta.url);
const KEY = "warmroute.admin-token";
const PATIENCE_MS = 15000;
const SILENCE_MS = 30000;

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const token = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => sessionStorage.setItem(KEY, text),
  forget: () => sessionStorage.removeItem(KEY),
};

function headers(more = {}) {
  return token.get() ? { ...more, authorization: `Bearer ${token.get()}` } : more;
}

function address(path, query = {}) {
  const url = new URL(path, BASE);
  for (const [name, value] of Object.entries(query)) if (value !== "" && value !== undefined) url.searchParams.set(name, value);
  return url;
}

async function open(url, options) {
  const response = await fetch(url, { ...options, cache: "no-store", credentials: "same-origin", redirect: "error", referrerPolicy: "no-referrer" });
  if (response.ok) return response;
  let message = `the gateway answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not the gateway's own words: something in between answered.
  }
  throw new Refused(response.status, message);
}

export async function get(path, query) {
  return (await open(address(path, query), { headers: headers(), signal: AbortSignal.timeout(PATIENCE_MS) })).json();
}

export async function post(path, body, query) {
  const options = { method: "POST", headers: headers(), signal: AbortSignal.timeout(PATIENCE_MS) };
  if (body !== undefined) {
    options.body = typeof body === "string" ? body : JSON.stringify(body);
    options.headers = headers({ "content-type": "application/json" });
  }
  return (await open(address(path, query), options)).json();
}

/** Server-sent events until the stream ends, falls silent or is aborted. EventSource could not send the token. */
export async function* events(path, abort) {
  let watchdog;
  const silent = new AbortController();
  const heard = () => {
    clearTimeout(watchdog);
    watchdog = setTimeout(() => silent.abort(new Error("the stream fell silent")), SILENCE_MS);
  };
  heard();
  try {
    const response = await open(address(path), { headers: headers({ accept: "text/event-stream" }), signal: AbortSignal.any([abort, silent.signal]) });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      heard();
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const name = /^event: (.*)$/m.exec(part)?.[1];
        if (name) yield [name, JSON.parse(/^data: (.*)$/m.exec(part)[1])];
      }
    }
  } finally {
    clearTimeout(watchdog);
  }
}
