// Requests to the server, and its errors in words for people.

const KEY = "litgpt:key";
let askForKey = null; // a function that shows a problem and returns a promise of the key; null if it was not entered
let asking = null; // the promise, while it is asked for

/** What went wrong. The message is for people. */
export class Failure extends Error {}

export function onKeyNeeded(ask) {
  askForKey = ask;
}

function explain(status, error) {
  const message = error?.message ?? `The server answered with status ${status}.`;
  if (error?.code === "context_length_exceeded") {
    return `This conversation is too long for the model. ${message} Start a new chat, or edit an earlier message.`;
  }
  if (error?.code === "queue_full") return `The server is busy, and its queue is full. ${message}`;
  if (error?.code === "engine_failed") return "The model can no longer answer. The server's log says why. Restart the server.";
  if (error?.code === "stopping") return "The server is stopping. Start it again, then try again.";
  if (status === 413) return `This conversation is too large for the server. ${message} Start a new chat.`;
  return message;
}

/** A response with status 200. Asks for the API key if the server requires one. */
async function request(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("The server cannot be reached. Check that litgpt serve is running, then try again.");
    }
    if (response.ok) return response;
    const body = await response.json().catch(() => null);
    if (response.status !== 401) throw new Failure(explain(response.status, body?.error));
    asking ??= askForKey(key ? "The server does not accept this key." : "This server requires an API key.");
    const entered = await asking.finally(() => (asking = null));
    if (entered === null) throw new Failure("The server requires an API key. Try again to enter it.");
    sessionStorage.setItem(KEY, entered);
  }
}

/** The defaults of the server, and its models. */
export async function about() {
  return (await request("page/about.json")).json();
}

/** The parts of an answer as they come. */
export async function* chat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Failure("The connection was lost before the answer was complete.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const part = JSON.parse(data);
      if (part.error) throw new Failure(explain(0, part.error));
      yield part;
    }
  }
}
