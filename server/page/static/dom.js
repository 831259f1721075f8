// Elements made from values, never from markup: text always stays text.

const SVG = "http://www.w3.org/2000/svg";

/** The one element that a selector finds; the page's own HTML has it, or the page is broken. */
export function find(selector) {
  const found = document.querySelector(selector);
  if (!found) throw new Error(`the page has no ${selector}`);
  return found;
}

/** An element. Attributes: `class`, `aria-…`, `data-…`; a function is a listener; false and null are left out. */
export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function makeSvg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** Set an element's text where it differs, so that an unchanged one costs no layout and no announcement. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A button that says nothing to forms. */
export function button(label, onClick, attributes = {}) {
  return make("button", { type: "button", ...attributes, click: onClick }, label);
}

/** Copy text; returns whether it worked. Browsers offer the clipboard only to https and localhost, hence two ways. */
export async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      return copyBySelection(text); // not permitted
    }
  }
  return copyBySelection(text);
}

/** A button that copies what `read` returns and says so for a moment. */
export function copyButton(label, read, attributes = {}) {
  const made = button(label, async () => {
    made.textContent = (await copyText(read())) ? "Copied" : "Not permitted";
    setTimeout(() => (made.textContent = label), 1500);
  }, attributes);
  return made;
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function copyBySelection(text) {
  const focused = document.activeElement;
  const area = make("textarea", { class: "unseen", "aria-hidden": "true", tabindex: "-1" });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}
