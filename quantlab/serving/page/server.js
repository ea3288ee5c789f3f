"use strict";
/*
 * What the page asks its server, in the shape of OpenAI's API, and the plain words for what can go wrong.
 */

/** `kind`: unreachable, key, busy, unavailable, too-long, refused, cut, unreadable or stopped. */
class Failure extends Error {
  constructor(kind, message, retryAfter = null) {
    super(message);
    this.kind = kind;
    this.retryAfter = retryAfter; // seconds
  }
}

const server = (() => {
  const LONGEST_MESSAGE = 500; // characters of what a server says

  /** {id, hasIndex} of each model that answers; `key` may be "". */
  async function models(key) {
    const answer = await readJson(await call("v1/models", { key }));
    const listed = (Array.isArray(answer?.data) ? answer.data : []).filter((model) => typeof model?.id === "string");
    const talking = listed.filter((model) => model.engine); // a model for embeddings has none
    return (talking.length ? talking : listed).map(({ id, has_index: hasIndex }) => ({ id, hasIndex: hasIndex === true }));
  }

  /** What the server tells of itself, as llama.cpp's does; an empty object if it tells nothing. */
  async function properties(key) {
    try {
      return (await readJson(await call("props", { key }))) ?? {};
    } catch {
      return {}; // the page does without
    }
  }

  /**
   * The pieces of an answer as they come: {content, reasoning, sources, finish, usage, timings}, each where there is one.
   *
   * Ends when the answer has; throws a Failure otherwise, after the pieces that came.
   */
  async function* answer(request, key, signal) {
    const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
    const response = await call("v1/chat/completions", { key, body, signal });
    let isWhole = false;
    try {
      for await (const { data } of serverEvents(response.body)) {
        if (data === undefined) continue; // a comment keeps the connection open
        if (data.trim() === "[DONE]") return;
        const found = piece(data);
        isWhole ||= Boolean(found.finish);
        yield found;
      }
    } catch (error) {
      if (error instanceof Failure) throw error;
      throw signal.aborted ? stopped() : lost();
    }
    if (signal.aborted) throw stopped();
    if (!isWhole) throw lost();
  }

  const stopped = () => new Failure("stopped", "Stopped.");
  const lost = () => new Failure("cut", "The connection was lost before the answer was complete.");

  function piece(data) {
    let chunk = null;
    try {
      chunk = JSON.parse(data);
    } catch {
      // told below
    }
    if (chunk === null || typeof chunk !== "object") {
      throw new Failure("unreadable", "The server sent something that this page cannot read.");
    }
    if (chunk.error) throw new Failure("refused", `The server gave up: ${messageOf(chunk) || "it does not say why"}`);
    const choice = chunk.choices?.[0];
    const delta = choice?.delta ?? choice?.message ?? {};
    return {
      content: textOf(delta.content),
      reasoning: textOf(delta.reasoning_content),
      sources: sourcesOf(chunk.sources ?? delta.sources),
      finish: textOf(choice?.finish_reason),
      usage: chunk.usage ?? null,
      timings: chunk.timings ?? null,
    };
  }

  const textOf = (value) => (typeof value === "string" ? value : "");

  /** [{source, text}], or null. */
  function sourcesOf(value) {
    if (!Array.isArray(value)) return null;
    return value.map((item) => ({ source: textOf(item?.source) || "unnamed", text: textOf(item?.text) }));
  }

  /** A response with a good status; `path` is from the page's own on, wherever a proxy has put that. */
  async function call(path, { key, body, signal }) {
    const headers = {};
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (key) headers.Authorization = `Bearer ${key}`;
    let response;
    try {
      const method = body === undefined ? "GET" : "POST";
      response = await fetch(path, { method, headers, body, signal, cache: "no-store", credentials: "omit" });
    } catch {
      if (signal?.aborted) throw stopped();
      throw new Failure("unreachable", `The server at ${location.host} does not answer. Is it still running?`);
    }
    if (!response.ok) throw await refusal(response, key);
    return response;
  }

  async function readJson(response) {
    try {
      return await response.json();
    } catch {
      return null;
    }
  }

  async function refusal(response, key) {
    const body = await readJson(response);
    const said = messageOf(body);
    const status = response.status;
    if (status === 401) return new Failure("key", key ? "The server does not know this key." : "This server asks for a key.");
    const seconds = retryAfter(response.headers.get("Retry-After"));
    if (status === 429) return new Failure("busy", "The server is busy with other requests.", seconds ?? 5);
    if (status === 503) return new Failure("unavailable", sentence(said || "The server is not ready."), seconds);
    if (body?.error?.code === "context_length_exceeded") return new Failure("too-long", sentence(said));
    if (status >= 500) return new Failure("refused", `The server failed (${status}). ${sentence(said)}`.trim());
    return new Failure("refused", `The server refused this request: ${said || `status ${status}`}`);
  }

  /** Seconds of a Retry-After header, which holds a number or a date; null without one. */
  function retryAfter(header) {
    if (!header) return null;
    const seconds = /^\d+$/.test(header.trim()) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
    return Number.isFinite(seconds) ? Math.min(3600, Math.max(1, Math.ceil(seconds))) : null;
  }

  function messageOf(body) {
    return (textOf(body?.error?.message) || textOf(body?.error) || textOf(body?.detail)).slice(0, LONGEST_MESSAGE);
  }

  /** With a capital letter and a full stop. */
  function sentence(text) {
    if (!text) return "";
    const begun = text[0].toUpperCase() + text.slice(1);
    return /[.!?]$/.test(begun) ? begun : `${begun}.`;
  }

  return { models, properties, answer, sourcesOf };
})();
