// The panel with lines to copy: this server by curl and by the openai package, with the settings chosen here.

import { readKey } from "./api.js";
import { find, setText } from "./dom.js";
import { makeBlock } from "./render.js";

const KEY = "SPQ_API_KEY"; // the lines name a variable, never the key itself

/** Shows lines for a model, a system prompt and settings; call `show` when one of them changed. */
export class Code {
  #blocks = ["Shell", "Python", "Environment"].map((name) => makeBlock(name));

  constructor() {
    find("#snippets").append(...this.#blocks);
  }

  show(model, system, values) {
    const base = new URL("v1", document.baseURI).href;
    const messages = [{ role: "user", content: "Hello" }];
    if (system) messages.unshift({ role: "system", content: system });
    const texts = [curl(base, model, messages, values), python(base, model, messages, values), environment(base)];
    this.#blocks.forEach((block, i) => setText(block.querySelector("code"), texts[i]));
  }
}

function curl(base, model, messages, values) {
  const listed = messages.map((message) => `      ${JSON.stringify(message)}`).join(",\n");
  const others = Object.entries({ stream: true, ...values }).map(([name, value]) => `"${name}": ${JSON.stringify(value)}`);
  const fields = [`"model": ${JSON.stringify(model)}`, `"messages": [\n${listed}\n    ]`, ...others];
  const body = `{\n    ${fields.join(",\n    ")}\n  }`.replaceAll("'", "'\\''");
  const auth = readKey() === null ? "" : `  -H "Authorization: Bearer $${KEY}" \\\n`;
  return `curl -N ${base}/chat/completions \\\n  -H 'Content-Type: application/json' \\\n${auth}  -d '${body}'`;
}

function python(base, model, messages, values) {
  const ours = ["top_k", "min_p", "repetition_penalty"]; // not OpenAI's: the client sends them as extra_body
  const given = Object.entries(values);
  const lines = given.filter(([name]) => !ours.includes(name)).map(([name, value]) => `    ${name}=${literal(value)},`);
  const extra = Object.fromEntries(given.filter(([name]) => ours.includes(name)));
  if (Object.keys(extra).length > 0) lines.push(`    extra_body=${literal(extra)},`);
  const key = readKey() === null ? '"none"' : `os.environ["${KEY}"]`;
  return [
    ...(readKey() === null ? [] : ["import os", ""]),
    "from openai import OpenAI",
    "",
    "client = OpenAI(",
    `    base_url=${literal(base)},`,
    `    api_key=${key},`,
    ")",
    "stream = client.chat.completions.create(",
    `    model=${literal(model)},`,
    "    messages=[",
    ...messages.map((message) => `        ${literal(message)},`),
    "    ],",
    ...lines,
    "    stream=True,",
    ")",
    "for chunk in stream:",
    "    if chunk.choices:",
    '        print(chunk.choices[0].delta.content or "", end="", flush=True)',
  ].join("\n");
}

function environment(base) {
  return `OPENAI_BASE_URL=${base}\nOPENAI_API_KEY=${readKey() === null ? "none" : `$${KEY}`}`;
}

/** A Python literal: what settings hold is written alike in JSON and in Python. */
function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, inner]) => `${JSON.stringify(name)}: ${literal(inner)}`).join(", ")}}`;
}
