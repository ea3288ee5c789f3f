"use strict";
/*
 * What the page says beside the conversation: to the eye, and to a screen reader.
 */
const notices = (() => {
  const MOST_SPOKEN = 20; // paragraphs that stay for a screen reader to go back to
  const COPIED_FOR = 1500; // milliseconds

  /** Tell a screen reader. */
  function say(text) {
    const log = byId("spoken");
    log.append(make("p", "", text));
    while (log.childElementCount > MOST_SPOKEN) log.firstChild.remove();
  }

  /** Show a line above the message field, with an `action` ({name, run}) if there is one; "" takes it away. */
  function notify(text, action = null) {
    const notice = byId("notice");
    if (!notice.hidden && notice.firstChild.textContent === text) return; // it would be read out again
    notice.replaceChildren(...(text ? [make("span", "", text)] : []));
    if (action) notice.append(button("plain", action.name, action.run));
    if (text) notice.append(button("plain", "Close", () => notify("")));
    notice.hidden = !text;
  }

  /** Copy, and say on the button that was pressed whether the browser let us. */
  async function copy(text, pressed) {
    pressed.textContent = (await copyText(text)) ? "Copied" : "Not allowed";
    say(pressed.textContent);
    setTimeout(() => (pressed.textContent = "Copy"), COPIED_FOR);
  }

  return { say, notify, copy };
})();
