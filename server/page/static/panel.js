// The numbers: the strip in the header and the panel "Server", drawn from one reading. Asks nothing itself.

import { find, make, makeSvg, setText } from "./dom.js";
import { bytes, count, duration, percent, rate } from "./format.js";

const KINDS = {
  weights: "Weights",
  low_rank: "Low-rank factors",
  kv: "KV cache",
  workspace: "Workspace of steps",
  graphs: "Recorded steps",
  other: "Runtime, libraries",
  free: "Free",
};
const LINE_S = 60;

/** Draw the numbers of a reading; a server that is away leaves the last ones out. */
export function showNumbers(reading) {
  find("#strip").hidden = !reading.reachable || !reading.ready;
  const known = reading.reachable;
  show("rate", known ? rate(reading.rate) : "–");
  show("running", known ? count(reading.running) : "–");
  show("waiting", known ? count(reading.waiting) : "–");
  show("kv", known ? percent(reading.kvUsage) : "–");
  show("first", known && reading.firstToken_s !== null ? duration(reading.firstToken_s) : "–");
  show("next", known && reading.nextToken_s !== null ? duration(reading.nextToken_s) : "–");
  show("hits", known && reading.prefixHits !== null ? percent(reading.prefixHits) : "–");
  show("generated", known ? count(reading.generated) : "–");
  show("read", known ? count(reading.read) : "–");
  show("refused", known ? count(reading.refused) : "–");
  show("up", known ? duration(reading.elapsed_s) : "–");
  drawLine(known ? reading.rates : []);
  showKv(known ? reading.kvUsage : 0, known ? reading.kvTokens : 0);
  const without = reading.phase === "sleeping" ? "None while the model sleeps" : "Known once the model is loaded";
  showMemory(known ? reading.ledger : {}, known ? without : "–");
}

/** What /v1/models says of the model, in words; null takes the words away. */
export function showFacts(card) {
  if (card === null) return find("#facts").replaceChildren();
  const { spq } = card;
  const packed = spq.compression ?? {};
  const rows = [
    ["Context", `${count(card.max_model_len)} tokens`],
    ["Sequences at most", count(spq.max_num_seqs)],
    ["Runs on", `${spq.device}, ${spq.backend}`],
    ["Computes in", spq.dtype],
    ["KV cache in", spq.kv_dtype],
    ["Compression", packed.preset],
    ["16-bit bytes over its own", packed.ratio_to_fp16 && `${packed.ratio_to_fp16.toFixed(2)} ×`],
    ["Rank kept, mean", packed.mean_rank_kept && percent(packed.mean_rank_kept)],
  ];
  find("#facts").replaceChildren(...rows.filter(([, value]) => value)
    .map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
  setText(find("#memory-device"), `on ${spq.device}`);
}

/** One line on the model for the empty chat. */
export function summary(card) {
  const ratio = card.spq.compression?.ratio_to_fp16;
  const parts = [`${count(card.max_model_len)} tokens of context`, `${bytes(weightBytes(card))} of weights`];
  if (ratio) parts.push(`${ratio.toFixed(1)} × smaller than in 16 bits`);
  return parts.join(" · ");
}

function weightBytes(card) {
  const { weights = 0, low_rank = 0 } = card.spq.memory_bytes;
  return weights + low_rank;
}

function show(name, text) {
  for (const element of document.querySelectorAll(`[data-value="${name}"]`)) setText(element, text);
}

function drawLine(rates) {
  const svg = find("#line");
  const now = rates.at(-1)?.at ?? 0;
  const most = Math.max(1, ...rates.map((point) => point.rate));
  const x = (at) => (240 - (240 * (now - at)) / LINE_S).toFixed(1);
  const y = (value) => (42 - (38 * value) / most).toFixed(1);
  const points = rates.map((point) => `${x(point.at)},${y(point.rate)}`);
  if (points.length < 2) return svg.replaceChildren();
  const [from, to] = [points[0].split(",")[0], points.at(-1).split(",")[0]];
  svg.replaceChildren(makeSvg("path", { d: `M${from},44 L${points.join(" L")} L${to},44 Z` }),
    makeSvg("polyline", { points: points.join(" ") }));
}

function showKv(usage, tokens) {
  setShare(find("#kv-bar"), usage);
  const held = `${count(Math.round(usage * tokens))} of ${count(tokens)} tokens held`;
  setText(find("#kv-text"), tokens ? held : "–");
}

function showMemory(ledger, without) {
  const kinds = Object.entries(ledger).filter(([, size]) => size > 0);
  const budget = kinds.reduce((total, [, size]) => total + size, 0);
  const key = JSON.stringify([kinds, without]);
  const body = find("#memory");
  if (body.dataset.drawn === key) return;
  body.dataset.drawn = key;
  if (budget === 0) {
    find("#memory-stack").replaceChildren();
    body.replaceChildren(make("tr", {}, make("td", { class: "quiet" }, without)));
    return;
  }
  find("#memory-stack").replaceChildren(...kinds.map(([kind, size]) => {
    const part = make("i", { "data-kind": kind });
    setShare(part, size / budget);
    return part;
  }));
  body.replaceChildren(...kinds.map(([kind, size]) => make("tr", { "data-kind": kind },
    make("th", { scope: "row" }, make("i"), KINDS[kind] ?? kind),
    make("td", {}, bytes(size)),
    make("td", {}, percent(size / budget)))),
  make("tr", { class: "total" },
    make("th", { scope: "row" }, "Budget"), make("td", {}, bytes(budget)), make("td")));
}

function setShare(element, share) {
  element.style.setProperty("--share", `${(100 * share).toFixed(2)}%`);
  element.classList.toggle("some", share > 0);
}
