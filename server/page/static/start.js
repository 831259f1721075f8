// The card that stands in the chat until the model answers: which phase, how far, what is left, what has passed.

import { find, make } from "./dom.js";
import { duration, percent } from "./format.js";

const NAMES = {
  starting: "Starting",
  downloading: "Downloading the model",
  compressing: "Compressing the model",
  loading: "Loading the model",
  warming_up: "Running the largest step once",
  sleeping: "Asleep",
  drained: "Drained",
  draining: "Shutting down",
  failed: "The model cannot be served",
};

/** A phase in words; one that this page does not know is named as the server names it. */
export function phaseName(phase) {
  return NAMES[phase] ?? phase.replaceAll("_", " ").replace(/^./, (letter) => letter.toUpperCase());
}

/** The card for a reading. It stands under the conversation, if there is one, and is moved into view when it comes. */
export function showStart(reading) {
  const card = find("#start");
  const wasHidden = card.hidden;
  card.hidden = reading.ready;
  if (card.hidden) return;
  draw(card, reading);
  if (wasHidden) card.scrollIntoView({ block: "nearest" });
}

function draw(card, reading) {
  if (!reading.reachable) {
    card.replaceChildren(make("h2", {}, "This server does not answer"),
      make("p", {}, `Not since ${reading.lostAt.toLocaleTimeString()}. The page tries again every second.`),
      make("p", { class: "quiet" }, "A server that starts opens its port at once and says here how far it is."));
    return;
  }
  const why = {
    failed: reading.detail,
    draining: "Answers under way are finished; new messages are refused.",
    drained: "The operator has taken the model away. New messages are refused until it is back.",
  }[reading.phase];
  if (why !== undefined) {
    card.replaceChildren(make("h2", {}, phaseName(reading.phase)), make("p", {}, why));
    return;
  }
  const left = reading.eta_s === null ? "" : `, about ${duration(Math.max(1, Math.round(reading.eta_s)))} left`;
  const passed = Object.entries(reading.phases).filter(([phase]) => phase !== reading.phase);
  const spent = reading.elapsed_s - passed.reduce((total, [, seconds]) => total + seconds, 0);
  card.replaceChildren(
    make("h2", {}, phaseName(reading.phase)),
    make("p", { class: "quiet" },
      "You can write already. Sending works once the model is ready; this page follows by itself."),
    make("progress", { max: "1", value: reading.progress.toFixed(3), "aria-label": phaseName(reading.phase) }),
    make("p", { class: "detail quiet" },
      make("span", {}, reading.detail), make("span", {}, percent(reading.progress) + left)),
    make("ol", { class: "phases" },
      ...passed.map(([phase, seconds]) => step(phase, duration(seconds), { class: "done" })),
      step(reading.phase, duration(Math.max(0, spent)), { class: "now", "aria-current": "step" })),
  );
}

function step(phase, time, attributes) {
  return make("li", attributes, make("span", {}, phaseName(phase)), make("span", {}, time));
}
