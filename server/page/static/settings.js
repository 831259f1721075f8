// The form of settings: what a request carries besides the messages. Kept on this machine; the key only in the tab.

import { keepKey, readKey } from "./api.js";
import { find, make, setText } from "./dom.js";
import { load, save } from "./store.js";

// name, label, least, most, step; the limits are the API's own (server/api/fields.py)
const FIELDS = [
  ["temperature", "Temperature", 0, 2, 0.1],
  ["top_p", "Top p", 0.01, 1, 0.05],
  ["top_k", "Top k", -1, 2147483647, 1],
  ["min_p", "Min p", 0, 1, 0.05],
  ["repetition_penalty", "Repetition penalty", 0.01, 10, 0.05],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1],
  ["max_tokens", "Tokens at most", 1, 2147483647, 1],
  ["seed", "Seed", -(2 ** 53), 2 ** 53, 1],
];
const WHOLE = new Set(["top_k", "max_tokens", "seed"]);

/** The panel; `onChange` is called after every edit. */
export class Settings {
  #form = find("#settings-form");
  #inputs = new Map();
  #wrongs = new Map();

  constructor(onChange) {
    for (const [name, label, min, max] of FIELDS) {
      const input = make("input", { id: `set-${name}`, name, inputmode: WHOLE.has(name) ? "numeric" : "decimal",
        autocomplete: "off", placeholder: "default", "aria-describedby": `wrong-${name}` });
      const wrong = make("p", { id: `wrong-${name}`, class: "wrong" });
      find("#fields").append(make("label", { for: input.id, title: range(min, max) }, label), input, wrong);
      this.#inputs.set(name, input);
      this.#wrongs.set(name, wrong);
    }
    this.#wrongs.set("stop", find("#stops-wrong"));
    this.#inputs.set("stop", find("#stops"));
    const kept = load("machine", "settings") ?? {};
    for (const field of this.#form.elements) if (field.name) field.value = kept[field.name] ?? "";
    this.#form.addEventListener("submit", (event) => event.preventDefault());
    this.#form.addEventListener("input", () => {
      this.check();
      this.#keep();
      onChange();
    });
    find("#reset").addEventListener("click", () => {
      this.#form.reset();
      this.check();
      this.#keep();
      onChange();
    });
    find("#forget").addEventListener("click", () => {
      keepKey(null);
      this.showKey();
      find("#settings").focus();
      onChange();
    });
    this.check();
    this.showKey();
  }

  /** The system prompt, or an empty text. */
  get system() {
    return find("#system").value.trim();
  }

  /** Fields of a request body; only those that were filled in. */
  values() {
    const values = {};
    for (const [name] of FIELDS) {
      const text = this.#inputs.get(name).value.trim();
      if (text !== "") values[name] = Number(text);
    }
    const stops = find("#stops").value.split("\n").filter((line) => line !== "");
    if (stops.length > 0) values.stop = stops;
    return values;
  }

  /** Mark fields outside their limits; returns the first of them, or null. */
  check() {
    let first = null;
    for (const [name, , min, max] of FIELDS) {
      const input = this.#inputs.get(name);
      const number = Number(input.value);
      const fits = number >= min && number <= max && (!WHOLE.has(name) || Number.isInteger(number));
      const wrong = input.value.trim() !== "" && !fits;
      this.#mark(name, wrong ? `${WHOLE.has(name) ? "A whole number" : "A number"} ${range(min, max)}.` : "");
      if (wrong) first ??= input;
    }
    this.#mark("stop", "");
    return first;
  }

  /** Show what the server said about a field; returns the field, or null where it is none of ours. */
  blame(param, message) {
    const name = (param ?? "").split(/[.[]/)[0];
    if (!this.#inputs.has(name)) return null;
    this.#mark(name, message);
    return this.#inputs.get(name);
  }

  /** Say whether a key is kept. */
  showKey() {
    const kept = readKey() !== null;
    const without = "None is kept. The chat asks where one is needed.";
    setText(find("#key-state"), kept ? "A key is kept until this tab closes." : without);
    find("#forget").hidden = !kept;
  }

  #mark(name, message) {
    const input = this.#inputs.get(name);
    setText(this.#wrongs.get(name), message);
    if (message) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
  }

  #keep() {
    const named = [...this.#form.elements].filter((field) => field.name && field.value !== "");
    save("machine", "settings", Object.fromEntries(named.map((field) => [field.name, field.value])));
  }
}

function range(min, max) {
  return max > 1e6 ? (min < -1e6 ? "within 53 bits" : `from ${min} up`) : `from ${min} to ${max}`;
}
