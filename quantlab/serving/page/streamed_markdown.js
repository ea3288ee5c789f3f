"use strict";
/*
 * Markdown that is still being written.
 *
 * Blocks that later text cannot change are made once and stay; only the end of the text is made again when more comes. In
 * a block of code not even that: lines are appended. So an answer costs time in proportion to its length, and what a
 * reader has selected in an earlier paragraph stays selected. The result is that of the whole text at once.
 */
class StreamedMarkdown {
  /** `onBlock(node)` hears of each block that is final. */
  constructor(parent, onBlock = () => {}) {
    this.parent = parent;
    this.onBlock = onBlock;
    this.unread = "";
    this.rest = ""; // the text of `changing`
    this.changing = []; // blocks that may change
    this.code = null; // an open block of code
  }

  add(text) {
    this.unread += text.replaceAll("\r", "");
  }

  /** Show all that was added. */
  update() {
    if (!this.unread) return;
    const text = this.unread;
    this.unread = "";
    this.rest += this.code ? this.code.extend(text) : text;
    if (this.code?.isClosed) this.endCode();
    if (!this.code) this.remake();
  }

  /** Show all; nothing will be added. */
  finish() {
    this.update();
    if (this.code) this.endCode();
    for (const node of this.changing) this.onBlock(node);
    this.changing = [];
    this.rest = "";
  }

  remake() {
    for (const node of this.changing) node.remove();
    const lines = this.rest.split("\n"); // the last one has no end yet
    let changing = [];
    let from = 0; // the line where they begin
    let found = null;
    for (let at = 0; (at = this.nextFilled(lines, at)) < lines.length; at = found.next) {
      // Where a block begins is certain when its first two lines are: the second may make it a table.
      if (found && at + 2 < lines.length) changing.splice(0).forEach(this.onBlock);
      if (changing.length === 0) from = at;
      found = markdown.block(lines, at);
      changing.push(found.node);
      this.parent.append(found.node);
    }
    this.changing = changing;
    this.rest = found ? lines.slice(from).join("\n") : "";
    if (found?.fence && changing.length === 1 && from + 1 < lines.length) this.beginCode(found, lines.slice(from + 1));
  }

  nextFilled(lines, at) {
    while (at < lines.length && blockLines.isBlank(lines[at])) at += 1;
    return at;
  }

  beginCode({ node, fence, text }, lines) {
    this.code = new StreamedCode(node, fence, text);
    this.code.extend(lines.join("\n"));
    this.changing = [];
    this.rest = "";
  }

  endCode() {
    this.code.end();
    this.onBlock(this.code.node);
    this.code = null;
  }
}

/** A block of code without an end so far; `text` is the node that holds its whole lines. */
class StreamedCode {
  constructor(node, fence, text) {
    this.node = node;
    this.fence = fence;
    this.text = text;
    this.text.data = "";
    this.count = 0; // of whole lines
    this.begun = ""; // the line after them
    this.shownOfBegun = document.createTextNode("");
    text.after(this.shownOfBegun);
    this.isClosed = false;
  }

  /** Append text; what of it stands behind the end of the block. */
  extend(text) {
    const lines = (this.begun + text).split("\n");
    const begun = lines.pop();
    const close = lines.findIndex((line) => blockLines.closesFence(line, this.fence));
    const whole = close < 0 ? lines : lines.slice(0, close);
    if (whole.length) this.text.appendData(this.join(whole));
    this.count += whole.length;
    this.isClosed = close >= 0;
    this.begun = this.isClosed ? "" : begun;
    const isEnd = blockLines.closesFence(this.begun, this.fence);
    const shown = isEnd ? "" : this.outdented(this.begun);
    this.shownOfBegun.data = shown && this.join([this.begun]);
    return this.isClosed ? [...lines.slice(close + 1), begun].join("\n") : "";
  }

  end() {
    if (this.shownOfBegun.data) this.text.appendData(this.shownOfBegun.data);
    this.shownOfBegun.remove();
  }

  /** Lines as they follow those that are there. */
  join(lines) {
    return (this.count ? "\n" : "") + lines.map((line) => this.outdented(line)).join("\n");
  }

  outdented(line) {
    return blockLines.outdented(line, this.fence.indent);
  }
}
