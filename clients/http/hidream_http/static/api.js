// Calls the bridge: requests, streams of events, files; with the token of this tab where there is one.

import { askForToken, token } from "./token.js";

const RETRY_MS = [300, 1000, 2000, 4000];
// Longer than the bridge is ever silent on a stream.
const SILENT_MS = 60_000;
const MAX_COPIES = 50;

export class Problem extends Error {
  constructor(status, body = {}) {
    super(body.detail || body.title || `HTTP ${status}`);
    this.status = status;
    this.violations = body.violations ?? [];
    this.passes = status === 0 || status === 429 || status >= 500;
  }
}

async function request(path, options = {}) {
  for (;;) {
    const used = token();
    const headers = used ? { ...options.headers, Authorization: `Bearer ${used}` } : options.headers;
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      throw error.name === "AbortError" ? error : new Problem(0);
    });
    if (response.ok) return response;
    const problem = new Problem(response.status, await response.json().catch(() => ({})));
    if (response.status !== 401) throw problem;
    await askForToken(used);
  }
}

// Makes a call; with `onWait` again and again until the server is there.
export async function call(method, path, body, onWait) {
  const headers = { Accept: "application/json", "Content-Type": "application/json" };
  for (let tries = 0; ; tries += 1) {
    try {
      const response = await request(path, { method, headers, body: body && JSON.stringify(body) });
      return await response.json();
    } catch (problem) {
      if (!onWait || ![0, 503].includes(problem.status)) throw problem;
      onWait();
      await pause(tries);
    }
  }
}

// Follows a stream of server-sent events for as long as it is wanted: after a loss, from the last event on.
export function follow(path, { onOpen, onLost, onRefused, onEvent }) {
  const closing = new AbortController();
  const run = async () => {
    let lastId = "";
    for (let tries = 0; !closing.signal.aborted; tries += 1) {
      try {
        const headers = { Accept: "text/event-stream", ...(lastId && { "Last-Event-ID": lastId }) };
        const { body } = await request(path, { headers, signal: closing.signal });
        await onOpen?.();
        // There is nothing after the last event.
        if (!body) return;
        for await (const { id, event, data } of messages(body.getReader())) {
          if (event === "problem") throw new Problem(data.status, data);
          lastId = id || lastId;
          tries = 0;
          if (onEvent(data)) return;
        }
      } catch (problem) {
        if (closing.signal.aborted) return;
        if (problem instanceof Problem && !problem.passes) return void onRefused(problem);
      }
      onLost?.();
      await pause(tries);
    }
  };
  run();
  return () => closing.abort();
}

async function* messages(reader) {
  const decoder = new TextDecoder();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await within(reader.read(), SILENT_MS);
      if (done) return;
      const parts = (text + decoder.decode(value, { stream: true })).split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        const fields = {};
        for (const line of part.split("\n")) {
          const [, name, content] = /^(\w+): ?(.*)$/.exec(line) ?? [];
          if (name) fields[name] = content;
        }
        if (fields.data) yield { ...fields, data: JSON.parse(fields.data) };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const imagePath = (job, image) => `v1/jobs/${encodeURIComponent(job.jobId)}/images/${image.index ?? 0}`;

// The address of an image: a copy in memory where it takes a token, which the element cannot send.
const copies = new Map();
export async function imageAddress(job, image) {
  const path = imagePath(job, image);
  if (!token()) return path;
  if (!copies.has(path)) {
    // An image that is shown stays when its copy goes.
    if (copies.size >= MAX_COPIES) forget(copies.keys().next().value);
    copies.set(path, request(path).then((response) => response.blob()).then((blob) => URL.createObjectURL(blob)));
    copies.get(path).catch(() => copies.delete(path));
  }
  return copies.get(path);
}

export function forgetImage(job, image) {
  forget(imagePath(job, image));
}

function forget(path) {
  copies.get(path)?.then(URL.revokeObjectURL, () => {});
  copies.delete(path);
}

function pause(tries) {
  return new Promise((done) => setTimeout(done, RETRY_MS[Math.min(tries, RETRY_MS.length - 1)]));
}

function within(promise, milliseconds) {
  let timer;
  const silence = new Promise((_, fail) => { timer = setTimeout(() => fail(new Problem(0)), milliseconds); });
  return Promise.race([promise, silence]).finally(() => clearTimeout(timer));
}
