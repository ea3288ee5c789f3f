"use strict";
/*
 * Asking for one answer: attempts, waiting where the server says so, and what came at the end.
 */
class Asking {
  /** `request` is the body to send; `message` and `view` are the answer's, and are filled. */
  constructor(request, message, view, onPiece) {
    this.request = request;
    this.message = message;
    this.view = view;
    this.onPiece = onPiece;
    this.stopping = new AbortController();
    this.hasBegun = false;
    this.isLeft = false; // the page is being closed, which breaks the connection
  }

  stop() {
    this.stopping.abort();
  }

  /** Fill the message until its `end` is known. Never throws. */
  async run() {
    const { message } = this;
    for (let attempt = 1; !message.end; attempt += 1) {
      try {
        await this.attempt();
      } catch (error) {
        const failure = error instanceof Failure ? error : new Failure("refused", `This page failed: ${error.message}`);
        if (failure.kind === "stopped") message.end = "stopped";
        else if (this.isLeft) message.end = "left";
        else if (!(await this.waits(failure, attempt))) {
          message.end = "failed";
          message.failure = { kind: failure.kind, text: failure.message };
        }
      }
    }
    this.view.finish();
  }

  async attempt() {
    const { message, view } = this;
    const clock = this.showWaiting();
    let [usage, timings, finish] = [null, null, ""];
    try {
      for await (const piece of server.answer(this.request, kept.key(), this.stopping.signal)) {
        if (piece.content || piece.reasoning) {
          this.hasBegun = true;
          clearInterval(clock);
        }
        if (piece.reasoning) message.reasoning = (message.reasoning ?? "") + piece.reasoning;
        message.content += piece.content;
        view.addReasoning(piece.reasoning);
        if (piece.content) view.addText(piece.content);
        if (piece.sources) message.sources = piece.sources;
        [usage, timings, finish] = [piece.usage ?? usage, piece.timings ?? timings, piece.finish || finish];
        this.onPiece();
      }
      message.end = finish === "length" ? "length" : "stop";
    } finally {
      clearInterval(clock);
      message.speed = speedLine({ timings, usage, seed: this.request.seed ?? null });
    }
  }

  /** A long prompt takes a while, and so does a queue: seconds show that nothing is stuck. */
  showWaiting() {
    const begun = performance.now();
    const show = () => {
      const seconds = Math.round((performance.now() - begun) / 1000);
      this.view.waiting(`Waiting for the first word${seconds < 3 ? "" : `, ${seconds} s`}`);
    };
    show();
    return setInterval(show, 1000);
  }

  /** Wait as long as a refusal says; whether to try again. */
  async waits(failure, attempt) {
    const isPassing = ["busy", "unavailable"].includes(failure.kind) && failure.retryAfter !== null;
    if (!isPassing || this.hasBegun || attempt > Asking.MOST_ATTEMPTS) return false;
    const answer = await this.countDown(failure);
    this.view.hideCountdown();
    if (answer === "never") this.message.end = "stopped";
    return true;
  }

  /** "now" after the time or at a click, "never" if the user gave up. */
  countDown(failure) {
    return new Promise((resolve) => {
      const end = performance.now() + 1000 * failure.retryAfter;
      const left = () => Math.max(0, Math.ceil((end - performance.now()) / 1000));
      const text = () => `${failure.message} Trying again in ${left()} s.`;
      const settle = (answer) => {
        clearInterval(clock);
        resolve(answer);
      };
      const shown = this.view.showCountdown(text(), () => settle("now"), () => settle("never"));
      const clock = setInterval(() => {
        if (left() === 0) settle("now");
        else shown.textContent = text();
      }, 250);
      this.stopping.signal.addEventListener("abort", () => settle("never"));
    });
  }
}
Asking.MOST_ATTEMPTS = 20;
