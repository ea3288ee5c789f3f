"use strict";
/*
 * What stays in the browser: chats and settings in localStorage, this tab's chat and the API key in sessionStorage.
 *
 * Storage may be forbidden or full, and may hold anything: what cannot be read is as if it were not there, and `save`
 * tells whether it could.
 */
const kept = (() => {
  const CHAT = "quantlab.chat.";
  const SETTINGS = "quantlab.settings";
  const THIS_CHAT = "quantlab.this-chat";
  const KEY = "quantlab.key";
  const DEFAULTS = {
    system: "", // of new chats
    temperature: null, // null leaves the choice to the server
    maxTokens: null,
    seed: null,
    topP: null,
    topK: null,
    minP: null,
    model: "",
    useSources: true,
  };

  const memory = new Map(); // where storage is forbidden, things last as long as the page

  function attempt(action, otherwise) {
    try {
      return action();
    } catch {
      return otherwise;
    }
  }

  /** window.localStorage and window.sessionStorage throw where they are forbidden. */
  function read(storage, name) {
    return attempt(() => window[storage].getItem(name), null) ?? memory.get(name) ?? null;
  }

  function write(storage, name, text) {
    memory.set(name, text);
    return attempt(() => {
      window[storage].setItem(name, text);
      memory.delete(name);
      return true;
    }, false);
  }

  function remove(storage, name) {
    memory.delete(name);
    attempt(() => window[storage].removeItem(name));
  }

  function settings() {
    const found = attempt(() => JSON.parse(read("localStorage", SETTINGS)), null) ?? {};
    const valid = Object.entries(DEFAULTS).map(([name, usual]) => {
      const value = found[name];
      const wanted = usual === null ? Number.isFinite(value) : typeof value === typeof usual;
      return [name, wanted ? value : usual];
    });
    return Object.fromEntries(valid);
  }

  function saveSettings(changed) {
    return write("localStorage", SETTINGS, JSON.stringify(changed));
  }

  function newChat() {
    // Not crypto.randomUUID: that is missing where the page comes by plain HTTP from another machine.
    const id = Array.from(crypto.getRandomValues(new Uint32Array(3)), (part) => part.toString(36)).join("");
    return { id, updated: Date.now(), system: settings().system, messages: [], leftOut: 0 };
  }

  function readChat(id, stored) {
    const found = attempt(() => JSON.parse(stored), null);
    if (!Array.isArray(found?.messages)) return null;
    return {
      id,
      updated: Number.isFinite(found.updated) ? found.updated : 0,
      system: text(found.system),
      messages: found.messages.map(readMessage).filter(Boolean),
      leftOut: Number.isSafeInteger(found.leftOut) ? found.leftOut : 0,
    };
  }

  function readMessage(item) {
    if (!["user", "assistant"].includes(item?.role) || typeof item.content !== "string") return null;
    if (item.role === "user") return { role: item.role, content: item.content };
    const failure = typeof item.failure?.text === "string" ? { kind: item.failure.kind, text: item.failure.text } : null;
    return {
      role: item.role,
      content: item.content,
      reasoning: text(item.reasoning),
      sources: server.sourcesOf(item.sources),
      speed: text(item.speed),
      seed: Number.isSafeInteger(item.seed) ? item.seed : null,
      retries: Number.isSafeInteger(item.retries) ? item.retries : 0,
      end: text(item.end) || "left", // the page was closed while it was written
      failure,
    };
  }

  const text = (value) => (typeof value === "string" ? value : "");

  function chat(id) {
    return readChat(id, read("localStorage", CHAT + id));
  }

  /** Every chat, the latest first. */
  function chats() {
    const stored = attempt(() => Object.keys(window.localStorage), []);
    const names = new Set([...stored, ...memory.keys()].filter((name) => name.startsWith(CHAT)));
    const found = [...names].map((name) => chat(name.slice(CHAT.length))).filter(Boolean);
    return found.sort((one, other) => other.updated - one.updated);
  }

  /** Save a chat as this tab's; whether it will outlast the page. A chat without messages is not saved. */
  function saveChat(saved) {
    write("sessionStorage", THIS_CHAT, saved.id);
    return saved.messages.length === 0 || write("localStorage", CHAT + saved.id, JSON.stringify(saved));
  }

  function removeChat(id) {
    remove("localStorage", CHAT + id);
  }

  /** The chat that this tab had, else the latest one, else a new one. */
  function thisChat() {
    const id = read("sessionStorage", THIS_CHAT);
    return (id === null ? chats()[0] : chat(id)) ?? newChat();
  }

  return {
    settings,
    saveSettings,
    newChat,
    chat,
    chats,
    saveChat,
    removeChat,
    thisChat,
    defaults: () => ({ ...DEFAULTS }),
    key: () => read("sessionStorage", KEY) ?? "",
    saveKey: (key) => write("sessionStorage", KEY, key),
    /** The id of the chat that an event of another tab is about, or null. */
    changedChat: ({ key }) => (key?.startsWith(CHAT) ? key.slice(CHAT.length) : null),
  };
})();
