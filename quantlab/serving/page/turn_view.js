"use strict";
/*
 * How a question and an answer look: nodes made from a message, and an answer that grows.
 *
 * A message is {role, content}; an answer's also has what was told of it: reasoning, sources, speed, seed, end (how it
 * ended, "" while it is written) and failure ({kind, text}).
 */
function copyButton(message, actions) {
  const made = button("quiet copy", "Copy", () => actions.copy(message.content.trim(), made));
  return made;
}

/** `actions`: {copy(text, button), edit(message, text)}. */
class QuestionView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.node = make("article", "turn question");
    this.show();
  }

  show() {
    const row = make("div", "turn-actions");
    this.editButton = button("quiet edit", "Edit", () => this.edit());
    row.append(this.editButton, copyButton(this.message, this.actions));
    const said = make("div", "said", this.message.content);
    said.dir = "auto";
    this.node.replaceChildren(make("h2", "hidden", "You"), said, row);
  }

  edit() {
    const form = make("form", "edit-form");
    const field = make("textarea");
    field.value = this.message.content;
    field.setAttribute("aria-label", "Edit the message");
    const send = make("button", "main", "Send");
    send.type = "submit";
    const cancel = () => {
      this.show();
      this.editButton.focus();
    };
    const row = make("div", "actions");
    row.append(make("span", "help", "What follows it is replaced."), button("plain", "Cancel", cancel), send);
    form.append(field, row);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim()) this.actions.edit(this.message, field.value);
    });
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") cancel();
      else if (isSendKey(event)) form.requestSubmit();
      else return;
      event.preventDefault();
    });
    field.addEventListener("input", () => fitHeight(field));
    this.node.replaceChildren(make("h2", "hidden", "You"), form);
    fitHeight(field);
    field.focus();
  }
}

/** `actions`: {copy(text, button), and retry, goOn and mend of a message}; `onBlock(node)` hears of each block that is final. */
class AnswerView {
  constructor(message, actions, onBlock) {
    this.message = message;
    this.actions = actions;
    this.onBlock = onBlock;
    this.node = make("article", "turn answer");
    this.reasoning = null; // made when there is some
    this.body = make("div", "markdown");
    this.wait = make("p", "waiting");
    this.end = make("div", "turn-end");
    this.text = new StreamedMarkdown(this.body, onBlock);
    this.node.append(make("h2", "hidden", "Answer"), this.wait, this.body, this.end);
    this.frame = 0;
    this.nextUpdate = 0;
    this.addReasoning(message.reasoning ?? "");
    this.text.add(message.content);
    if (message.end) this.finish();
    else this.waiting("Waiting for the first word");
  }

  waiting(text) {
    this.wait.textContent = text;
    this.wait.hidden = !text;
  }

  addText(text) {
    this.waiting("");
    this.text.add(text);
    this.update();
  }

  addReasoning(text) {
    if (!text) return;
    this.waiting("");
    if (!this.reasoning) {
      this.reasoning = make("details", "reasoning");
      this.reasoningText = document.createTextNode("");
      const frame = make("div", "reasoning-text");
      frame.append(this.reasoningText);
      this.reasoning.append(make("summary", "", "Thinking…"), frame);
      this.body.before(this.reasoning);
    }
    this.reasoningText.appendData(text);
  }

  /**
   * Show what was added, once a frame at most. A frame that took long is followed by a pause three times as long: the
   * page stays usable, however long an answer's last paragraph is.
   */
  update() {
    if (this.frame) return;
    this.frame = requestAnimationFrame((now) => {
      this.frame = 0;
      if (now < this.nextUpdate) return this.update();
      const begun = performance.now();
      this.text.update();
      const ended = performance.now();
      this.nextUpdate = ended + 3 * (ended - begun);
    });
  }

  /** The answer has ended, as its message says. */
  finish() {
    cancelAnimationFrame(this.frame);
    this.text.finish();
    this.waiting("");
    if (this.reasoning) this.reasoning.firstChild.textContent = "Thoughts";
    this.end.replaceChildren(...this.endNodes());
  }

  endNodes() {
    const { message, actions } = this;
    const nodes = [];
    if (message.sources?.length) nodes.push(sourcesNode(message.sources));
    const remark = remarkOn(message);
    if (remark) nodes.push(make("p", "remark", remark));
    if (message.failure) nodes.push(this.failureNode());
    const row = make("div", "turn-actions");
    if (message.content) row.append(copyButton(message, actions));
    row.append(button("quiet retry", "Retry", () => actions.retry(message)));
    const isPart = message.content && !message.reasoning && message.end !== "stop";
    if (isPart) row.append(button("quiet retry go-on", "Continue", () => actions.goOn(message)));
    if (message.speed) row.append(make("span", "speed", message.speed));
    nodes.push(row);
    return nodes;
  }

  failureNode() {
    const { message, actions } = this;
    const node = make("div", "failure");
    node.append(make("p", "", message.failure.text));
    const mending = { key: "Enter the key", "too-long": "Leave out the oldest messages" }[message.failure.kind];
    if (mending) node.append(button("plain mend", mending, () => actions.mend(message)));
    else node.append(button("plain again", "Try again", () => actions.retry(message)));
    return node;
  }

  /** Count down to the next attempt: what is shown, and buttons to begin it at once or not at all. */
  showCountdown(text, now, never) {
    this.waiting("");
    const node = make("div", "failure passing");
    const shown = make("p", "", text);
    node.append(shown, button("plain again", "Try now", now), button("plain", "Cancel", never));
    this.end.replaceChildren(node);
    this.onBlock(shown);
    return shown;
  }

  hideCountdown() {
    this.end.replaceChildren();
  }
}

function remarkOn(message) {
  if (message.end === "stopped") return message.content ? "Stopped." : "Stopped before the first word.";
  if (message.end === "length") return "Cut: the answer has as many tokens as it may have.";
  if (message.end === "open") return "Not answered yet.";
  if (message.end === "left") return "The page was closed before the answer was complete.";
  if (message.end === "stop" && !message.content) return "The model ended its answer without a word.";
  return "";
}

function sourcesNode(sources) {
  const node = make("details", "sources");
  node.append(make("summary", "", sources.length === 1 ? "1 source" : `${sources.length} sources`));
  const list = make("ol");
  for (const { source, text } of sources) {
    const entry = make("li");
    entry.append(make("cite", "", source), make("div", "passage", text));
    list.append(entry);
  }
  node.append(list);
  return node;
}

/** One line of an answer's figures: `timings` as quantlab and llama.cpp's server name them, else `usage`. */
function speedLine({ timings, usage, seed }) {
  const told = timings ?? {};
  const speed = told.decode_tokens_per_second ?? told.predicted_per_second;
  const written = told.generated_tokens ?? told.predicted_n ?? usage?.completion_tokens;
  const cached = told.cached_tokens ?? told.cache_n ?? usage?.prompt_tokens_details?.cached_tokens;
  // llama.cpp's prompt_n counts those tokens that were computed.
  const read = usage?.prompt_tokens ?? told.prompt_tokens ?? (told.prompt_n ?? NaN) + (cached ?? 0);
  const parts = [];
  if (Number.isFinite(speed) && speed > 0) parts.push(`${speed < 10 ? speed.toFixed(1) : Math.round(speed)} tokens/s`);
  if (Number.isFinite(written)) parts.push(`${written} ${written === 1 ? "token" : "tokens"}`);
  if (Number.isFinite(read)) parts.push(`prompt ${read}${cached > 0 ? ` (${cached} cached)` : ""}`);
  if (parts.length && seed !== null) parts.push(`seed ${seed}`);
  return parts.join(" · ");
}
