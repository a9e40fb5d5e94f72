"use strict";

// Each request contains the complete conversation: the server keeps no state.
// The model's output only ever becomes the textContent of an element.

const at = (id) => document.getElementById(id);
let messages = []; // {role, content}
let running = null; // the AbortController of the current answer

const key = () => (at("key").value ? { Authorization: `Bearer ${at("key").value}` } : {});

function setStatus(text, bad = false) {
  at("status").textContent = text;
  at("status").classList.toggle("bad", bad);
}

/** Show a turn of the conversation; returns the element that holds its text. */
function show(who, name, text) {
  const turn = document.createElement("div");
  turn.className = `turn ${who}`;
  const label = document.createElement("div");
  label.className = "who";
  label.textContent = name;
  const output = document.createElement("div");
  output.className = "said";
  output.textContent = text;
  turn.append(label, output);
  at("talk").append(turn);
  at("talk").scrollTop = at("talk").scrollHeight;
  return output;
}

async function failure(response) {
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `The server answered with ${response.status}.`);
}

async function loadModels() {
  try {
    const response = await fetch("v1/models", { headers: key() });
    if (response.status === 401) {
      at("settings").open = true;
      setStatus("This server requires an API key. Enter it in the settings.", true);
      return;
    }
    if (!response.ok) throw await failure(response);
    const chosen = at("model").value;
    const names = (await response.json()).data.map((model) => model.id);
    at("model").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
    setStatus("");
  } catch (error) {
    setStatus(error.message, true);
  }
}

/** Parse a stream of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(output) {
  const system = at("system").value.trim();
  const body = {
    model: at("model").value || undefined,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: at("temperature").valueAsNumber,
    max_tokens: at("most").value ? at("most").valueAsNumber : undefined,
    stream: true,
  };
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...key() },
    body: JSON.stringify(body),
    signal: running.signal,
  });
  if (!response.ok) throw await failure(response);
  const talk = at("talk");
  for await (const part of events(response)) {
    if (part.error) throw new Error(part.error.message);
    const choice = part.choices[0];
    const follow = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
    output.textContent += choice?.delta?.content ?? "";
    if (follow) talk.scrollTop = talk.scrollHeight;
    if (choice?.finish_reason === "length") {
      setStatus(body.max_tokens ? "The answer was truncated at the maximum length." : "The answer was truncated: it reached the limit of the server or of the model.");
    }
  }
}

async function ask(event) {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question || running) return;
  for (const field of [at("temperature"), at("most")]) {
    if (!field.checkValidity() || (field.id !== "most" && Number.isNaN(field.valueAsNumber))) {
      at("settings").open = true;
      setStatus(`${field.labels[0].textContent.trim()}: the number is out of range.`, true);
      field.focus();
      return;
    }
  }
  setStatus("");
  at("question").value = "";
  messages.push({ role: "user", content: question });
  const asked = show("user", "You", question);
  const output = show("assistant", at("model").value || "Model", "");
  const controller = (running = new AbortController());
  output.parentElement.classList.add("answering");
  at("send").hidden = true;
  at("stop").hidden = false;
  try {
    await answer(output);
  } catch (error) {
    if (error.name !== "AbortError") setStatus(error.message, true);
  }
  output.parentElement.classList.remove("answering");
  if (running === controller) {
    running = null;
    at("send").hidden = false;
    at("stop").hidden = true;
    if (output.textContent) {
      messages.push({ role: "assistant", content: output.textContent });
    } else if (at("status").classList.contains("bad") || controller.signal.aborted) {
      messages.pop(); // there is no answer: the question can be changed and sent again
      at("question").value ||= question;
      asked.parentElement.remove();
      output.parentElement.remove();
    } else {
      messages.push({ role: "assistant", content: "" });
    }
    at("question").focus();
  }
}

function fresh() {
  running?.abort();
  running = null;
  messages = [];
  at("talk").replaceChildren();
  at("send").hidden = false;
  at("stop").hidden = true;
  setStatus("");
  at("question").focus();
}

at("ask").addEventListener("submit", ask);
at("stop").addEventListener("click", () => running?.abort());
at("fresh").addEventListener("click", fresh);
at("key").addEventListener("change", loadModels);
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
at("question").focus();
loadModels();
