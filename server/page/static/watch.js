// Asks /ready and /metrics again and again while the page is seen, and turns them into one reading. Draws nothing.

import { ApiError, ask } from "./api.js";

const BUSY_MS = 1000; // the server takes 11 to 18 ms for the 69 kB of /metrics (Zen 3, shared with other work)
const IDLE_MS = 2500;
const WINDOW_S = 60; // of means and of the line
const RATE_S = 2; // of the rate that is shown

/** Prometheus text as a list of {name, labels, value}. */
export function parseMetrics(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue; // comments and the empty last line
    const labels = {};
    for (const [, key, value] of (match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[key] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    }
    samples.push({ name: match[1], labels, value: Number(match[3]) });
  }
  return samples;
}

/** Calls `onReading` with a reading after every look at the server; `again()` looks at once. */
export class Watch {
  #onReading;
  #history = []; // counters of the last minute, oldest first
  #timer = 0;
  #lostAt = null;
  #looking = false;
  busy = false; // whether the page itself has something running: then a look each second

  constructor(onReading) {
    this.#onReading = onReading;
    document.addEventListener("visibilitychange", () => document.hidden || this.again());
  }

  again() {
    clearTimeout(this.#timer);
    if (!this.#looking) this.#look();
  }

  async #look() {
    this.#looking = true;
    let reading;
    try {
      const [ready, metrics] = await Promise.all([ask("ready"), ask("metrics")]);
      const status = await ready.json();
      reading = this.#read(ready.ok, status, parseMetrics(await metrics.text()));
      this.#lostAt = null;
    } catch (error) {
      if (!(error instanceof ApiError || error instanceof TypeError || error instanceof SyntaxError)) throw error;
      this.#lostAt ??= new Date();
      this.#history = [];
      reading = { reachable: false, ready: false, lostAt: this.#lostAt };
    } finally {
      this.#looking = false;
    }
    this.#onReading(reading);
    const busy = this.busy || !reading.ready || reading.running + reading.waiting > 0 || reading.rate > 0;
    if (!document.hidden) this.#timer = setTimeout(() => this.#look(), busy ? BUSY_MS : IDLE_MS);
  }

  #read(ready, status, samples) {
    const sum = (name) => samples.reduce((total, s) => (s.name === name ? total + s.value : total), 0);
    const byLabel = (name, label) =>
      Object.fromEntries(samples.filter((s) => s.name === name).map((s) => [s.labels[label], s.value]));
    const info = samples.find((s) => s.name === "vllm:cache_config_info")?.labels;
    const now = {
      at: performance.now() / 1000,
      tokens: sum("vllm:generation_tokens_total"),
      firstSum: sum("vllm:time_to_first_token_seconds_sum"),
      firstCount: sum("vllm:time_to_first_token_seconds_count"),
      nextSum: sum("vllm:inter_token_latency_seconds_sum"),
      nextCount: sum("vllm:inter_token_latency_seconds_count"),
    };
    const last = this.#history.at(-1);
    if (last && now.tokens < last.tokens) this.#history = []; // another process counts from 0
    this.#history.push(now);
    while (now.at - this.#history[0].at > WINDOW_S) this.#history.shift();
    const queries = sum("vllm:prefix_cache_queries_total");
    return {
      reachable: true,
      ready,
      ...status, // phase, progress, detail, elapsed_s, eta_s
      model: samples.find((s) => s.labels.model_name)?.labels.model_name ?? "",
      rate: rateSince(this.#history, now.at - RATE_S),
      rates: this.#history.slice(1).map((entry, i) => ({ at: entry.at, rate: perSecond(this.#history[i], entry) })),
      running: sum("vllm:num_requests_running"),
      waiting: sum("vllm:num_requests_waiting"),
      kvUsage: sum("vllm:kv_cache_usage_perc"),
      kvTokens: Number(info?.kv_cache_size_tokens ?? 0),
      firstToken_s: mean(this.#history[0], now, "first"),
      nextToken_s: mean(this.#history[0], now, "next"),
      prefixHits: queries > 0 ? sum("vllm:prefix_cache_hits_total") / queries : null,
      generated: now.tokens,
      read: sum("vllm:prompt_tokens_total"),
      refused: sum("vllm:admission_rejections_total"),
      ledger: byLabel("spq:memory_bytes", "kind"),
      phases: byLabel("spq:startup_seconds", "phase"),
    };
  }
}

function perSecond(before, after) {
  return (after.tokens - before.tokens) / Math.max(0.001, after.at - before.at);
}

function rateSince(history, time) {
  const before = history.findLast((entry) => entry.at <= time) ?? history[0];
  const now = history.at(-1);
  return before === now ? 0 : perSecond(before, now);
}

function mean(before, after, name) {
  const number = after[`${name}Count`] - before[`${name}Count`];
  return number > 0 ? (after[`${name}Sum`] - before[`${name}Sum`]) / number : null;
}
