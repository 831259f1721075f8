"""Style and script of the report's page, as they stand in the file: no library, no font and no image from anywhere."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --card: #ffffff; --ink: #1b1b19; --soft: #5d5d58; --line: #e3e2dc;
  --front: #1f6fd0; --rest: #a3a29b; --wash: #eaf2fc; }
@media (prefers-color-scheme: dark) { :root { --page: #141413; --card: #1e1e1c; --ink: #f1f0ea; --soft: #b0afa6;
  --line: #34342f; --front: #6aa9f4; --rest: #74736c; --wash: #1d2a3a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1.75rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.05rem; margin: 0 0 .75rem; }
.lead { margin: 0 0 1.25rem; color: var(--soft); max-width: 60ch; overflow-wrap: anywhere; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem; margin: 0 0 1rem; }
.controls { display: flex; flex-wrap: wrap; gap: .4rem .5rem; margin: 0 0 .5rem; }
.controls button { font: inherit; font-size: .85rem; padding: .3rem .75rem; border-radius: 999px; cursor: pointer;
  border: 1px solid var(--line); background: none; color: var(--soft); }
.controls i { width: .8rem; }
.controls button[aria-pressed=true] { background: var(--wash); border-color: var(--front); color: var(--ink); }
.chart { height: clamp(17rem, 52vh, 31rem); touch-action: pan-y; }
.chart svg { display: block; width: 100%; height: 100%; overflow: visible; }
.chart text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.chart text.label { fill: var(--ink); font-weight: 550; paint-order: stroke; stroke: var(--card); stroke-width: 4px;
  stroke-linejoin: round; }
.grid { stroke: var(--line); stroke-width: 1; }
.steps { fill: none; stroke: var(--front); stroke-width: 2; opacity: .45; }
.dot { fill: var(--rest); stroke: var(--card); stroke-width: 2; }
.dot.on { fill: var(--front); }
.dot.now { stroke: var(--ink); }
.detail { min-height: 3.6rem; padding: .5rem .75rem; margin-top: .5rem; border-radius: 8px; background: var(--wash);
  font-size: .88rem; overflow-wrap: anywhere; }
.detail b { margin-right: .6rem; }
.detail span { color: var(--soft); margin-right: .9rem; display: inline-block; }
.detail i { font-style: normal; color: var(--ink); font-variant-numeric: tabular-nums; }
.legend, .note { color: var(--soft); font-size: .82rem; margin: .7rem 0 0; }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin: 0 .45em 0 0; }
.key.front { background: var(--front); } .key.rest { background: var(--rest); }
.legend > span { display: inline-block; margin-right: 1.2em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .65rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: top; }
thead th { color: var(--soft); font-weight: 500; white-space: normal; vertical-align: bottom; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); min-width: 15rem;
  white-space: normal; overflow-wrap: anywhere; font-weight: 550; padding-left: 0; }
@media (max-width: 40rem) { th:first-child { min-width: 9.5rem; } .card { padding: .75rem; } }
.mark[hidden] { display: none; }
th small { display: block; color: var(--soft); font-weight: 400; }
tr.now td, tr.now th:first-child { background: var(--wash); }
.mark { font-size: .72rem; font-weight: 500; color: var(--front); border: 1px solid currentColor; border-radius: 999px;
  padding: 0 .45em; margin-left: .5em; white-space: nowrap; }
"""

SCRIPT = """
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const chart = document.getElementById('chart'), detail = document.getElementById('detail');
const texts = [...new Set(data.views.map(v => v.text))];
let view = data.views[0], current = null, spots = [], near = true;
const escape = s => String(s).replace(/[&<>"']/g, c => '&#' + c.charCodeAt(0) + ';');
const short = v => Math.abs(v) >= 1000 ? Math.round(v).toLocaleString('en') : String(Number(v.toPrecision(3)));
const precise = v => Number(v.toPrecision(5)).toLocaleString('en', {maximumSignificantDigits: 5});

function scale(values, from, to, pad) {            // linear, or logarithmic where the values are far apart
  let low = Math.min(...values), high = Math.max(...values);
  const log = low > 0 && high / low > 6, f = log ? Math.log : v => v, back = log ? Math.exp : v => v;
  let a = f(low), b = f(high);
  const room = (b - a || Math.abs(a) || 1) * pad;
  a -= room; b += room;
  if (!log && low >= 0) a = Math.max(a, 0);
  const place = v => from + (f(v) - a) / (b - a) * (to - from), ticks = [], count = Math.abs(to - from) / 75;
  if (log) {
    for (let e = Math.floor(a / Math.LN10); e <= Math.ceil(b / Math.LN10); e++)
      for (const m of (b - a > 5.5 ? [1] : [1, 2, 5])) ticks.push(m * 10 ** e);
  } else {
    const raw = (b - a) / Math.max(2, count), unit = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map(m => m * unit).find(s => s >= raw);
    for (let n = Math.ceil(a / step); n * step <= b; n++) ticks.push(Number((n * step).toPrecision(12)));
  }
  return {place, log, ticks: ticks.filter(t => f(t) >= a - 1e-9 && f(t) <= b + 1e-9)};
}

function ceiling() {                               // losses far above the front, e.g. of broken models, hide the rest
  const front = view.points.filter(p => p[3]).map(p => p[2]), worst = Math.max(...front), best = Math.min(...front);
  const limit = worst + Math.max(worst - best, Math.abs(worst) * .05) * .75;
  return view.points.some(p => p[2] > limit) ? limit : null;
}

function draw() {
  const W = chart.clientWidth, H = chart.clientHeight, L = 52, R = 14, T = 26, B = 42, narrow = W < 520;
  const x = scale(view.points.map(p => p[1]), L, W - R, .05), limit = near ? ceiling() : null;
  const cut = loss => limit === null ? loss : Math.min(loss, limit);
  const y = scale(view.points.map(p => cut(p[2])), H - B, T, .07);
  spots = view.points.map(p => ({row: p[0], x: x.place(p[1]), y: y.place(cut(p[2])), size: p[1], loss: p[2], on: p[3],
    off: p[2] > cut(p[2])}));
  let out = '';
  for (const t of y.ticks) out += `<line class="grid" x1="${L}" x2="${W - R}" y1="${y.place(t)}" y2="${y.place(t)}"/>` +
    `<text x="${L - 8}" y="${y.place(t) + 4}" text-anchor="end">${short(t)}</text>`;
  let last = -1e9;
  for (const t of x.ticks) {
    if (x.place(t) - last < 44) continue;
    last = x.place(t);
    out += `<text x="${last}" y="${H - B + 20}" text-anchor="middle">${short(t)}</text>`;
  }
  out += `<text x="${W - R}" y="${H - 4}" text-anchor="end">weight files, MiB${x.log ? ' (log)' : ''}</text>` +
    `<text x="4" y="12">${escape(view.loss)}${y.log ? ' (log)' : ''}, ${escape(view.text)}</text>`;
  const front = spots.filter(s => s.on), marked = new Set(front.map(s => s.row));
  for (const e of document.querySelectorAll('tr[data-row]'))
    e.querySelector('.mark').hidden = !marked.has(Number(e.dataset.row));
  out += `<path class="steps" d="${front.map((s, i) => i ? `H${s.x}V${s.y}` : `M${s.x} ${s.y}`).join('')}"/>`;
  for (const s of [...spots].sort((a, b) => a.on - b.on))
    out += s.off ? `<path class="dot" data-row="${s.row}" d="M${s.x - 7} ${s.y + 5}h14l-7 -12z"/>` :
      `<circle class="dot ${s.on ? 'on' : ''}" data-row="${s.row}" cx="${s.x}" cy="${s.y}" r="${s.on ? 6.5 : 5}"/>`;
  const taken = spots.map(s => [s.x - 7, s.y - 7, s.x + 7, s.y + 7]);
  for (const s of front) {                          // names where they touch nothing; the rest is a hover away
    const name = data.rows[s.row].name.split('/').pop(), w = name.length * 6.9 + 6;
    const spots4 = [[s.x + 10, s.y - 6], [s.x + 10, s.y + 17], [s.x - w - 6, s.y - 6], [s.x - w - 6, s.y + 17]];
    for (const [lx, ly] of narrow ? spots4.slice(0, 3) : spots4) {
      const box = [lx, ly - 12, lx + w, ly + 4];
      if (box[0] < L || box[2] > W || box[1] < T - 8 || box[3] > H - B) continue;
      if (taken.some(t => box[0] < t[2] && t[0] < box[2] && box[1] < t[3] && t[1] < box[3])) continue;
      taken.push(box);
      out += `<text class="label" x="${lx}" y="${ly}">${escape(name)}</text>`;
      break;
    }
  }
  chart.innerHTML = `<svg viewBox="0 0 ${W} ${H}" aria-hidden="true">${out}</svg>`;
  chart.setAttribute('aria-label', `${view.loss} on ${view.text} against megabytes, ${view.points.length} models`);
  if (!spots.some(s => s.row === current)) current = front.length ? front[front.length - 1].row : null;
  show(current);
}

function show(row) {
  current = row;
  for (const e of document.querySelectorAll('.dot, tr[data-row]'))
    e.classList.toggle('now', Number(e.dataset.row) === row);
  const spot = spots.find(s => s.row === row);
  if (!spot) return;
  const facts = [['MiB', precise(spot.size)], [view.loss, precise(spot.loss)], ...data.rows[row].facts];
  detail.innerHTML = `<b>${escape(data.rows[row].name)}</b>` +
    facts.map(([k, v]) => `<span>${escape(k)} <i>${escape(v)}</i></span>`).join('');
}

function nearest(event) {
  const box = chart.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
  let best = null, far = 48;
  for (const s of spots) { const d = Math.hypot(s.x - px, s.y - py); if (d < far) { far = d; best = s; } }
  if (best) show(best.row);
}

function buttons() {
  const box = document.getElementById('controls');
  box.innerHTML = '';
  const gap = () => box.append(document.createElement('i'));
  const add = (label, chosen, next, zoom = near) => {
    const button = document.createElement('button');
    button.textContent = label;
    button.setAttribute('aria-pressed', chosen);
    button.onclick = () => { view = next; near = zoom; buttons(); draw(); };
    box.append(button);
  };
  const pick = (text, loss) => data.views.find(v => v.text === text && v.loss === loss) ||
    data.views.find(v => v.text === text);
  if (texts.length > 1) for (const t of texts) add(t, t === view.text, pick(t, view.loss));
  if (texts.length > 1) gap();
  const losses = data.views.filter(v => v.text === view.text);
  if (losses.length > 1) for (const v of losses) add(v.loss, v === view, v);
  if (ceiling() !== null) { gap(); add('near the front', near, view, !near); }
}

chart.addEventListener('pointermove', nearest);
chart.addEventListener('pointerdown', nearest);
for (const tr of document.querySelectorAll('tr[data-row]'))
  tr.addEventListener('pointerenter', () => show(Number(tr.dataset.row)));
new ResizeObserver(draw).observe(chart);
buttons();
draw();
"""
