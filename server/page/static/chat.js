// The conversation: what was said, the answer being written, and how either ends. Not the server's state.

import { streamChat } from "./api.js";
import { copyButton, button, find, make, setText } from "./dom.js";
import { count, duration, rate } from "./format.js";
import { showText } from "./render.js";
import { load, save } from "./store.js";

const ENDS = { stop: null, length: "cut at the limit of tokens", stopped: "stopped", reload: "cut by a reload" };
const NEAR_PX = 60;

/** The list of messages. `hooks`: request() -> body without messages and system, refused(error), changed(). */
export class Chat {
  #turns = []; // {role, text, note, cut}; after a user's turn always one of the assistant, or the page is writing it
  #hooks;
  #list = find("#messages");
  #scroll = find("#scroll");
  #prompt = find("#prompt");
  #abort = null;
  #context = 0;

  constructor(hooks) {
    this.#hooks = hooks;
    for (const turn of load("tab", "turns") ?? []) this.#push(turn);
    this.#context = load("tab", "context") ?? 0;
    this.#scroll.addEventListener("scroll", () => this.#showLatest());
    find("#latest").addEventListener("click", () => this.#toEnd());
    find("#new").addEventListener("click", () => this.clear());
    window.addEventListener("pagehide", () => this.#keep());
    this.#showActions();
    this.#toEnd();
  }

  get writing() {
    return this.#abort !== null;
  }

  get empty() {
    return this.#turns.length === 0;
  }

  /** Tokens of prompt and answer in the last finished turn; 0 where unknown. */
  get context() {
    return this.#context;
  }

  /** Say something and stream the answer. Never throws: what goes wrong is shown, and the text goes back to the box. */
  async send(text) {
    this.#push({ role: "user", text });
    await this.#answer();
  }

  /** End the answer that is being written; what came so far stays. */
  stop() {
    this.#abort?.abort();
  }

  async #answer() {
    const { system, ...body } = this.#hooks.request();
    const messages = this.#turns.map((turn) => ({ role: turn.role, content: turn.text }));
    if (system) messages.unshift({ role: "system", content: system });
    const turn = { role: "assistant", text: "", note: "", cut: null };
    this.#abort = new AbortController();
    this.#push(turn);
    turn.element.classList.add("writing");
    this.#toEnd();
    this.#hooks.changed();
    let problem = null;
    try {
      await this.#stream(turn, { ...body, messages });
    } catch (error) {
      if (error.name === "AbortError") turn.cut = ENDS.stopped;
      else problem = error;
    }
    this.#abort = null;
    turn.element.classList.remove("writing");
    if (turn.text === "" && (problem || turn.cut)) this.#takeBack();
    else if (problem) turn.cut = problem.message;
    if (turn.element.isConnected) this.#drawText(turn);
    this.#showActions();
    this.#keep();
    this.#hooks.changed();
    if (problem) this.#hooks.refused(problem);
    else setText(find("#spoken"), turn.cut === ENDS.stopped ? "Stopped." : `Answer finished. ${turn.note}`);
  }

  async #stream(turn, body) {
    const asked = performance.now();
    let first = 0;
    let waiting = false;
    for await (const event of streamChat(body, this.#abort.signal)) {
      const [choice] = event.choices;
      const piece = choice?.delta.content ?? "";
      if (piece !== "" && first === 0) first = performance.now();
      turn.text += piece;
      if (choice?.finish_reason) turn.cut = ENDS[choice.finish_reason] ?? null;
      if (event.usage) {
        turn.note = describe(event.usage, first - asked, performance.now() - first);
        this.#context = event.usage.total_tokens;
      }
      if (piece === "" || waiting) continue;
      waiting = true; // a fast model sends many pieces a frame: one drawing for all of them
      requestAnimationFrame(() => {
        waiting = false;
        this.#drawText(turn);
      });
    }
  }

  #push(turn) {
    turn.box = make("div", { class: "text", dir: "auto" });
    turn.under = make("div", { class: "under-message" });
    turn.element = make("li", { class: `message ${turn.role}` },
      make("h2", { class: "unseen" }, turn.role === "user" ? "You" : "Model"),
      turn.box, turn.under);
    this.#turns.push(turn);
    this.#list.append(turn.element);
    showText(turn.box, turn.text);
    this.#showActions();
  }

  #drawText(turn) {
    const follow = this.#atEnd();
    showText(turn.box, turn.text);
    if (follow) this.#toEnd();
    this.#showLatest();
  }

  /** The user's last words return to the box: they were not answered at all. */
  #takeBack() {
    this.#drop(2);
    const [turn] = this.taken;
    if (this.#prompt.value === "") this.#prompt.value = turn.text;
  }

  #drop(number) {
    this.taken = this.#turns.splice(-number);
    for (const turn of this.taken) turn.element.remove();
  }

  #showActions() {
    const last = this.#turns.length - 1;
    this.#turns.forEach((turn, i) => {
      if (turn.role === "user") {
        const editable = !this.writing && i === last - 1;
        turn.under.replaceChildren(...(editable ? [button("Edit", () => this.#edit(), { class: "link" })] : []));
        return;
      }
      const done = !(this.writing && i === last);
      turn.under.replaceChildren(
        ...(done ? [copyButton("Copy", () => turn.text, { class: "link", "aria-label": "Copy the answer" })] : []),
        ...(done && i === last ? [button("Again", () => this.#again(), { class: "link", title: "Answer again" })] : []),
        ...(turn.note ? [make("span", {}, turn.note)] : []),
        ...(turn.cut ? [make("span", { class: "cut" }, turn.cut)] : []),
        ...(done && turn.text === "" ? [make("span", {}, "An empty answer")] : []),
      );
    });
    find("#new").disabled = this.empty || this.writing;
  }

  async #again() {
    if (!this.#hooks.mayAsk()) return;
    this.#drop(1);
    this.#prompt.focus();
    await this.#answer();
  }

  #edit() {
    this.#drop(2);
    this.#prompt.value = this.taken[0].text;
    this.#prompt.focus();
    this.#context = 0;
    this.#showActions();
    this.#keep();
    this.#hooks.changed();
  }

  /** Forget the conversation; what stands in the box stays. */
  clear() {
    this.#drop(this.#turns.length);
    this.#context = 0;
    this.#keep();
    this.#showActions();
    this.#hooks.changed();
    this.#prompt.focus();
  }

  #keep() {
    const turns = this.#turns.map(({ role, text, note, cut }) => ({ role, text, note, cut }));
    if (this.writing) {
      const half = turns.pop();
      if (half.text === "") turns.pop();
      else turns.push({ ...half, cut: ENDS.reload });
    }
    save("tab", "turns", turns);
    save("tab", "context", this.#context);
  }

  #atEnd() {
    const box = this.#scroll;
    return box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_PX;
  }

  #toEnd() {
    this.#scroll.scrollTop = this.#scroll.scrollHeight;
    this.#showLatest();
  }

  #showLatest() {
    find("#latest").hidden = this.empty || this.#atEnd();
  }
}

function describe(usage, firstMs, restMs) {
  const tokens = usage.completion_tokens;
  const parts = [`${count(tokens)} ${tokens === 1 ? "token" : "tokens"}`];
  if (tokens > 1 && restMs > 0) parts.push(`${rate((1000 * (tokens - 1)) / restMs)} tokens/s`);
  if (firstMs > 0) parts.push(`first after ${duration(firstMs / 1000)}`);
  return parts.join(" · ");
}
