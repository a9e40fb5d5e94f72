// The chat page: what its buttons and keys do.

import * as api from "./api.js";
import * as conversation from "./conversation.js";
import * as settings from "./settings.js";
import { AnswerView, button, edit, emptyView, h, turnView } from "./view.js";

const at = (id) => document.getElementById(id);
const talk = at("talk");
let abouts = new Map(); // what the server says about each model, by name
let chat = conversation.newChat();
let running = null; // the AbortController of the answers that are coming

function setStatus(text) {
  at("status").textContent = text;
}

/** Let a screen reader say something. */
function announce(text) {
  at("announced").textContent = text;
}

const atEnd = () => talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;

/** Call before the conversation changes, and the result afterwards: the end stays in view if it was. */
function keepScroll() {
  const follow = atEnd();
  return () => {
    if (follow) talk.scrollTop = talk.scrollHeight;
    at("to-end").hidden = atEnd();
  };
}

// models

const chosenModels = () => [...at("models").querySelectorAll("input:checked")].map(({ value }) => value);

function showModels() {
  const [first] = abouts.keys();
  document.title = `${first} - litgpt`;
  at("models").hidden = abouts.size === 1;
  if (abouts.size === 1) document.querySelector("h1").textContent = first;
  for (const [i, id] of [...abouts.keys()].entries()) {
    const box = h("input", { type: "checkbox", value: id, checked: i === 0 });
    at("models").append(h("label", {}, box, id));
  }
  at("models").addEventListener("change", ({ target }) => {
    if (!chosenModels().length) target.checked = true;
    if (!chat.turns.length) showChat();
  });
}

async function load() {
  try {
    const { defaults, models } = await api.about();
    abouts = new Map(models.map((model) => [model.id, model]));
    settings.initialize(defaults);
    showModels();
    setStatus("");
    showChat();
  } catch (error) {
    setStatus(error.message);
    at("status").append(" ", button("Try again", "load"));
  }
}

// the conversation

function showTurn(turn) {
  const views = turn.answers.map((answer) => new AnswerView(answer, abouts.get(answer.model), keepScroll));
  talk.append(turnView(turn, views));
  return views;
}

function showChat() {
  talk.replaceChildren();
  if (!chat.turns.length) talk.append(emptyView(chosenModels().map((id) => abouts.get(id)), abouts.size > 1));
  chat.turns.forEach(showTurn);
  talk.scrollTop = talk.scrollHeight;
  at("to-end").hidden = true;
  showList();
}

function showList() {
  const entries = conversation.storedChats().map((stored) => {
    const open = h("button", { type: "button", className: "open", data: { action: "open-chat" } }, conversation.title(stored));
    open.append(h("time", {}, new Date(stored.changed).toLocaleString([], { dateStyle: "short", timeStyle: "short" })));
    if (stored.id === chat.id) open.setAttribute("aria-current", "true");
    const item = h("li", {}, open, button("\u00d7", "delete-chat", `Delete ${conversation.title(stored)}`));
    item.chat = stored;
    return item;
  });
  at("chat-list").replaceChildren(...entries);
}

function keep() {
  if (!conversation.store(chat)) {
    setStatus("The browser has no room for more chats. This one is lost when you close the page: export or delete some.");
  }
  showList();
}

function setRunning(controller) {
  running = controller;
  at("send").hidden = controller !== null;
  at("stop").hidden = controller === null;
  document.body.classList.toggle("running", controller !== null);
}

/** Get one answer, or continue it. */
async function receive(turn, view, fields, signal) {
  const { answer, about } = view;
  const { tokens, seconds } = answer;
  const body = { model: answer.model, messages: conversation.request(chat, turn, answer, about), ...fields };
  if (answer.text) body.continue_final_message = true;
  let first = 0;
  Object.assign(answer, { state: "running", error: "" });
  view.draw();
  try {
    let finish = "done";
    for await (const { choices, usage } of api.chat(body, signal)) {
      if (usage) answer.tokens = tokens + usage.completion_tokens;
      const choice = choices[0];
      if (choice?.finish_reason === "length") finish = "length";
      if (!choice?.delta?.content) continue;
      answer.text += choice.delta.content;
      answer.tokens += 1; // about: a part may have several tokens
      first ||= performance.now();
      answer.seconds = seconds + (performance.now() - first) / 1000;
      view.schedule();
    }
    answer.state = finish;
  } catch (error) {
    const stopped = error.name === "AbortError";
    Object.assign(answer, { state: stopped ? "stopped" : "failed", error: stopped ? "" : error.message });
  }
  view.draw();
}

/** Get the answers of a turn at the same time. */
async function receiveAll(turn, views) {
  const { system, fields } = settings.read();
  const controller = new AbortController();
  const current = chat;
  chat.system = system;
  setRunning(controller);
  setStatus("");
  announce("");
  keep();
  await Promise.all(views.map((view) => receive(turn, view, fields, controller.signal)));
  if (chat !== current) return;
  setRunning(null);
  keep();
  announce(views.map(({ answer, element }) => `${answer.model}: ${answer.error || element.querySelector(".said").textContent}`).join("\n"));
}

function ask(question) {
  const turn = { question, answers: chosenModels().map(conversation.newAnswer) };
  if (!chat.turns.length) talk.replaceChildren();
  chat.turns.push(turn);
  const views = showTurn(turn);
  talk.scrollTop = talk.scrollHeight;
  return receiveAll(turn, views);
}

function send(event) {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question || running || !abouts.size) return;
  at("question").value = "";
  ask(question);
}

function openChat(other) {
  if (running) {
    running.abort();
    conversation.store(chat);
    setRunning(null);
  }
  chat = other;
  setStatus("");
  showChat();
  closeChats();
  at("question").focus();
}

function regenerate(turn, view, more) {
  if (running) return;
  truncate(turn);
  if (!more) Object.assign(view.answer, conversation.newAnswer(view.answer.model));
  receiveAll(turn, [view]);
}

/** Remove the turns after one, which would no longer follow from it. */
function truncate(turn) {
  chat.turns.splice(chat.turns.indexOf(turn) + 1);
  while (talk.lastElementChild.turn !== turn) talk.lastElementChild.remove();
}

function editQuestion(element) {
  const text = element.querySelector(".text");
  const { turn } = element;
  if (running || !text) return;
  edit(text, turn.question, "Send", (question) => {
    at("question").focus();
    if (question === null || running) return;
    const index = chat.turns.indexOf(turn);
    for (const later of [...talk.children].slice(index)) later.remove();
    chat.turns.splice(index);
    ask(question);
  });
}

function editAnswer(view) {
  const { answer, said } = view;
  if (running || !said.isConnected) return;
  edit(said, answer.text, "Save", (text) => {
    if (text === null) return;
    Object.assign(answer, { text, state: "done", error: "", tokens: 0, seconds: 0 });
    view.draw();
    keep();
  });
}

// the list of conversations

function closeChats() {
  document.body.classList.remove("chats-open");
  at("open-chats").setAttribute("aria-expanded", "false");
}

function openChats() {
  document.body.classList.add("chats-open");
  at("open-chats").setAttribute("aria-expanded", "true");
  at("chats").querySelector("button").focus();
}

function download(chats) {
  const lines = conversation.exportLines(chats, abouts);
  if (!lines.length) {
    setStatus("There is no complete answer to export.");
    return;
  }
  const url = URL.createObjectURL(new Blob(lines.map((line) => line + "\n"), { type: "application/jsonl" }));
  h("a", { href: url, download: "chats.jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
  setStatus("");
}

function deleteChats(chats) {
  if (chats.some(({ id }) => id === chat.id)) openChat(conversation.newChat());
  chats.forEach(conversation.remove);
  showList();
}

async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // a page without TLS from another machine has no clipboard
    const field = h("textarea", { value: text, className: "hidden" });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    from.focus();
  }
  const before = from.textContent;
  from.textContent = "Copied";
  announce("Copied");
  setTimeout(() => (from.textContent = before), 1500);
}

// what the buttons do, by their data-action; each gets the button and the turn and the answer that it belongs to

const actions = {
  load,
  fresh: () => openChat(conversation.newChat()),
  stop: () => running?.abort(),
  "to-end": () => (talk.scrollTop = talk.scrollHeight),
  "ask-this": (from) => !running && ask(from.textContent),
  "open-settings": settings.open,
  "reset-settings": settings.reset,
  "open-chats": openChats,
  "close-chats": closeChats,
  "open-chat": (from) => openChat(from.closest("li").chat),
  "delete-chat": (from) => {
    const { chat: other } = from.closest("li");
    if (confirm(`Delete "${conversation.title(other)}"?`)) deleteChats([other]);
  },
  "delete-all": () => confirm("Delete all chats?") && deleteChats([...conversation.storedChats(), chat]),
  "export-one": () => download([chat]),
  "export-all": () => download(conversation.storedChats()),
  "copy-code": (from) => copy(from.closest(".code").querySelector("code").textContent, from),
  copy: (from, turn, { answer, about }) => copy(conversation.splitReasoning(answer.text, about?.reasoning).content, from),
  "copy-question": (from, turn) => copy(turn.question, from),
  regenerate: (from, turn, view) => regenerate(turn, view, false),
  continue: (from, turn, view) => regenerate(turn, view, true),
  "edit-answer": (from, turn, view) => editAnswer(view),
  "edit-question": (from) => editQuestion(from.closest(".turn")),
};

document.addEventListener("click", ({ target }) => {
  const from = target.closest("button[data-action]");
  actions[from?.dataset.action]?.(from, from.closest(".turn")?.turn, from.closest(".answer")?.view);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (document.body.classList.contains("chats-open")) closeChats();
  else running?.abort();
});
at("ask").addEventListener("submit", send);
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  else if (event.key === "ArrowUp" && !at("question").value && chat.turns.length) {
    event.preventDefault();
    editQuestion(talk.lastElementChild);
  }
});
talk.addEventListener("scroll", () => (at("to-end").hidden = atEnd()));
addEventListener("storage", ({ key }) => conversation.isChat(key) && showList());
addEventListener("pagehide", () => running && conversation.store(chat));

api.onKeyNeeded((problem) => {
  const dialog = at("key");
  const form = dialog.querySelector("form");
  at("key-problem").textContent = problem;
  form.reset();
  dialog.showModal();
  return new Promise((resolve) => {
    let entered = null;
    form.onsubmit = (event) => {
      event.preventDefault();
      entered = form.elements.key.value.trim();
      dialog.close();
    };
    actions["cancel-key"] = () => dialog.close();
    dialog.onclose = () => resolve(entered);
  });
});

at("question").focus();
load();
