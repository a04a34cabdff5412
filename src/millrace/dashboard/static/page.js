// The live page: it joins the stream, the charts, the replicas and the controls.
import { CHARTS, Chart, TROUBLE, bins, clock, count, drawSpread, percent, seconds } from "./charts.js";
import { follow, percentile, replicaHistory, share, store, together } from "./data.js";
import { Conversations } from "./conversations.js";
import { Replicas } from "./replicas.js";

const $ = (id) => document.getElementById(id);
const HISTORY_EVERY = 5; // seconds of one sample of a single replica's history

let range = 300, paused = false, chosen = null, drawnEvent = 0, asked = 0;
const charts = [];
const replicas = new Replicas($("replicas"), (id) => choose(id === chosen ? null : id));

const conversations = new Conversations($("conversations"));

const TILES = [
  ["tokens/s out", (b) => count(b.tokens_out / b.seconds)],
  ["tokens/s in", (b) => count(b.tokens_in / b.seconds)],
  ["running", (b) => count(b.running)], ["waiting", (b) => count(b.waiting)],
  ["KV in use", (b) => (b.pages[1] ? percent(share(b.pages)) : null)],
  ["states kept", (b) => (b.states[1] ? percent(share(b.states)) : null)],
  ["prefix hits", (b) => (b.queries ? percent(b.hits / b.queries) : null)],
  ["acceptance length", (b) => (b.drafts ? (1 + b.accepted.reduce((x, y) => x + y, 0) / b.drafts).toFixed(2) : null)],
  ["TTFT p50", (b) => late(b, "ttft", 0.5)], ["TTFT p99", (b) => late(b, "ttft", 0.99)],
  ["ITL p50", (b) => late(b, "itl", 0.5)], ["TPOT p50", (b) => late(b, "tpot", 0.5)],
  ["power", (b) => (b.power ? `${count(b.power)} W` : null)],
];

function late(bin, name, p) {
  const found = percentile(bin[name], store.about.bounds[name], p);
  return found === null ? null : seconds(found);
}

function shown() {
  return chosen === null ? store.samples : store.one;
}

function draw() {
  if (paused || !store.about) return;
  $("name").textContent = store.about.name || "";
  document.title = `${store.about.name || "Millrace"} – live`;
  drawScope();
  replicas.draw(chosen);
  const samples = shown(), latest = samples.slice(chosen === null ? -10 : -2);
  const now = latest.length ? together(latest) : null;
  TILES.forEach(([name, read], at) => {
    const place = $("tiles").children[at], value = now && read(now);
    place.lastChild.textContent = value === null ? "–" : value;
  });
  const found = bins(samples, range), known = found.whole.filter(Boolean);
  charts.forEach((chart) => chart.draw(found));
  drawSpread($("spread"), known.length ? sum(known) : null);
  drawEvents();
  conversations.draw();
  if ($("figures").open) drawFigures();
}

function sum(wholes) {
  const total = { ttft: [], itl: [], tpot: [] };
  for (const whole of wholes) {
    for (const name of Object.keys(total)) {
      whole[name].forEach((n, at) => { total[name][at] = (total[name][at] || 0) + n; });
    }
  }
  return total;
}

function drawScope() {
  const select = $("scope"), wanted = store.replicas.map((r) => `${r.id} ${r.name}`).join();
  select.closest("label").hidden = store.about.kind === "server";
  if (select.dataset.wanted === wanted) return;
  select.dataset.wanted = wanted;
  const options = store.replicas.map((r) => new Option(`replica ${r.name}`, r.id));
  select.replaceChildren(new Option("all replicas", ""), ...options);
  select.value = chosen === null ? "" : chosen;
}

function drawEvents() {
  const list = $("events");
  if (store.events.length && drawnEvent > store.events[store.events.length - 1].number) {
    list.replaceChildren();
    drawnEvent = 0;
  }
  for (const event of store.events) {
    if (event.number <= drawnEvent || event.kind === "added") continue;
    drawnEvent = event.number;
    const line = document.createElement("li"), time = document.createElement("time");
    time.textContent = clock(event.at);
    const who = event.replica ? `replica ${event.replica} ` : "";
    line.append(time, `${who}${event.kind}${event.text ? `: ${event.text}` : ""}`);
    line.className = TROUBLE.has(event.kind) ? "trouble" : event.kind === "up" ? "fine" : "";
    list.prepend(line);
  }
  while (list.children.length > 200) list.lastChild.remove();
}

function drawFigures() {
  $("figures").querySelector("tbody").replaceChildren(...charts.flatMap((c) => c.rows()).map((cells) => {
    const line = document.createElement("tr");
    line.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
    return line;
  }));
}

async function choose(id) {
  chosen = id;
  store.one = [];
  $("scope").value = id === null ? "" : id;
  await readOne(true);
  draw();
}

async function readOne(now) {
  if (chosen === null || (!now && Date.now() - asked < HISTORY_EVERY * 1000)) return;
  asked = Date.now();
  const samples = await replicaHistory(chosen).catch(() => []);
  store.one = samples.map((s) => ({ ...s, every: HISTORY_EVERY }));
}

function status(word, text) {
  $("status").className = word;
  $("keyform").hidden = word !== "key";
  if (word !== "key") {
    if ($("status").textContent !== text) $("status").textContent = text;
    return undefined;
  }
  $("status").textContent = "a key is needed";
  $("keyproblem").textContent = text;
  $("key").focus();
  return new Promise((done) => {
    $("keyform").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem("millrace-key", $("key").value);
      done();
    };
  });
}

function theme(dark) {
  document.documentElement.classList.toggle("dark", dark);
  $("theme").textContent = dark ? "Light" : "Dark";
  try { localStorage.setItem("millrace-theme", dark ? "dark" : "light"); } catch { /* not kept */ }
  charts.forEach((chart) => chart.plot && chart.plot.redraw());
}

function setPaused(value) {
  paused = value;
  $("pause").setAttribute("aria-pressed", String(value));
  $("pause").textContent = value ? "Go on" : "Pause";
  draw();
}

function setRange(value) {
  range = value;
  document.querySelector(`input[name=range][value="${value}"]`).checked = true;
  draw();
}

function keys(event) {
  if (event.target.matches("input[type=password], select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const ranges = { 1: 60, 2: 300, 3: 900, 4: 3600 };
  if (event.key in ranges) setRange(ranges[event.key]);
  else if (event.key === "p") setPaused(!paused);
  else if (event.key === "t") theme(!document.documentElement.classList.contains("dark"));
  else if (event.key === "Escape") choose(null);
}

function start() {
  const wanted = new URLSearchParams(location.search);
  for (const [name] of TILES) {
    const tile = document.createElement("div");
    tile.append(Object.assign(document.createElement("dt"), { textContent: name }), Object.assign(document.createElement("dd"), { textContent: "–" }));
    $("tiles").append(tile);
  }
  charts.push(...CHARTS.map((spec) => new Chart($("charts"), spec)));
  let kept = null;
  try { kept = localStorage.getItem("millrace-theme"); } catch { /* not kept */ }
  const choice = wanted.get("theme") || kept;
  theme(choice ? choice === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  if (["60", "300", "900", "3600"].includes(wanted.get("range"))) setRange(Number(wanted.get("range")));
  $("ranges").addEventListener("change", (event) => setRange(Number(event.target.value)));
  $("scope").addEventListener("change", (event) => choose(event.target.value === "" ? null : Number(event.target.value)));
  $("colour").addEventListener("change", () => draw());
  $("pause").addEventListener("click", () => setPaused(!paused));
  $("theme").addEventListener("click", () => theme(!document.documentElement.classList.contains("dark")));
  $("figures").addEventListener("toggle", () => draw());
  document.addEventListener("keydown", keys);
  follow(() => { if (!document.hidden) { readOne(false); draw(); } }, status);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) draw(); });
}

start();
