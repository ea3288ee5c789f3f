"use strict";
/*
 * How lines of Markdown begin and continue blocks (https://spec.commonmark.org/0.31.2/#blocks).
 *
 * Lines hold no line break. A text that is not meant as Markdown should stay readable, so indented lines are no code and
 * a line of dashes is a rule, never the underline of a heading. Every pattern takes a number of steps in proportion to
 * the line.
 */
const blockLines = (() => {
  const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*(.*)$/;
  const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
  const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
  const QUOTE = /^ {0,3}> ?/;
  const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:([ \t]{1,4})(?![ \t])|[ \t]|$)/;
  const TAB = 4; // columns
  const DELIMITER_CELL = /^:?-+:?$/;

  const isBlank = (line) => !/\S/.test(line);

  /** How many columns of a line are empty. */
  function indentOf(line) {
    let columns = 0;
    for (const character of line) {
      if (character !== " " && character !== "\t") break;
      columns += character === "\t" ? TAB : 1;
    }
    return columns;
  }

  /** The line without its first empty columns, `most` at most. */
  function outdented(line, most) {
    let at = 0;
    for (let columns = 0; columns < most && (line[at] === " " || line[at] === "\t"); at += 1) {
      columns += line[at] === "\t" ? TAB : 1;
    }
    return line.slice(at);
  }

  /** {indent, mark, language} of the line that opens a block of code, or null. */
  function fence(line) {
    const found = FENCE.exec(line);
    if (!found || (found[2][0] === "`" && found[3].includes("`"))) return null;
    return { indent: found[1].length, mark: found[2], language: found[3].trim().split(/\s/, 1)[0] };
  }

  function closesFence(line, opened) {
    const text = line.trim();
    return indentOf(line) < 4 && text.length >= opened.mark.length && text === opened.mark[0].repeat(text.length);
  }

  /** {level, text} or null. */
  function heading(line) {
    const found = HEADING.exec(line);
    if (!found) return null;
    const text = line.slice(found[0].length).trim();
    let end = text.length;
    while (end > 0 && text[end - 1] === "#") end -= 1;
    const isClosed = end === 0 || /\s/.test(text[end - 1]); // marks at the end, with a space before them, are no text
    return { level: found[1].length, text: isClosed ? text.slice(0, end).trimEnd() : text };
  }

  /**
   * {indent, content, text, kind, start, isEmpty} of a list item's first line, or null.
   *
   * Its mark begins at the column `indent`, its text and the lines that belong to it at `content`.
   */
  function item(line) {
    const found = ITEM.exec(line);
    if (!found || RULE.test(line)) return null;
    const mark = found[2];
    const isOrdered = mark.length > 1;
    const isEmpty = isBlank(line.slice(found[0].length));
    if (isOrdered && isEmpty) return null; // a number that ends a sentence
    return {
      indent: indentOf(line),
      content: indentOf(line) + mark.length + (found[3] ?? " ").length,
      text: line.slice(found[1].length + mark.length + (found[3] ?? " ").length),
      kind: mark.at(-1), // items of another kind make another list
      start: isOrdered ? Number.parseInt(mark, 10) : null,
      isEmpty,
    };
  }

  /** Cells between unescaped bars; those at both ends are left out. */
  function cells(line) {
    const text = line.trim();
    const found = [""];
    for (const piece of text.match(/\\.|\||[^\\|]+|\\$/g) ?? []) {
      if (piece === "|") found.push("");
      else found[found.length - 1] += piece === "\\|" ? "|" : piece;
    }
    if (text.startsWith("|")) found.shift();
    if (found.length > 1 && isBlank(found.at(-1)) && text.endsWith("|")) found.pop();
    return found.map((cell) => cell.trim());
  }

  /** The alignment of every column ("left", "right", "center" or "") if a table's head is at `at`, else null. */
  function columns(lines, at) {
    if (at + 1 >= lines.length || !lines[at].includes("|") || !/^[ \t|:-]+$/.test(lines[at + 1])) return null;
    const delimiters = cells(lines[at + 1]);
    if (!delimiters.every((cell) => DELIMITER_CELL.test(cell)) || delimiters.length !== cells(lines[at]).length) return null;
    return delimiters.map((cell) => {
      const [left, right] = [cell.startsWith(":"), cell.endsWith(":")];
      return left && right ? "center" : right ? "right" : left ? "left" : "";
    });
  }

  /** Whether line `at` ends a paragraph before it. */
  function interrupts(lines, at) {
    const line = lines[at];
    if (isBlank(line) || fence(line) || heading(line) || RULE.test(line) || QUOTE.test(line)) return true;
    const found = item(line);
    if (found && found.indent < 4 && !found.isEmpty && (found.start === null || found.start <= 1)) return true;
    return columns(lines, at) !== null;
  }

  return {
    isBlank,
    indentOf,
    fence,
    closesFence,
    outdented,
    heading,
    item,
    cells,
    columns,
    interrupts,
    isRule: (line) => RULE.test(line),
    isQuote: (line) => QUOTE.test(line),
    unquoted: (line) => line.replace(QUOTE, ""),
  };
})();
