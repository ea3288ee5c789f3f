"use strict";
/*
 * Conversations as files, in the form of `quantlab chat`'s /save and /load:
 * {"messages": [{"role", "content"}, ...], "model", "sampling", "max_tokens"}, the system prompt first.
 */
const conversationFile = (() => {
  const LARGEST = 1 << 24; // characters
  const ROLES = ["system", "user", "assistant"];
  // What this page calls them, and the file.
  const SAMPLING = { temperature: "temperature", topP: "top_p", topK: "top_k", minP: "min_p", seed: "seed" };

  /**
   * The messages as a model is given them, the system prompt first.
   *
   * An answer that never began is left out; questions that then follow each other become one, for chat templates take
   * turns only.
   */
  function messages(chat) {
    const found = chat.system ? [{ role: "system", content: chat.system }] : [];
    for (const { role, content } of chat.messages.slice(chat.leftOut ?? 0)) {
      const last = found.at(-1);
      if (role === "assistant" && !content.trim()) continue;
      if (last && last.role === role) last.content += `\n\n${content}`;
      else found.push({ role, content });
    }
    return found;
  }

  function write(chat, settings, model) {
    const given = Object.entries(SAMPLING).filter(([name]) => settings[name] !== null);
    const content = { messages: messages({ ...chat, leftOut: 0 }), model: model || null };
    if (given.length) content.sampling = Object.fromEntries(given.map(([name, field]) => [field, settings[name]]));
    content.max_tokens = settings.maxTokens;
    return `${JSON.stringify(content, null, 2)}\n`;
  }

  /** {system, messages, settings} of a file's text; throws an Error that says what is wrong with it. */
  function read(text) {
    if (text.length > LARGEST) throw new Error("The file is too large for a conversation.");
    let content;
    try {
      content = JSON.parse(text);
    } catch {
      throw new Error("The file is not valid JSON.");
    }
    if (!Array.isArray(content?.messages)) throw new Error('The file holds no conversation: "messages" is missing.');
    const found = content.messages.map(checkedMessage);
    const system = found[0]?.role === "system" ? found.shift().content : "";
    if (found.some(({ role }) => role === "system")) throw new Error("Only the first message may be a system prompt.");
    return { system, messages: found, settings: readSettings(content) };
  }

  function checkedMessage(item, index) {
    if (!ROLES.includes(item?.role)) throw new Error(`Message ${index + 1}: the role must be system, user or assistant.`);
    if (typeof item.content !== "string") throw new Error(`Message ${index + 1}: the content must be a text.`);
    return { role: item.role, content: item.content };
  }

  /** Those parameters that the page has; others are for `quantlab chat` alone. */
  function readSettings(content) {
    const found = {};
    for (const [name, field] of Object.entries(SAMPLING)) {
      const value = content.sampling?.[field];
      if (Number.isFinite(value) && value >= 0 && value <= Number.MAX_SAFE_INTEGER) found[name] = value;
    }
    if (Number.isSafeInteger(content.max_tokens) && content.max_tokens > 0) found.maxTokens = content.max_tokens;
    return found;
  }

  return { messages, write, read };
})();
