// A conversation: what is sent of it, what is exported, and how it is kept in the browser.
//
// {id, changed, system, turns: [{question, answers: [answer]}]}, where an answer is
// {model, text, state, error, tokens, seconds}. A state is running, done, length (a limit ended it), stopped, or failed.

const PREFIX = `litgpt:${location.pathname}:chat:`; // several servers may share a host name
const MOST_CHATS = 500;
const OPENING = /^\s*<think(?:ing)?>/;
const CLOSING = /<\/think(?:ing)?>/;

export function newChat() {
  return { id: `${Date.now()}-${Math.random().toString(36).slice(2, 8)}`, changed: 0, system: "", turns: [] };
}

export function newAnswer(model) {
  return { model, text: "", state: "running", error: "", tokens: 0, seconds: 0 };
}

export function title(chat) {
  return chat.turns[0]?.question.trim().split("\n")[0].slice(0, 80) || "New chat";
}

/** The reasoning at the beginning of an answer, and the rest. `open`: the prompt ends within the reasoning. */
export function splitReasoning(text, open = false) {
  const opening = OPENING.exec(text);
  if (!opening && !open) return { reasoning: "", content: text };
  const inner = opening ? text.slice(opening[0].length) : text;
  const closing = CLOSING.exec(inner);
  if (!closing) return { reasoning: inner, content: "" };
  const content = inner.slice(closing.index + closing[0].length).replace(/^\s+/, "");
  return { reasoning: inner.slice(0, closing.index), content };
}

function toMessage(answer, about) {
  const { reasoning, content } = splitReasoning(answer.text, about?.reasoning);
  const message = { role: "assistant", content };
  if (reasoning.trim()) message.reasoning_content = reasoning.trim();
  return message;
}

const system = (chat) => (chat.system ? [{ role: "system", content: chat.system }] : []);

/** The messages of some turns in which a model, or another one in its place, has an answer that `usable` accepts. */
function messages(turns, model, about, usable) {
  return turns.flatMap(({ question, answers }) => {
    const found = answers.filter(usable);
    const answer = found.find((each) => each.model === model) ?? found[0];
    return answer ? [{ role: "user", content: question }, toMessage(answer, about)] : [];
  });
}

/** The messages that ask a model the question of a turn, or to continue its answer to it. */
export function request(chat, turn, answer, about) {
  const before = about?.single_turn ? [] : chat.turns.slice(0, chat.turns.indexOf(turn));
  const asked = [
    ...system(chat),
    ...messages(before, answer.model, about, ({ text, state }) => text || state === "done"),
    { role: "user", content: turn.question },
  ];
  return answer.text ? [...asked, { role: "assistant", content: answer.text }] : asked;
}

/** Lines of JSON with `messages`, as `litgpt finetune` reads them: one for each model that answered. Unfinished answers
 * and equal lines are left out. */
export function exportLines(chats, abouts) {
  const complete = ({ text, state }) => state === "done" && text.trim();
  const lines = chats.flatMap((chat) => {
    const models = new Set(chat.turns.flatMap(({ answers }) => answers.filter(complete).map(({ model }) => model)));
    return [...models].map((model) => {
      const turns = chat.turns.filter(({ answers }) => answers.some((each) => each.model === model && complete(each)));
      return JSON.stringify({ messages: [...system(chat), ...messages(turns, model, abouts.get(model), complete)] });
    });
  });
  return [...new Set(lines)];
}

/** All conversations in the browser, the latest first. */
export function storedChats() {
  const chats = [];
  for (const key of Object.keys(localStorage).filter((key) => key.startsWith(PREFIX))) {
    try {
      const chat = JSON.parse(localStorage.getItem(key));
      for (const { answers } of chat.turns) {
        for (const answer of answers) if (answer.state === "running") answer.state = "stopped"; // the page was closed
      }
      chats.push(chat);
    } catch {
      localStorage.removeItem(key);
    }
  }
  return chats.sort((a, b) => b.changed - a.changed);
}

/** Keep a conversation. Returns false if there is no room for it. */
export function store(chat) {
  const key = PREFIX + chat.id;
  const isNew = localStorage.getItem(key) === null;
  if (isNew && Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).length >= MOST_CHATS) return false;
  chat.changed = Date.now();
  try {
    localStorage.setItem(key, JSON.stringify(chat));
    return true;
  } catch {
    return false;
  }
}

export function remove(chat) {
  localStorage.removeItem(PREFIX + chat.id);
}

export const isChat = (key) => key === null || key.startsWith(PREFIX);
