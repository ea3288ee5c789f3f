"use strict";
/*
 * The three dialogs: settings, chats, and the API key.
 */
const settingsDialog = (() => {
  const NUMBERS = {
    temperature: "temperature",
    "max-tokens": "maxTokens",
    seed: "seed",
    "top-p": "topP",
    "top-k": "topK",
    "min-p": "minP",
  };

  function fill(system, settings) {
    byId("system").value = system;
    for (const [id, name] of Object.entries(NUMBERS)) byId(id).value = settings[name] ?? "";
  }

  /** Say what an empty field stands for; `defaults` are a server's own words for it. */
  function showDefaults(defaults) {
    const fields = { temperature: "temperature", "max-tokens": "n_predict", "top-p": "top_p", "top-k": "top_k", "min-p": "min_p" };
    for (const [id, name] of Object.entries(fields)) {
      if (Number.isFinite(defaults?.[name])) byId(id).placeholder = defaults[name];
    }
  }

  /** Show the dialog; `onSave(system, numbers)` hears of what was saved. */
  function open(system, settings, onSave) {
    const dialog = byId("settings");
    fill(system, settings);
    byId("reset-settings").onclick = () => fill("", {});
    byId("cancel-settings").onclick = () => dialog.close();
    dialog.querySelector("form").onsubmit = () => {
      const read = ([id, name]) => [name, byId(id).value === "" ? null : byId(id).valueAsNumber];
      onSave(byId("system").value.trim(), Object.fromEntries(Object.entries(NUMBERS).map(read)));
    };
    dialog.showModal();
  }

  return { open, showDefaults };
})();

const chatsDialog = (() => {
  const LONGEST_TITLE = 80;

  function titleOf(chat) {
    const first = chat.messages.find(({ role }) => role === "user")?.content.trim() ?? "";
    const line = first.split("\n", 1)[0];
    return line.length > LONGEST_TITLE ? `${line.slice(0, LONGEST_TITLE)}…` : line || "Empty chat";
  }

  function dateOf(chat) {
    return new Date(chat.updated).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
  }

  /** `actions`: {choose(id), remove(id)}. */
  function entry(chat, isCurrent, actions) {
    const node = make("li");
    const choose = button("plain choose", "", () => {
      byId("chats").close();
      actions.choose(chat.id);
    });
    choose.append(make("span", "title", titleOf(chat)), make("span", "date", dateOf(chat)));
    if (isCurrent) choose.setAttribute("aria-current", "true");
    const remove = button("quiet remove", "Delete", () => {
      if (remove.textContent === "Delete") {
        remove.textContent = "Really delete?";
        return;
      }
      actions.remove(chat.id);
      const next = node.nextElementSibling ?? node.previousElementSibling;
      node.remove();
      (next?.querySelector("button") ?? byId("close-chats")).focus();
    });
    remove.setAttribute("aria-description", titleOf(chat));
    remove.addEventListener("blur", () => (remove.textContent = "Delete"));
    node.append(choose, remove);
    return node;
  }

  function open(chats, currentId, actions) {
    byId("chat-list").replaceChildren(...chats.map((chat) => entry(chat, chat.id === currentId, actions)));
    byId("close-chats").onclick = () => byId("chats").close();
    byId("chats").showModal();
  }

  return { open, titleOf };
})();

/** Ask for the API key; whether one was given. */
function askForKey(reason) {
  const dialog = byId("key-dialog");
  byId("key-reason").textContent = reason;
  byId("key").value = kept.key();
  return new Promise((resolve) => {
    let isGiven = false;
    byId("cancel-key").onclick = () => dialog.close();
    dialog.querySelector("form").onsubmit = () => {
      isGiven = byId("key").value.trim() !== "";
      if (isGiven) kept.saveKey(byId("key").value.trim());
    };
    dialog.onclose = () => {
      byId("key").value = "";
      resolve(isGiven);
    };
    if (!dialog.open) dialog.showModal();
  });
}
