"use strict";
/*
 * Markdown within a paragraph: emphasis, code, links and line breaks, as DOM nodes.
 *
 * CommonMark 0.31 (https://spec.commonmark.org/0.31.2/#inlines) and GitHub's strikethrough and bare addresses, but: HTML
 * stays text, images become links (nothing is loaded because a model wrote it), and only http and https lead anywhere.
 * A text of n characters takes O(n) steps: a model that repeats itself must not stop the page.
 */
const inlineMarkdown = (() => {
  const LONGEST_RUN = 9; // of stars; longer ones are text
  const MOST_OPEN = 50; // runs and brackets that may still be closed: bounds depth and work
  const TOKEN = new RegExp(
    [
      "\\\\[!-/:-@[-`{-~]", // an escaped character
      "`+",
      "\\*+|_+|~+",
      "!?\\[|\\]",
      "<br ?/?>",
      "<https?://[^\\s<>]*>",
      "\\bhttps?://[^\\s<>*`\\]]+",
    ].join("|"),
    "gi",
  );
  const DESTINATION =
    /\(\s*(?:<([^<>\n]*)>|([^\s()]*(?:\([^\s()]*\)[^\s()]*)*))(?:\s+(?:"[^"]*"|'[^']*'|\([^()]*\)))?\s*\)/y;
  const SPACE = /^\s?$/u; // the ends of the text count as space
  const PUNCTUATION = /^[\p{P}\p{S}]$/u;

  /** The address in full if it is one of the web, else null. */
  function webAddress(text) {
    try {
      const address = new URL(text);
      return ["http:", "https:"].includes(address.protocol) ? address.href : null;
    } catch {
      return null;
    }
  }

  /** A link that opens beside this page and tells the other side nothing of it. */
  function link(address) {
    const made = document.createElement("a");
    made.href = made.title = address;
    made.target = "_blank";
    made.rel = "noopener noreferrer";
    return made;
  }

  /** What `text` says, as a fragment. */
  function parse(text) {
    return new Parser(text).parse();
  }

  class Parser {
    constructor(text) {
      this.text = text;
      this.out = document.createDocumentFragment();
      this.runs = []; // of * _ ~ that are not yet used up
      this.brackets = []; // that may begin a link
      this.backticks = null; // length -> places of runs of that length
    }

    parse() {
      const token = new RegExp(TOKEN);
      let done = 0;
      for (let found; (found = token.exec(this.text)); ) {
        this.addText(this.text.slice(done, found.index));
        done = token.lastIndex = this.take(found[0], found.index);
      }
      this.addText(this.text.slice(done));
      this.closeRuns(0);
      this.out.normalize();
      return this.out;
    }

    /** Add what begins with `token`; where it ends. */
    take(token, at) {
      const first = token[0];
      const end = at + token.length;
      if (first === "\\") this.addText(token[1]);
      else if (first === "`") return this.takeCode(token.length, at);
      else if (first === "*" || first === "_" || first === "~") this.takeRun(token, at);
      else if (token.endsWith("[")) this.takeBracket(token);
      else if (first === "]") return this.takeLinkEnd(at);
      else if (token.toLowerCase().startsWith("<br")) this.out.append(document.createElement("br"));
      else if (first === "<") this.addAddress(token, token.slice(1, -1));
      else return this.takeBareAddress(token, at);
      return end;
    }

    addText(text) {
      if (text) this.out.append(text);
    }

    takeCode(length, at) {
      const start = at + length;
      const close = this.runOfBackticks(length, start);
      if (close < 0) {
        this.addText(this.text.slice(at, start));
        return start;
      }
      let content = this.text.slice(start, close).replaceAll("\n", " ");
      if (content.startsWith(" ") && content.endsWith(" ") && content.trim()) content = content.slice(1, -1);
      const code = document.createElement("code");
      code.textContent = content;
      this.out.append(code);
      return close + length;
    }

    /** The first run of exactly `length` backticks at `from` or behind it, or -1. */
    runOfBackticks(length, from) {
      if (!this.backticks) {
        this.backticks = new Map();
        for (const { 0: run, index } of this.text.matchAll(/`+/g)) {
          if (!this.backticks.has(run.length)) this.backticks.set(run.length, { places: [], next: 0 });
          this.backticks.get(run.length).places.push(index);
        }
      }
      const found = this.backticks.get(length);
      if (!found) return -1;
      while (found.next < found.places.length && found.places[found.next] < from) found.next += 1;
      return found.places[found.next] ?? -1;
    }

    /** CommonMark 6.2: whether a run opens or closes depends on what stands beside it. */
    takeRun(run, at) {
      const before = [...this.text.slice(Math.max(0, at - 2), at)].pop() ?? "";
      const after = [...this.text.slice(at + run.length, at + run.length + 2)][0] ?? "";
      const node = document.createTextNode(run);
      this.out.append(node);
      if (run.length > LONGEST_RUN || (run[0] === "~" && run.length !== 2)) return;
      const leftFlanking = !SPACE.test(after) && (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
      const rightFlanking = !SPACE.test(before) && (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
      const within = run[0] === "_";
      const opens = leftFlanking && (!within || !rightFlanking || PUNCTUATION.test(before));
      const closes = rightFlanking && (!within || !leftFlanking || PUNCTUATION.test(after));
      if (opens || closes) this.runs.push({ node, character: run[0], length: run.length, opens, closes });
    }

    takeBracket(token) {
      const node = document.createTextNode(token);
      this.out.append(node);
      this.brackets.push({ node, firstRun: this.runs.length });
      if (this.brackets.length > MOST_OPEN) this.brackets.shift();
    }

    takeLinkEnd(at) {
      const bracket = this.brackets.pop();
      DESTINATION.lastIndex = at + 1;
      const found = bracket && DESTINATION.exec(this.text);
      const address = found && webAddress(found[1] ?? found[2]);
      if (!address) {
        this.addText("]");
        return at + 1;
      }
      this.closeRuns(bracket.firstRun);
      const made = link(address);
      while (bracket.node.nextSibling) made.append(bracket.node.nextSibling);
      if (!made.textContent.trim()) made.textContent = address;
      bracket.node.replaceWith(made);
      this.brackets.length = 0; // links hold no links
      return DESTINATION.lastIndex;
    }

    addAddress(text, target) {
      const address = webAddress(target);
      if (!address) return this.addText(text);
      const made = link(address);
      made.textContent = target;
      this.out.append(made);
    }

    /** Punctuation at the end belongs to the sentence; a closing parenthesis does unless the address opened it. */
    takeBareAddress(token, at) {
      let address = token;
      let unopened = address.split(")").length - address.split("(").length;
      for (let last; (last = address.at(-1)) && /[?!.,:;"'_~)]/.test(last); address = address.slice(0, -1)) {
        if (last === ")" && unopened-- <= 0) break;
      }
      this.addAddress(address, address);
      return at + address.length;
    }

    /** Turn the runs from `first` on into emphasis, as far as they close each other; forget them. */
    closeRuns(first) {
      const open = [];
      for (const closer of this.runs.splice(first)) {
        while (closer.closes && closer.node.length > 0) {
          const place = open.findLastIndex((opener) => closes(opener, closer));
          if (place < 0) break;
          this.emphasize(open[place], closer);
          open.length = open[place].node.length ? place + 1 : place;
        }
        if (closer.opens && closer.node.length > 0) open.push(closer);
        if (open.length > MOST_OPEN) open.shift();
      }
    }

    emphasize(opener, closer) {
      const strong = opener.node.length >= 2 && closer.node.length >= 2;
      const name = closer.character === "~" ? "del" : strong ? "strong" : "em";
      const made = document.createElement(name);
      for (const run of [opener, closer]) run.node.deleteData(0, name === "em" ? 1 : 2);
      while (opener.node.nextSibling !== closer.node) made.append(opener.node.nextSibling);
      opener.node.after(made);
    }
  }

  /** CommonMark's rules 9 and 10: of runs that could do both, lengths must not add up to a multiple of three. */
  function closes(opener, closer) {
    if (opener.character !== closer.character) return false;
    if (!opener.closes && !closer.opens) return true;
    return (opener.length + closer.length) % 3 !== 0 || (opener.length % 3 === 0 && closer.length % 3 === 0);
  }

  return { parse, webAddress };
})();
