"use strict";
/*
 * Blocks of Markdown as DOM nodes: paragraphs, headings, lists, quotes, tables, code and rules.
 *
 * Nodes are made one by one and text only ever becomes text nodes, so nothing that a model writes is read as HTML. The
 * page's Content-Security-Policy (trusted types) forbids the other way as well. What is unknown stays text.
 */
const markdown = (() => {
  const DEEPEST = 12; // lists and quotes within each other; deeper ones are paragraphs
  const SHALLOWEST_HEADING = 3; // the page and its turns have their own above it
  const DIRECTED = new Set(["p", "h3", "h4", "h5", "h6", "ul", "ol", "th", "td"]);
  const lineOf = blockLines;

  /**
   * The block that begins at line `at`, which is not blank: {node, next}.
   *
   * Of code without an end also how it began, `fence`, and `text`, the text node that holds it.
   */
  function block(lines, at, depth = 0) {
    const line = lines[at];
    const opened = lineOf.fence(line);
    if (opened) return code(lines, at, opened);
    const head = lineOf.heading(line);
    if (head) return { node: heading(head), next: at + 1 };
    if (lineOf.isRule(line)) return { node: document.createElement("hr"), next: at + 1 };
    if (depth < DEEPEST && lineOf.isQuote(line)) return quote(lines, at, depth);
    const item = depth < DEEPEST ? lineOf.item(line) : null;
    if (item) return list(lines, at, item, depth);
    const columns = lineOf.columns(lines, at);
    if (columns) return table(lines, at, columns);
    return paragraph(lines, at);
  }

  /** All blocks of `lines`, appended to `parent`. */
  function append(parent, lines, depth) {
    for (let at = 0; at < lines.length; ) {
      if (lineOf.isBlank(lines[at])) {
        at += 1;
        continue;
      }
      const found = block(lines, at, depth);
      parent.append(found.node);
      at = found.next;
    }
  }

  function element(name, className = "") {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (DIRECTED.has(name)) made.dir = "auto"; // as its own script runs
    return made;
  }

  function paragraph(lines, at) {
    let next = at + 1;
    while (next < lines.length && !lineOf.interrupts(lines, next)) next += 1;
    const made = element("p");
    const text = lines.slice(at, next).join("\n");
    made.append(inlineMarkdown.parse(text.trimEnd()));
    return { node: made, next };
  }

  function heading({ level, text }) {
    const made = element(`h${Math.min(6, level + SHALLOWEST_HEADING - 1)}`, `level-${level}`);
    made.append(inlineMarkdown.parse(text));
    return made;
  }

  /** The frame of a block of code and the text node that holds it. */
  function codeFrame(language) {
    const frame = element("div", "code");
    const head = element("div", "code-head");
    const name = element("span");
    name.textContent = language || "text";
    const copy = element("button", "quiet copy-code");
    copy.type = "button";
    copy.textContent = "Copy";
    copy.setAttribute("aria-label", "Copy this code");
    head.append(name, copy);
    const body = element("pre");
    body.tabIndex = 0; // so that the keyboard scrolls it
    const content = element("code");
    const text = document.createTextNode("");
    content.append(text);
    body.append(content);
    frame.append(head, body);
    return { frame, text };
  }

  function code(lines, at, opened) {
    let next = at + 1;
    while (next < lines.length && !lineOf.closesFence(lines[next], opened)) next += 1;
    const isClosed = next < lines.length;
    const inner = lines.slice(at + 1, next).map((line) => lineOf.outdented(line, opened.indent));
    if (!isClosed && inner.at(-1) === "") inner.pop(); // not begun yet
    const { frame, text } = codeFrame(opened.language);
    text.data = inner.join("\n");
    return { node: frame, next: next + Number(isClosed), fence: isClosed ? null : opened, text };
  }

  function quote(lines, at, depth) {
    const inner = [];
    let next = at;
    while (next < lines.length) {
      const isLazy = next > at && inner.at(-1).trim() && !lineOf.interrupts(lines, next);
      if (!lineOf.isQuote(lines[next]) && !isLazy) break;
      inner.push(lineOf.unquoted(lines[next]));
      next += 1;
    }
    const made = element("blockquote");
    append(made, inner, depth + 1);
    return { node: made, next };
  }

  function list(lines, at, first, depth) {
    const made = element(first.start === null ? "ul" : "ol");
    if (first.start !== null && first.start !== 1) made.start = first.start;
    let next = at;
    for (let item = first; item && item.kind === first.kind; ) {
      const end = itemEnd(lines, next, item);
      const more = lines.slice(next + 1, end).map((line) => lineOf.outdented(line, item.content));
      const entry = element("li");
      append(entry, [item.text, ...more], depth + 1);
      made.append(entry);
      next = end;
      while (next < lines.length && lineOf.isBlank(lines[next])) next += 1;
      item = next < lines.length && !lineOf.fence(lines[next]) ? lineOf.item(lines[next]) : null;
      if (item && item.kind === first.kind && next > end) made.className = "loose";
    }
    return { node: made, next };
  }

  /** Behind the last line of the item that begins at `at`: what is indented, or goes on with its paragraph. */
  function itemEnd(lines, at, item) {
    let next = at + 1;
    let end = next;
    for (let afterBlank = item.isEmpty; next < lines.length; next += 1) {
      const line = lines[next];
      if (lineOf.isBlank(line)) {
        afterBlank = true;
        continue;
      }
      const indent = lineOf.indentOf(line);
      const inner = lineOf.item(line);
      const belongs = inner ? indent >= Math.min(item.content, item.indent + 2) : indent >= item.content;
      if (!belongs && (afterBlank || inner || lineOf.interrupts(lines, next))) break;
      afterBlank = false;
      end = next + 1;
    }
    return end;
  }

  function table(lines, at, columns) {
    const made = element("table");
    const row = (line, cellName) => {
      const cells = lineOf.cells(line);
      const made = element("tr");
      columns.forEach((alignment, column) => {
        const cell = element(cellName, alignment);
        if (cellName === "th") cell.scope = "col";
        cell.append(inlineMarkdown.parse(cells[column] ?? ""));
        made.append(cell);
      });
      return made;
    };
    const head = element("thead");
    head.append(row(lines[at], "th"));
    const body = element("tbody");
    let next = at + 2;
    for (; next < lines.length && lines[next].includes("|") && !lineOf.isBlank(lines[next]); next += 1) {
      body.append(row(lines[next], "td"));
    }
    made.append(head, body);
    const frame = element("div", "table");
    frame.tabIndex = 0;
    frame.append(made);
    return { node: frame, next };
  }

  return { block, append: (parent, text) => append(parent, text.split("\n"), 0) };
})();
