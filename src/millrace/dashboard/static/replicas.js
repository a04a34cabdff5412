// The replicas: a heat map that has the worst ones first, and a table of those.
import { count, percent } from "./charts.js";
import { share, store } from "./data.js";

const MANY = 60; // above so many, cells are small and have no text
const ROWS = 12; // of the table

const FIGURES = {
  kv: [(s) => share(s.pages) || 0, percent],
  waiting: [(s) => s.waiting, count],
  running: [(s) => s.running, count],
  out: [(s) => s.tokens_out, count],
};

const COLUMNS = [
  ["replica", (r) => r.name], ["state", (r) => (r.reason ? `${r.state}: ${r.reason}` : r.state)],
  ["running", (r) => r.sample && count(r.sample.running)],
  ["waiting", (r) => r.sample && count(r.sample.waiting)],
  ["KV", (r) => r.sample && percent(share(r.sample.pages) || 0)],
  ["tok/s out", (r) => r.sample && count(r.sample.tokens_out)],
  ["tok/s in", (r) => r.sample && count(r.sample.tokens_in)],
  ["prefix hits", (r) => r.sample && r.sample.queries && percent(r.sample.hits / r.sample.queries)],
];

// Worse ones are larger.
function badness(replica) {
  const state = { down: 4e9, draining: 2e9, loading: 3e9 }[replica.state] || 0;
  const s = replica.sample;
  return state + (s ? 1e4 * s.waiting + 1e3 * (share(s.pages) || 0) + s.running : 0);
}

export class Replicas {
  constructor(section, choose) {
    this.section = section;
    this.heat = section.querySelector("#heat");
    this.colour = section.querySelector("#colour");
    this.choose = choose;
    this.cells = new Map();
    this.heat.addEventListener("keydown", (event) => this.move(event));
    const head = document.createElement("tr");
    head.append(...COLUMNS.map(([name], at) => Object.assign(document.createElement("th"), { textContent: name, scope: "col", className: at < 2 ? "text" : "" })));
    section.querySelector("thead").append(head);
  }

  draw(chosen) {
    const rows = [...store.replicas].sort((a, b) => badness(b) - badness(a) || a.id - b.id);
    this.section.hidden = store.about.kind === "server";
    if (this.section.hidden) return;
    const states = {};
    rows.forEach((r) => { states[r.state] = (states[r.state] || 0) + 1; });
    this.section.querySelector("#summary").textContent =
      `${rows.length} in all: ${Object.entries(states).map(([s, n]) => `${n} ${s}`).join(", ")}; worst first`;
    this.drawHeat(rows, chosen);
    this.section.querySelector("tbody").replaceChildren(...rows.slice(0, ROWS).map((r) => {
      const line = document.createElement("tr");
      line.append(...COLUMNS.map(([, read], at) => Object.assign(document.createElement("td"), {
        textContent: read(r) || "–", className: at < 2 ? "text" : "" })));
      return line;
    }));
  }

  drawHeat(rows, chosen) {
    const [read, format] = FIGURES[this.colour.value];
    const small = rows.length > MANY;
    this.heat.classList.toggle("small", small);
    this.heat.style.setProperty("--cell", small ? "20px" : "150px");
    const top = this.colour.value === "kv" ? 1 : Math.max(1, ...rows.map((r) => (r.sample ? read(r.sample) : 0)));
    const focused = document.activeElement, gone = new Set(this.cells.keys());
    const order = rows.map((r) => {
      gone.delete(r.id);
      if (!this.cells.has(r.id)) this.cells.set(r.id, this.cell(r.id));
      const cell = this.cells.get(r.id), value = r.sample ? read(r.sample) : 0;
      const level = Math.min(4, Math.floor((5 * value) / top));
      const mark = { down: "×", draining: "–", loading: "…" }[r.state] || "";
      cell.className = r.state === "up" ? `l${level}` : r.state;
      cell.textContent = small ? mark : `${mark ? `${mark} ${r.name} ${r.state}` : `${r.name}  ${format(value)}`}`;
      const text = `replica ${r.name}, ${r.state}${r.reason ? `: ${r.reason}` : ""}, ${format(value)}`;
      cell.setAttribute("aria-label", text);
      cell.title = text;
      cell.setAttribute("aria-pressed", String(r.id === chosen));
      cell.tabIndex = -1;
      return cell;
    });
    gone.forEach((id) => { this.cells.get(id).remove(); this.cells.delete(id); });
    order.forEach((cell, at) => { if (this.heat.children[at] !== cell) this.heat.insertBefore(cell, this.heat.children[at] || null); });
    const inside = order.includes(focused) ? focused : order[0];
    if (inside) inside.tabIndex = 0;
    if (order.includes(focused)) focused.focus();
  }

  cell(id) {
    const cell = document.createElement("button");
    cell.addEventListener("click", () => this.choose(id));
    return cell;
  }

  move(event) {
    const cells = [...this.heat.children], at = cells.indexOf(document.activeElement);
    const wide = cells.filter((cell) => cell.offsetTop === cells[0].offsetTop).length;
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: wide, ArrowUp: -wide, Home: -at, End: cells.length - 1 - at }[event.key];
    if (by === undefined || at < 0) return;
    event.preventDefault();
    const next = cells[Math.max(0, Math.min(cells.length - 1, at + by))];
    cells[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}
