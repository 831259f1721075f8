// Puts the parts together: what the watch sees and what the user does decide which of them is shown.

import { getJson, keepKey, readKey } from "./api.js";
import { Chat } from "./chat.js";
import { Code } from "./code.js";
import { button, find, make, setText } from "./dom.js";
import { count, percent } from "./format.js";
import { showFacts, showNumbers, summary } from "./panel.js";
import { Settings } from "./settings.js";
import { phaseName, showStart } from "./start.js";
import { Views } from "./views.js";
import { Watch } from "./watch.js";

const prompt = find("#prompt");
const views = new Views();
const code = new Code();
const settings = new Settings(() => showCode());
let reading = { reachable: false, ready: false, lostAt: new Date() };
let card = null; // of /v1/models; it may need the key
let model = "";
let countdown = 0;

const chat = new Chat({
  request: () => ({ model, system: settings.system, ...settings.values() }),
  mayAsk: () => mayAsk(),
  refused: (error) => showRefusal(error),
  changed: () => refresh(),
});

const watch = new Watch((seen) => {
  const wasReady = reading.ready;
  const wasPhase = reading.phase;
  reading = seen;
  if (seen.reachable) model = seen.model;
  const isBack = seen.phase === "ready" && wasPhase !== "ready"; // loaded again: it may be another
  if (seen.ready && (!wasReady || isBack || card === null)) loadCard();
  if (!seen.reachable) forgetCard(); // what comes back may be another model
  showNumbers(seen);
  refresh();
});

find("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value;
  if (text.trim() === "" || chat.writing || !mayAsk()) return;
  hideProblem();
  prompt.value = "";
  if (document.activeElement === find("#send")) prompt.focus();
  chat.send(text);
  watch.again();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  find("#composer").requestSubmit();
});
prompt.addEventListener("input", () => refresh());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chat.writing) chat.stop();
});
find("#stop").addEventListener("click", () => {
  chat.stop();
  prompt.focus();
});
find("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const field = find("#key");
  keepKey(field.value.trim());
  field.value = "";
  settings.showKey();
  find("#key-form").hidden = true;
  loadCard(true);
  prompt.focus();
});

watch.again();
refresh();
showCode();

/** Whether a message may go out now; where a setting stands in the way, shows it. */
function mayAsk() {
  const wrong = settings.check();
  if (wrong) {
    views.show("settings");
    wrong.focus();
  }
  return !wrong && reading.ready;
}

async function loadCard(keyWasGiven = false) {
  try {
    [card] = (await getJson("v1/models")).data;
    find("#key-form").hidden = true;
    showFacts(card);
    refresh();
  } catch (error) {
    card = undefined; // asked; asked again after a key or a restart
    if (error.status === 401) askForKey(keyWasGiven);
  }
}

function forgetCard() {
  card = null;
  showFacts(null);
}

function askForKey(refused) {
  const form = find("#key-form");
  const shown = !form.hidden;
  form.hidden = false;
  setText(find("#key-label"), refused ? "The server does not know this key." : "This server asks for an API key.");
  if (!shown) find("#key").focus();
}

function showRefusal(error) {
  if (error.status === 401) {
    views.show("chat");
    askForKey(readKey() !== null);
    return;
  }
  const box = find("#problem");
  const field = settings.blame(error.param, error.message);
  const wait = make("p", { class: "quiet" });
  const busy = error.status === 503 || error.status === 429;
  const tooLong = error.code === "context_length_exceeded" && !field && !chat.empty;
  box.classList.toggle("mild", busy);
  box.replaceChildren(make("p", {}, error.message), wait, make("div", { class: "row" },
    tooLong ? button("New chat", () => { hideProblem(); chat.clear(); }) : null,
    field ? button("Open the setting", () => { views.show("settings"); field.focus(); }) : null,
    button("Dismiss", () => { hideProblem(); prompt.focus(); })));
  box.hidden = false;
  countDown(wait, error.retryAfter);
}

/** Say how long to wait, second by second, outside of what is announced. */
function countDown(element, seconds) {
  clearInterval(countdown);
  let left = seconds ?? 0;
  element.setAttribute("aria-live", "off");
  const say = () => {
    setText(element, left > 0 ? `Try again in ${left} s.` : seconds ? "Try again now." : "");
    if (left <= 0) clearInterval(countdown);
    left -= 1;
  };
  countdown = setInterval(say, 1000);
  say();
}

function hideProblem() {
  clearInterval(countdown);
  find("#problem").hidden = true;
}

function showCode() {
  code.show(model || "MODEL", settings.system, settings.values());
}

/** Everything that follows from the reading and the conversation. */
function refresh() {
  const { writing, empty } = chat;
  watch.busy = writing;
  const name = reading.phase ? phaseName(reading.phase) : "Connecting";
  // a model that sleeps, or is on its way back, takes messages: they wait for it
  const kind = reading.ready ? "ready" : reading.reachable ? "wait" : reading.lostAt && model ? "gone" : "wait";
  const names = { ready: name, gone: "No answer", wait: name };
  const isUnderWay = reading.phase !== "ready" && reading.progress > 0 && reading.progress < 1;
  const far = isUnderWay ? ` ${percent(reading.progress)}` : "";
  find("#state").dataset.kind = kind;
  setText(find("#state"), names[kind] + far);
  setText(find("#model"), model);
  document.title = `${far ? `${far.trim()} · ` : ""}${model || "spq-serve"}`;
  showStart(reading);
  find("#welcome").hidden = !(empty && reading.ready);
  setText(find("#welcome-name"), model);
  setText(find("#welcome-facts"), card ? summary(card) : "");
  const held = document.activeElement === find("#stop") && !writing;
  find("#stop").hidden = !writing;
  find("#send").hidden = writing;
  find("#send").disabled = !reading.ready || prompt.value.trim() === "";
  if (held) prompt.focus();
  const used = card && chat.context ? `${count(chat.context)} of ${count(card.max_model_len)} tokens of context` : "";
  setText(find("#context"), used);
  if (model !== refresh.model) {
    refresh.model = model;
    showCode();
  }
}
