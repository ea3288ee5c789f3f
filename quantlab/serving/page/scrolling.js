"use strict";
/*
 * The conversation's place on the screen: who reads at its end is taken along with an answer, others stay where they are.
 */
const scrolling = (() => {
  const NEAR_THE_END = 40; // pixels
  let isAtEnd = true;

  function toEnd() {
    const frame = byId("conversation");
    frame.scrollTop = frame.scrollHeight;
    show(true);
  }

  function look() {
    const frame = byId("conversation");
    show(frame.scrollHeight - frame.scrollTop - frame.clientHeight <= NEAR_THE_END);
  }

  function show(atEnd) {
    isAtEnd = atEnd;
    byId("to-end").hidden = atEnd;
  }

  /** To the end, if that is where the reader was. */
  function follow() {
    if (isAtEnd) toEnd();
  }

  /** `grows()` tells whether an answer is being written; what else opens or closes leaves the reader's place alone. */
  function begin(grows) {
    byId("conversation").addEventListener("scroll", look, { passive: true });
    byId("to-end").addEventListener("click", toEnd);
    new ResizeObserver(() => (grows() ? follow() : look())).observe(byId("turns"));
  }

  return { begin, toEnd, follow };
})();
