"use strict";
/*
 * Server-sent events of a response (https://html.spec.whatwg.org/multipage/server-sent-events.html), as they come.
 *
 * EventSource cannot send a request body, so the stream is read here. Names and ids of events are of no use to an
 * OpenAI-shaped answer and are passed over.
 */

/** {data} of each event and {comment} of each comment in a stream of bytes. */
async function* serverEvents(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let begun = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      const lines = (begun + decoder.decode(value, { stream: !done })).split(/\r\n|\n|\r(?!$)/);
      begun = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { data: data.join("\n") };
          data = [];
        } else if (line.startsWith(":")) {
          yield { comment: line.slice(1).trim() };
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
      if (done) return; // an event without its empty line did not come whole
    }
  } finally {
    reader.cancel().catch(() => {}); // the reader is done with: the connection may go
  }
}
