// Charts over time, and the spread of latencies. Each chart is a table of series over bins of time.
import { percentile, share, store, together } from "./data.js";

/* global uPlot */
const COLOURS = ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6"];
const DASHES = [[], [8, 4], [2, 3], [], [8, 4], []];
const STEPS = [1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1800]; // seconds between two ticks
const BIN = { 60: 1, 300: 2, 900: 5, 3600: 15 }; // seconds of one point

const rate = (name) => (b) => b[name] / b.seconds;
const latency = (name, p) => (b) => percentile(b[name], store.about.bounds[name], p);
const latencies = (name) => [0.5, 0.9, 0.99].map((p) => [`p${p * 100}`, latency(name, p)]);
const step = (at) => (b) => (b.steps[at * 3] ? b.steps[at * 3 + 1] / b.steps[at * 3] : null);
const positions = Array.from({ length: 6 }, (_, at) => [
  `position ${at + 1}`, (b) => (b.drafts && at in b.accepted ? b.accepted[at] / b.drafts : null)]);

export const count = (v) => (v >= 1000 ? Math.round(v).toLocaleString("en") : v >= 100 ? v.toFixed(0) : String(+v.toFixed(1)));
export const percent = (v) => `${(100 * v).toFixed(v < 0.1 ? 1 : 0)}%`;
export const seconds = (v) => (v >= 1 ? `${+v.toPrecision(3)} s` : `${+(v * 1000).toPrecision(3)} ms`);

export const CHARTS = [
  ["Tokens a second", count, [["out", rate("tokens_out")], ["in", rate("tokens_in")]]],
  ["Requests", count, [["running", (b) => b.running], ["waiting", (b) => b.waiting]]],
  ["Cache", percent, [["KV pages in use", (b) => share(b.pages)], ["states kept", (b) => share(b.states)],
    ["prefix hits", (b) => (b.queries ? b.hits / b.queries : null)]], 1],
  ["Time to first token", seconds, latencies("ttft")],
  ["Time between tokens (ITL)", seconds, latencies("itl")],
  ["Time per output token (TPOT)", seconds, latencies("tpot")],
  ["Drafts accepted, by position", percent, positions, 1],
  ["Time of a step", seconds, [["decode", step(0)], ["prefill", step(1)], ["both", step(2)]]],
  ["Host-bound share of the steps' time", percent, ["decode", "prefill", "both"].map((name, at) => (
    [name, (b) => (b.steps[at * 3 + 1] ? b.steps[at * 3 + 2] / b.steps[at * 3 + 1] : null)])), 1, true],
  ["Power", (v) => `${count(v)} W`, [["all GPUs", (b) => b.power || null]]],
  ["Clock", (v) => `${count(v)} MHz`, [["GPU", (b) => b.clock || null]]],
  ["Requests a second", count, [["ended", rate("ended")], ["failed", rate("failed")]]],
];

// Points of the last `range` seconds; a stretch without samples is a gap.
export function bins(samples, range) {
  const width = BIN[range], found = new Map();
  const last = samples.length ? samples[samples.length - 1].at : Math.floor(Date.now() / 1000);
  const first = Math.floor((last - range) / width);
  for (const sample of samples) {
    const at = Math.floor(sample.at / width);
    if (at > first) { if (!found.has(at)) found.set(at, []); found.get(at).push(sample); }
  }
  const times = [], whole = [];
  for (let at = first + 1; at <= Math.floor(last / width); at += 1) {
    times.push((at + 1) * width);
    whole.push(found.has(at) ? together(found.get(at)) : null);
  }
  return { times, whole };
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export class Chart {
  // highest: of the scale; needed: it is hidden while all values are 0.
  constructor(place, [title, format, series, highest, needed]) {
    Object.assign(this, { title, format, series, highest, needed });
    this.figure = document.createElement("figure");
    this.figure.innerHTML = "<h3></h3><figcaption></figcaption><div aria-hidden='true'></div>";
    this.figure.querySelector("h3").textContent = title;
    this.caption = this.figure.querySelector("figcaption");
    this.area = this.figure.querySelector("div");
    this.plot = null;
    place.append(this.figure);
    new ResizeObserver(() => this.fit()).observe(this.area);
  }

  fit() {
    if (this.plot && this.area.clientWidth) this.plot.setSize({ width: this.area.clientWidth, height: 170 });
  }

  draw({ times, whole }) {
    const columns = this.series.map(([, read]) => whole.map((bin) => (bin ? read(bin) : null)));
    this.shown = this.series.map(([name], at) => ({ name, at, values: columns[at] }))
      .filter(({ values }) => values.some((v) => v !== null));
    const any = this.shown.some(({ values }) => values.some((v) => v)) || !this.needed;
    this.figure.hidden = !this.shown.length || !any;
    if (this.figure.hidden) return;
    const names = this.shown.map((one) => one.name).join();
    if (!this.plot || this.names !== names) this.make(names);
    this.plot.setData([times, ...this.shown.map((one) => one.values)]);
    this.tell(null);
  }

  make(names) {
    this.names = names;
    if (this.plot) this.plot.destroy();
    this.caption.replaceChildren(...this.shown.map(({ at }) => {
      const key = document.createElement("span");
      key.className = `k${at}`;
      key.append(document.createElement("i"), document.createElement("b"));
      return key;
    }));
    const axis = { stroke: () => css("--faint"), grid: { stroke: () => css("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
    this.plot = new uPlot({
      width: this.area.clientWidth || 400, height: 170, legend: { show: false },
      cursor: { y: false, sync: { key: "time" }, drag: { setScale: false, x: false } },
      scales: { y: { range: (_, low, high) => [0, this.highest || Math.max(high * 1.08, 1e-6)] } },
      axes: [{ ...axis, size: 24, space: 62, incrs: STEPS,
        values: (_, ticks, at, space, step) => ticks.map((t) => (step < 60 ? clock(t) : clock(t).slice(0, 5))) },
        { ...axis, size: 72, values: (_, ticks) => ticks.map((v) => this.format(v)) }],
      series: [{}, ...this.shown.map(({ at }) => ({
        stroke: () => css(COLOURS[at]), width: 2, dash: DASHES[at], spanGaps: false, points: { show: false } }))],
      hooks: { draw: [drawEvents], setCursor: [(plot) => this.tell(plot.cursor.idx)] },
    }, [[], ...this.shown.map(() => [])], this.area);
    this.fit();
  }

  // The value of each series in words: at the cursor, else the newest.
  tell(index) {
    this.shown.forEach(({ name, values }, at) => {
      let v = index === null || index === undefined ? null : values[index];
      if (index === null || index === undefined) {
        for (let i = values.length - 1; i >= 0 && v === null; i -= 1) v = values[i];
      }
      this.caption.children[at].lastChild.textContent = `${name} ${v === null ? "–" : this.format(v)}`;
    });
  }

  rows() {
    if (this.figure.hidden) return [];
    return this.shown.map(({ name, values }) => {
      const known = values.filter((v) => v !== null);
      const mean = known.reduce((a, b) => a + b, 0) / known.length;
      const figures = [known[known.length - 1], Math.min(...known), mean, Math.max(...known)];
      return [`${this.title}: ${name}`, ...figures.map(this.format)];
    });
  }
}

export const clock = (at) => new Date(at * 1000).toLocaleTimeString("en-GB");
export const TROUBLE = new Set(["down", "ended", "killed", "removed"]);

function drawEvents(plot) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.lineWidth = 2;
  ctx.setLineDash([4, 3]);
  for (const event of store.events) {
    const x = plot.valToPos(event.at, "x", true);
    if (x < bbox.left || x > bbox.left + bbox.width || event.kind === "added") continue;
    ctx.strokeStyle = css(TROUBLE.has(event.kind) ? "--bad" : event.kind === "up" ? "--good" : "--warn");
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}

// The spread of latencies, as bars by bucket.
export function drawSpread(place, whole) {
  const names = { ttft: "Time to first token", itl: "Time between tokens", tpot: "Time per output token" };
  place.replaceChildren(...Object.entries(names).map(([name, title]) => {
    const bounds = store.about.bounds[name], counts = whole ? whole[name] : [];
    const figure = document.createElement("figure");
    figure.innerHTML = "<h3></h3><figcaption></figcaption><div class='bars' aria-hidden='true'></div><div class='ends' aria-hidden='true'><span></span><span></span></div>";
    figure.querySelector("h3").textContent = title;
    const used = Object.keys(counts).map(Number);
    const caption = figure.querySelector("figcaption");
    if (!used.length) { caption.textContent = "no request in this time"; return figure; }
    const first = Math.min(...used), last = Math.max(...used);
    const top = Math.max(...used.map((at) => counts[at]));
    let total = 0;
    for (let at = first; at <= last; at += 1) {
      const n = counts[at] || 0, bar = document.createElement("div");
      total += n;
      bar.style.height = `${(100 * n) / top}%`;
      figure.querySelector(".bars").append(bar);
    }
    const at = (p) => seconds(percentile(counts, bounds, p));
    caption.textContent = `${count(total)} values; p50 ${at(0.5)}, p90 ${at(0.9)}, p99 ${at(0.99)}`;
    const [low, high] = figure.querySelectorAll(".ends span");
    low.textContent = first ? seconds(bounds[first - 1]) : "0";
    high.textContent = last < bounds.length ? seconds(bounds[last]) : `above ${seconds(bounds[last - 1])}`;
    return figure;
  }));
}
