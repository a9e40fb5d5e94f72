// The elements of a conversation.

import { splitReasoning } from "./conversation.js";
import { MarkdownView } from "./markdown.js";

const STATES = {
  stopped: "Stopped: this answer is not complete.",
  length: "Truncated: this answer reached the maximum length.",
};

/** An element with properties and children; texts become text nodes. */
export function h(tag, properties = {}, ...children) {
  const { data, ...others } = properties;
  const element = Object.assign(document.createElement(tag), others);
  Object.assign(element.dataset, data);
  element.append(...children);
  return element;
}

export function button(text, action, label = text) {
  const made = h("button", { type: "button", data: { action } }, text);
  if (label !== text) made.setAttribute("aria-label", label);
  return made;
}

/** Replace an element by a field for its text. `done` gets the new text, or null. */
export function edit(element, text, accept, done) {
  const field = h("textarea", { value: text, rows: Math.min(12, text.split("\n").length + 1) });
  field.setAttribute("aria-label", "Edit the message");
  const form = h("form", { className: "edit" }, field);
  form.append(h("div", { className: "buttons" }, button("Cancel", ""), h("button", { type: "submit", className: "main" }, accept)));
  const close = (value) => {
    form.replaceWith(element);
    done(value);
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (field.value.trim()) close(field.value.trim());
  });
  form.querySelector("button").addEventListener("click", () => close(null));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close(null);
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  element.replaceWith(form);
  field.focus();
}

/** One model's answer. It is drawn at most once per frame, and less often if that takes long. */
export class AnswerView {
  constructor(answer, about, beforeDraw) {
    Object.assign(this, { answer, about, beforeDraw, frame: 0, earliest: 0 });
    this.reasoning = h("div", { className: "plain" });
    this.details = h("details", { className: "reasoning" }, h("summary", {}, "Reasoning"), this.reasoning);
    this.said = h("div", { className: "said" });
    this.markdown = new MarkdownView(this.said);
    this.note = h("p", { className: "note" });
    this.error = h("p", { className: "error" });
    this.actions = h(
      "div",
      { className: "actions" },
      button("Copy", "copy", "Copy the answer"),
      button("Regenerate", "regenerate", "Regenerate the answer"),
      button("Continue", "continue", "Continue the answer"),
      button("Edit", "edit-answer", "Edit the answer"),
    );
    this.element = h("section", { className: "answer" }, h("h2", {}, answer.model), this.details, this.said, this.error, this.note, this.actions);
    this.element.setAttribute("aria-label", `Answer of ${answer.model}`);
    this.element.view = this;
    this.draw();
  }

  schedule() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      if (performance.now() < this.earliest) this.schedule();
      else this.draw();
    });
  }

  draw() {
    const began = performance.now();
    const { text, state, error, tokens, seconds } = this.answer;
    const running = state === "running";
    const { reasoning, content } = splitReasoning(text, this.about?.reasoning);
    const drawn = this.beforeDraw();
    this.element.dataset.state = state;
    this.element.setAttribute("aria-busy", running);
    this.details.hidden = !reasoning.trim();
    if (this.reasoning.textContent !== reasoning.trim()) this.reasoning.textContent = reasoning.trim();
    this.markdown.show(content, !running);
    this.error.textContent = error;
    this.error.hidden = !error;
    const rate = ((tokens - 1) / seconds).toLocaleString("en", { maximumSignificantDigits: 3 });
    const speed = seconds > 0 && tokens > 1 ? `, ${rate} tokens/s` : "";
    const count = tokens ? `${state === "stopped" || state === "failed" ? "About " : ""}${tokens} token${tokens === 1 ? "" : "s"}${speed}` : "";
    const empty = state === "done" && !text.trim() ? "The answer is empty." : "";
    this.note.textContent = [STATES[state], empty, count].filter(Boolean).join(" ");
    const [copy, again, more, change] = this.actions.children;
    this.actions.hidden = running;
    copy.hidden = change.hidden = !text;
    again.textContent = state === "failed" ? "Try again" : "Regenerate";
    more.hidden = !text || state === "done";
    drawn();
    this.earliest = performance.now() + 4 * (performance.now() - began);
  }
}

/** A question and its answers. */
export function turnView(turn, answerViews) {
  const text = h("div", { className: "text" }, turn.question);
  const actions = h("div", { className: "actions" }, button("Copy", "copy-question", "Copy the question"), button("Edit", "edit-question", "Edit the question"));
  const question = h("div", { className: "question" }, text, actions);
  const answers = h("div", { className: "answers" }, ...answerViews.map((view) => view.element));
  answers.classList.toggle("columns", answerViews.length > 1);
  const element = h("article", { className: "turn" }, h("h2", { className: "hidden" }, "You"), question, answers);
  element.turn = turn;
  return element;
}

/** What is shown before the first question: the models, and questions to try. */
export function emptyView(models, several) {
  const view = h("div", { className: "empty" });
  for (const { id, training, single_turn } of models) {
    view.append(h("h2", {}, id));
    const list = h("dl");
    for (const [name, value] of training) list.append(h("dt", {}, name), h("dd", {}, value));
    if (training.length) view.append(list);
    if (single_turn) view.append(h("p", { className: "note" }, "Its prompt style is for single questions: it does not see earlier ones."));
  }
  if (several) view.append(h("p", { className: "note" }, "Select two or more models to compare their answers side by side."));
  const questions = [...new Set(models.flatMap((model) => model.questions))].slice(0, 3);
  if (questions.length) {
    view.append(h("p", { className: "note" }, "Questions from the validation rows:"));
    view.append(h("div", { className: "questions" }, ...questions.map((text) => button(text, "ask-this"))));
  }
  return view;
}
