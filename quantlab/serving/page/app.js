"use strict";
/*
 * The page: one chat is shown, at most one answer is being written.
 */
(() => {
  const SAVE_EVERY = 1000; // milliseconds, while an answer is written

  let settings = kept.settings();
  let chat = kept.thisChat();
  let models = [];
  let asking = null; // the answer that is being written
  const views = []; // of the chat's messages

  // ---- the conversation on the screen

  function showChat() {
    cutViews(0);
    chat.messages.forEach((message) => showTurn(message));
    showState();
    scrolling.toEnd();
  }

  function cutViews(at) {
    for (const view of views.splice(at)) view.node.remove();
  }

  const actions = {
    copy: notices.copy,
    edit: (message, text) => ask(chat.messages.indexOf(message), text),
    retry,
    goOn,
    mend,
  };

  function showTurn(message, onBlock) {
    const isQuestion = message.role === "user";
    const view = isQuestion ? new QuestionView(message, actions) : new AnswerView(message, actions, onBlock);
    views.push(view);
    byId("turns").append(view.node);
    return view;
  }

  /** Buttons and texts that depend on what goes on. */
  function showState() {
    const isBusy = asking !== null;
    byId("welcome").hidden = chat.messages.length > 0;
    byId("stop").hidden = !isBusy;
    byId("send").hidden = isBusy;
    showSendable();
    document.body.classList.toggle("busy", isBusy);
    document.title = chat.messages.length ? `${chatsDialog.titleOf(chat)} - quantlab` : "quantlab";
    byId("system-shown").hidden = !chat.system;
    byId("system-shown").textContent = `System prompt: ${chat.system}`;
    views.forEach(({ node }, at) => node.classList.toggle("left-out", at < chat.leftOut));
    byId("keys").textContent = isTouch() ? "" : "Enter sends, Shift+Enter begins a new line";
  }

  function showSendable() {
    byId("send").disabled = byId("question").value.trim() === "";
  }

  // ---- questions and answers

  /** Ask `text` as message number `at`; what was there and behind it goes. */
  function ask(at, text) {
    if (asking) return;
    cut(at);
    const message = { role: "user", content: text.trim() };
    chat.messages.push(message);
    showTurn(message);
    answer(0);
  }

  function retry(message) {
    const at = chat.messages.indexOf(message);
    if (asking || at < 0) return;
    cut(at);
    answer((message.retries ?? 0) + 1);
  }

  /** Have the rest of an answer that broke off. Tokens are drawn by seed and place: it is as if it had not. */
  function goOn(message) {
    const at = chat.messages.indexOf(message);
    if (asking || at < 0) return;
    const request = requestBody();
    if (message.seed !== null) request.seed = message.seed;
    delete request.retrieval; // the last message is no question
    cut(at);
    fill({ ...message, end: "", failure: null }, request);
  }

  /** Forget the messages from number `at` on. */
  function cut(at) {
    chat.messages.length = at;
    if (chat.leftOut >= at) chat.leftOut = 0;
    cutViews(at);
  }

  async function mend(message) {
    if (message.failure.kind === "key") {
      if (!(await askForKey(message.failure.text))) return;
    } else if (!leaveOutOldest()) {
      notices.notify("The last message alone is too long for the model: shorten it.");
      return;
    }
    if (message.content) goOn(message);
    else retry(message);
  }

  /** As `quantlab chat` does: half of the questions, so that this is not needed again at once. False: there is but one. */
  function leaveOutOldest() {
    const starts = chat.messages.flatMap(({ role }, at) => (role === "user" && at >= chat.leftOut ? [at] : []));
    if (starts.length < 2) return false;
    chat.leftOut = starts[Math.ceil((starts.length - 1) / 2)];
    return true;
  }

  /** Have the last question answered. */
  function answer(retries) {
    // Without a seed of the user's a new one each time, or a retry would give the same answer.
    const seed = settings.seed === null ? crypto.getRandomValues(new Uint32Array(1))[0] : settings.seed + retries;
    fill({ role: "assistant", content: "", end: "", retries, seed }, { ...requestBody(), seed });
  }

  /** Append an answer's message, and to it what the request brings. */
  async function fill(message, request) {
    const asked = chat;
    asked.messages.push(message);
    const view = showTurn(message, (block) => notices.say(block.textContent)); // a countdown's first words, too
    let saved = performance.now();
    const onPiece = () => {
      if (performance.now() - saved < SAVE_EVERY) return;
      saved = performance.now();
      save(asked);
    };
    asking = new Asking(request, message, view, onPiece);
    asking.done = asking.run();
    save(asked);
    notices.notify("");
    showState();
    scrolling.toEnd();
    await asking.done;
    asking = null;
    scrolling.follow();
    save(asked);
    showState();
    if (message.failure) notices.say(message.failure.text);
    if (message.failure?.kind === "key") mend(message);
  }

  function requestBody() {
    const { temperature, maxTokens, topP, topK, minP } = settings;
    const fields = { temperature, max_tokens: maxTokens, top_p: topP, top_k: topK, min_p: minP };
    const given = Object.entries(fields).filter(([, value]) => value !== null);
    return {
      ...(models.some(({ id }) => id === settings.model) ? { model: settings.model } : {}),
      messages: conversationFile.messages(chat),
      ...Object.fromEntries(given),
      ...(settings.useSources && models.some(({ hasIndex }) => hasIndex) ? { retrieval: true } : {}),
    };
  }

  function save(saved) {
    saved.updated = Date.now();
    if (kept.saveChat(saved)) return;
    notices.notify("The browser keeps no more: this chat will be lost with the page. Export it, or delete others.");
  }

  /** Stop the answer, if there is one, and keep what came. */
  async function stop() {
    if (!asking) return;
    asking.stop();
    await asking.done;
  }

  // ---- chats

  async function showOther(other) {
    await stop();
    chat = other;
    kept.saveChat(chat);
    notices.notify("");
    showChat();
    byId("question").focus();
  }

  function openChats() {
    chatsDialog.open(kept.chats(), chat.id, {
      choose: (id) => showOther(kept.chat(id) ?? kept.newChat()),
      remove: async (id) => {
        if (id === chat.id) await showOther(kept.newChat()); // first: an answer that is being written saves its chat
        kept.removeChat(id);
      },
    });
    byId("export").disabled = chat.messages.length === 0;
  }

  function exportChat() {
    const text = conversationFile.write(chat, settings, byId("model").value);
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "conversation.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  async function importChat(file) {
    byId("chats").close();
    try {
      const found = conversationFile.read(await file.text());
      settings = { ...settings, ...found.settings };
      kept.saveSettings(settings);
      const messages = found.messages.map((message) => ({ ...message, end: "stop" }));
      if (messages.at(-1)?.role === "user") messages.push({ role: "assistant", content: "", end: "open" });
      const made = { ...kept.newChat(), system: found.system, messages };
      await showOther(made);
      save(made);
    } catch (error) {
      notices.notify(`${file.name}: ${error.message}`);
    }
  }

  function openSettings() {
    settings = kept.settings(); // another tab may have changed them
    settingsDialog.open(chat.system, settings, (system, numbers) => {
      chat.system = system;
      settings = { ...settings, ...numbers, system };
      if (!kept.saveSettings(settings)) notices.notify("The browser keeps no settings: they last as long as this page.");
      if (!asking) save(chat);
      showState();
    });
  }

  // ---- the server

  async function meetServer() {
    try {
      models = await server.models(kept.key());
      notices.notify("");
    } catch (failure) {
      if (failure.kind === "key" && (await askForKey(failure.message))) return meetServer();
      notices.notify(failure.message, { name: "Try again", run: meetServer });
      return;
    }
    showModels();
    const told = await server.properties(kept.key());
    settingsDialog.showDefaults(told.default_generation_settings);
    byId("base-model").hidden = told.chat_template !== "";
  }

  function showModels() {
    const select = byId("model");
    const names = models.map(({ id }) => id);
    select.replaceChildren(...names.map((name) => new Option(name, name)));
    select.value = names.includes(settings.model) ? settings.model : (names[0] ?? "");
    select.hidden = names.length < 2;
    byId("sources-choice").hidden = !models.some(({ hasIndex }) => hasIndex);
    byId("use-sources").checked = settings.useSources;
    byId("model-name").textContent = names.length === 1 ? names[0] : "quantlab";
    byId("model-name").hidden = names.length > 1;
  }

  // ---- what the user does

  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const field = byId("question");
    if (asking || !field.value.trim()) return;
    const text = field.value;
    field.value = "";
    fitHeight(field);
    if (!isTouch()) field.focus(); // the button that was pressed disappears
    ask(chat.messages.length, text);
  });
  byId("question").addEventListener("keydown", (event) => {
    if (!isSendKey(event)) return;
    event.preventDefault();
    byId("composer").requestSubmit();
  });
  byId("question").addEventListener("input", (event) => {
    fitHeight(event.target);
    showSendable();
  });
  byId("stop").addEventListener("click", async () => {
    await stop();
    byId("question").focus();
  });
  document.addEventListener("keydown", (event) => {
    const isOurs = !event.defaultPrevented && !event.isComposing && !document.querySelector("dialog[open]");
    if (event.key === "Escape" && isOurs) stop();
  });
  byId("turns").addEventListener("click", ({ target }) => {
    const pressed = target.closest(".copy-code");
    if (pressed) notices.copy(pressed.closest(".code").querySelector("code").textContent, pressed);
  });
  scrolling.begin(() => asking !== null);
  byId("new-chat").addEventListener("click", () => showOther(kept.newChat()));
  byId("open-chats").addEventListener("click", openChats);
  byId("open-settings").addEventListener("click", openSettings);
  byId("system-shown").addEventListener("click", openSettings);
  byId("export").addEventListener("click", exportChat);
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", ({ target }) => {
    if (target.files.length) importChat(target.files[0]);
    target.value = "";
  });
  byId("model").addEventListener("change", ({ target }) => {
    settings.model = target.value;
    kept.saveSettings(settings);
  });
  byId("use-sources").addEventListener("change", ({ target }) => {
    settings.useSources = target.checked;
    kept.saveSettings(settings);
  });
  window.addEventListener("beforeunload", () => {
    if (asking) asking.isLeft = true;
  });
  window.addEventListener("pagehide", () => asking && kept.saveChat(chat));
  window.addEventListener("storage", (event) => {
    const id = kept.changedChat(event);
    const changed = id === chat.id && !asking ? kept.chat(id) : null;
    if (!changed || changed.messages.at(-1)?.end === "left") return; // deleted, or an answer is being written there
    chat = changed;
    showChat();
  });

  showChat();
  meetServer();
  if (!isTouch()) byId("question").focus();
})();
