// A message's text on the screen: as it is written, but for fenced code, which gets a box of its own, and for
// rows of empty lines, of which one is shown. Only text nodes.

import { copyButton, make, setText } from "./dom.js";

/** Pieces of a text: {code: false, text} and {code: true, text, language}. An open fence lasts to the end. */
export function splitFences(text) {
  const pieces = [];
  let code = null; // the open fence: its mark and where its code began
  let lines = [];
  const close = () => {
    const text = lines.join("\n");
    const plain = text.replace(/^\n+|\s+$/g, "").replace(/\n{3,}/g, "\n\n");
    if (code) pieces.push({ code: true, text, language: code.language });
    else if (plain) pieces.push({ code: false, text: plain });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const fence = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/.exec(line);
    if (!code && fence) {
      close();
      code = { mark: fence[1], language: fence[2] };
    } else if (code && fence && fence[1].startsWith(code.mark) && !fence[2]) {
      close();
      code = null;
    } else {
      lines.push(line);
    }
  }
  close();
  return pieces;
}

/** Make `box` show `text`. Called for every piece of a stream, so elements that fit already are kept. */
export function showText(box, text) {
  const pieces = splitFences(text);
  if (pieces.length === 0) pieces.push({ code: false, text: "" });
  pieces.forEach((piece, i) => {
    let element = box.children[i];
    if (!element || element.matches(".block") !== piece.code) {
      const made = piece.code ? makeBlock(piece.language) : make("p", { dir: "auto" });
      if (element) element.replaceWith(made);
      else box.append(made);
      element = made;
    }
    setText(piece.code ? element.querySelector("code") : element, piece.text);
    if (piece.code) setText(element.querySelector(".block-head span"), piece.language || "code");
  });
  while (box.children.length > pieces.length) box.lastChild.remove();
}

/** A box with a name, a button to copy, and code, which is scrolled and not wrapped. */
export function makeBlock(name) {
  const code = make("code");
  const head = make("div", { class: "block-head" }, make("span", {}, name),
    copyButton("Copy", () => code.textContent, { class: "link", "aria-label": `Copy ${name || "code"}` }));
  return make("div", { class: "block" }, head, make("pre", { tabindex: "0" }, code));
}
