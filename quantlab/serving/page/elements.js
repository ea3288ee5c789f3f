"use strict";
/*
 * Elements and fields of the page: how they are made, when a field sends, and the clipboard.
 */
const byId = (id) => document.getElementById(id);

function make(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function button(className, text, onClick) {
  const made = make("button", className, text);
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}

/** Enter sends. Not while an input method composes a character, and not on a touch keyboard, which has no Shift+Enter. */
function isSendKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return false;
  return event.ctrlKey || event.metaKey || !isTouch();
}

function isTouch() {
  return matchMedia("(hover: none) and (pointer: coarse)").matches;
}

/** Make a field as high as its text; the style sheet bounds it. */
function fitHeight(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

/** Whether the browser has let us copy. */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copySelected(text);
  }
}

/** Where the page comes by plain HTTP from another machine there is no clipboard but this one. */
function copySelected(text) {
  const focused = document.activeElement;
  const field = make("textarea", "hidden");
  field.value = text;
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return isCopied;
}
