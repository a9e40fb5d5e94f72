// Markdown to elements. HTML in a text is text; DOMPurify lets only a few tags pass, whatever the parser makes.

import { Lexer, Marked } from "./vendor/marked.esm.js";

const LONGEST = 100_000; // characters of a text; a longer one is shown as it is
const LONGEST_INLINE = 5_000; // of a paragraph or cell: the parser takes quadratic time for some
const TOO_DEEP = /^(?:[ \t]*(?:>|[-*+] |\d{1,9}[.)] )){40}/m; // quotes and lists in each other: the parser is recursive
const SANITIZER = {
  ALLOWED_TAGS: "a blockquote br code del em h3 h4 h5 h6 hr li ol p pre span strong table tbody td th thead tr ul".split(" "),
  ALLOWED_ATTR: ["align", "class", "href", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };

const escape = (text) => text.replace(/[&<>"']/g, (character) => ESCAPES[character]);

/** An extension of the parser that leaves math as it is. */
function math(level, pattern, start, tag) {
  const name = `${level}-math`;
  return {
    name,
    level,
    start: (source) => source.match(start)?.index,
    tokenizer(source) {
      const found = pattern.exec(source);
      if (found) return { type: name, raw: found[0] };
    },
    renderer: ({ raw }) => `<${tag} class="math">${escape(raw.trimEnd())}</${tag}>`,
  };
}

const marked = new Marked({
  gfm: true,
  breaks: true,
  tokenizer: { html() {}, tag() {} }, // nothing is HTML
  renderer: {
    checkbox: ({ checked }) => (checked ? "\u2611 " : "\u2610 "),
    heading({ tokens, depth }) {
      const tag = `h${Math.min(depth + 2, 6)}`;
      return `<${tag}>${this.parser.parseInline(tokens)}</${tag}>`;
    },
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`, // nothing is loaded
  },
  extensions: [
    math("block", /^(?:\$\$[^$]+\$\$|\\\[(?:(?!\\\])[^])+\\\])(?:\n|$)/, /\$\$|\\\[/, "p"),
    math("inline", /^(?:\$\$[^$]+\$\$|\\\[(?:(?!\\\])[^])+\\\]|\\\((?:(?!\\\))[^])+\\\)|\$(?=\S)[^$\n]*[^$\s]\$(?!\d))/, /\$|\\[[(]/, "span"),
  ],
});

/** The blocks of a text. Their `raw` texts add up to it. */
function parse(text) {
  const lexer = new Lexer(marked.defaults);
  const blocks = lexer.blockTokens(text, []);
  for (const { src, tokens } of lexer.inlineQueue) {
    if (src.length > LONGEST_INLINE) tokens.push({ type: "text", raw: src, text: src });
    else lexer.inlineTokens(src, tokens);
  }
  return blocks;
}

/** The elements of some blocks. */
function elements(blocks) {
  const fragment = DOMPurify.sanitize(marked.parser(blocks), SANITIZER);
  for (const link of fragment.querySelectorAll("a")) {
    if (!link.hasAttribute("href")) continue;
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = document.createElement("div");
    frame.className = "table";
    frame.tabIndex = 0; // so that the keyboard can scroll it
    table.replaceWith(frame);
    frame.append(table);
  }
  fragment.querySelectorAll("pre").forEach(addCopyButton);
  return [...fragment.childNodes].filter((node) => node.nodeType === Node.ELEMENT_NODE || node.data.trim());
}

function addCopyButton(pre) {
  const language = /^language-(.+)/.exec(pre.firstElementChild?.className)?.[1] ?? "";
  const [frame, head, label, button] = ["div", "div", "span", "button"].map((tag) => document.createElement(tag));
  frame.className = "code";
  label.textContent = language;
  button.type = "button";
  button.dataset.action = "copy-code";
  button.textContent = "Copy";
  button.setAttribute("aria-label", "Copy the code");
  pre.tabIndex = 0;
  head.append(label, button);
  pre.replaceWith(frame);
  frame.append(head, pre);
}

function plain(text) {
  const paragraph = document.createElement("p");
  paragraph.className = "plain";
  paragraph.textContent = text;
  return paragraph;
}

/** Change the children of an element from an index on to the new ones, and touch nothing that stays as it is: a selection
 * survives, and nothing flickers. */
function morph(parent, fresh, from = 0) {
  const old = [...parent.childNodes].slice(from);
  fresh.forEach((node, i) => {
    const before = old[i];
    if (!before) parent.append(node);
    else if (before.isEqualNode(node)) return;
    else if (before.nodeType === Node.TEXT_NODE && node.nodeType === Node.TEXT_NODE) {
      if (node.data.startsWith(before.data)) before.appendData(node.data.slice(before.data.length));
      else before.data = node.data;
    } else if (before.nodeType === Node.ELEMENT_NODE && before.cloneNode(false).isEqualNode(node.cloneNode(false))) {
      morph(before, [...node.childNodes]);
    } else before.replaceWith(node);
  });
  old.slice(fresh.length).forEach((node) => node.remove());
}

/** An element that shows a text which grows. Only the last block is rendered again. */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.reset();
  }

  reset() {
    this.done = 0; // characters in blocks that no longer change
    this.n = 0; // elements of those blocks
  }

  /** Show a text that begins with the one before. At its end, all of it is parsed again: links may be defined there. */
  show(text, complete) {
    text = text.replace(/\r\n?/g, "\n");
    if (complete && text.length <= LONGEST) this.reset();
    this.draw(text.slice(this.done), text.length > LONGEST);
    if (complete) this.reset(); // the next text may be another one
  }

  draw(rest, tooLong) {
    if (tooLong || TOO_DEEP.test(rest)) {
      morph(this.element, [plain(rest)], this.n);
      return;
    }
    try {
      const blocks = parse(rest);
      const last = blocks.findLastIndex((block) => block.type !== "space");
      const [ended, open] = [blocks.slice(0, Math.max(last, 0)), blocks.slice(Math.max(last, 0))];
      const fixed = elements(ended);
      morph(this.element, [...fixed, ...elements(open)], this.n);
      this.n += fixed.length;
      for (const block of ended) this.done += block.raw.length;
    } catch {
      morph(this.element, [plain(rest)], this.n); // nested too deeply for the parser
    }
  }
}
