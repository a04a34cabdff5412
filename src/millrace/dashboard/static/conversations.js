// Hits of the prefix cache by conversation: of the requests of the viewer's own key, as
// /cache/explain lists them. It shows figures and names, and no text of anyone.
import { count, percent } from "./charts.js";
import { cachedRequests } from "./data.js";

const EVERY = 10; // seconds
const ROWS = 12;
const COLUMNS = [
  ["conversation", (c) => c.name || "short prompts"],
  ["requests", (c) => count(c.requests)],
  ["prompt tokens", (c) => count(c.tokens)],
  ["cached", (c) => percent(c.cached / c.tokens)],
  ["computed again", (c) => count(c.again)],
  ["lower tiers", (c) => [...c.tiers].join(", ")],
];

// Requests -> conversations, those that computed most tokens which were known before first.
export function conversations(requests) {
  const found = new Map();
  for (const one of requests) {
    const name = one.conversation.slice(0, 8);
    const sum = found.get(name) || { name, requests: 0, tokens: 0, cached: 0, again: 0, tiers: new Set() };
    sum.requests += 1;
    sum.tokens += one.prompt_tokens;
    sum.cached += one.cached_tokens;
    sum.again += Math.max(0, one.known_tokens - one.cached_tokens);
    Object.keys(one.tiers).forEach((tier) => sum.tiers.add(tier));
    found.set(name, sum);
  }
  return [...found.values()].sort((a, b) => b.again - a.again || b.tokens - a.tokens);
}

export class Conversations {
  constructor(place) {
    this.place = place;
    this.asked = 0;
    const head = document.createElement("tr");
    head.append(...COLUMNS.map(([text]) => Object.assign(document.createElement("th"), { scope: "col", textContent: text })));
    place.querySelector("thead").append(head);
  }

  // Asks again when it is time. A gateway answers for all of its replicas.
  async draw() {
    if (Date.now() - this.asked < EVERY * 1000) return;
    this.asked = Date.now();
    const rows = conversations(await cachedRequests().catch(() => []));
    this.place.hidden = !rows.length;
    this.place.querySelector("tbody").replaceChildren(...rows.slice(0, ROWS).map((row) => {
      const line = document.createElement("tr");
      line.append(...COLUMNS.map(([, text]) => Object.assign(document.createElement("td"), { textContent: text(row) })));
      return line;
    }));
    const more = rows.length - ROWS;
    this.place.querySelector("p").textContent = more > 0 ? `and ${more} more` : "";
  }
}
