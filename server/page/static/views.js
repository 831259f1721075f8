// The tabs. On a wide window the chat always stands beside a panel; on a narrow one they take turns.

import { find } from "./dom.js";

const NARROW = "(max-width: 56rem)"; // as in base.css

/** Which view is shown; kept in `data-view` of the body, which the style sheets read. */
export class Views {
  #tabs = [...document.querySelectorAll('[role="tab"]')];
  #narrow = window.matchMedia(NARROW);

  constructor() {
    for (const tab of this.#tabs) {
      tab.addEventListener("click", () => this.show(tab.dataset.view));
      tab.addEventListener("keydown", (event) => this.#onKey(event));
    }
    this.#narrow.addEventListener("change", () => this.show(document.body.dataset.view));
    this.show("chat");
  }

  show(view) {
    const shown = !this.#narrow.matches && view === "chat" ? "server" : view;
    document.body.dataset.view = shown;
    for (const tab of this.#tabs) {
      const selected = tab.dataset.view === shown;
      tab.setAttribute("aria-selected", String(selected));
      tab.tabIndex = selected ? 0 : -1;
    }
    for (const name of ["chat", "server", "settings", "code"]) {
      const panel = find(`#${name}`);
      if (name === "chat" && !this.#narrow.matches) panel.removeAttribute("role"); // it is the page's main part then
      else panel.setAttribute("role", "tabpanel");
    }
  }

  #onKey(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1 };
    const shown = this.#tabs.filter((tab) => tab.offsetParent !== null);
    const at = shown.indexOf(event.currentTarget);
    const to = { Home: 0, End: shown.length - 1 }[event.key] ?? (event.key in steps ? at + steps[event.key] : null);
    if (to === null) return;
    event.preventDefault();
    const tab = shown[(to + shown.length) % shown.length];
    this.show(tab.dataset.view);
    tab.focus();
  }
}
