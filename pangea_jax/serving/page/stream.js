// Asks the server, and reads its answer as it comes (server-sent events of OpenAI's protocol).

/** Why there is no whole answer. `kind` is a key of the texts; `detail` is what the server said, in English. */
export class Failure extends Error {
  constructor(kind, detail = "") {
    super(`${kind} ${detail}`);
    this.kind = kind;
    this.detail = detail;
  }
}

const KINDS = { 401: "key_needed", 429: "busy", 503: "busy" };

/**
 * Yields pieces of an answer, `{text}`, and at its end `{finish}`: "stop", or "length" if it was cut.
 *
 * @param {object} body the request, without `stream`
 * @param {string} key of the server, or ""
 * @param {AbortSignal} signal stops the answer; the caller then gets an AbortError
 * @throws {Failure} the server refuses or fails, or the connection is lost
 */
export async function* complete(body, key, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const request = { method: "POST", headers, signal, body: JSON.stringify({ ...body, stream: true }) };
  const response = await unlessLost(() => fetch("v1/chat/completions", request), signal);
  if (!response.ok) {
    const kind = KINDS[response.status] ?? (response.status < 500 ? "refused" : "failed");
    throw new Failure(kind, said(await response.text().catch(() => "")));
  }
  let finished = false;
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const part = parsed(data);
    if (part.error) throw new Failure("failed", String(part.error.message ?? ""));
    const choice = part.choices?.[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) {
      finished = true;
      yield { finish: choice.finish_reason };
    }
  }
  if (!finished) throw new Failure("lost");
}

/** Yields the data of each event. Events end with an empty line; a line may end with CR, LF or both. */
async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await unlessLost(() => reader.read(), signal);
      if (done) return;
      rest += value;
      // A CR at the end may be half of a line end, so it waits for what follows.
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Failure("failed", data.slice(0, 200));
  }
}

async function unlessLost(act, signal) {
  try {
    return await act();
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Failure("lost");
  }
}

/** The message of an error in OpenAI's form, or the text itself. */
function said(text) {
  try {
    return String(JSON.parse(text).error.message);
  } catch {
    return text.slice(0, 300);
  }
}
