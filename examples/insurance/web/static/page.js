// The page: who is logged in, questions, and answers as they come. Texts are set as text, never as
// HTML, so that nothing in a document or an answer can be a part of the page.

const at = (selector, root = document) => root.querySelector(selector);
const TITLES = { yes: "Covered", no: "Not covered", unclear: "Unclear", "not stated": "Not in your policy" };
let me = null;

async function send(path, body) {
  const headers = { "content-type": "application/json", "x-csrf-token": me?.csrf ?? "" };
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body) });
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

async function guarded(work) {
  at("#problem").textContent = "";
  try { await work(); } catch (error) { at("#problem").textContent = error.message; }
}

async function show() {
  const response = await fetch("/me");
  me = response.ok ? await response.json() : null;
  at("#door").hidden = Boolean(me);
  at("#desk").hidden = at("#log-out").hidden = !me;
  at("#which").hidden = me?.role !== "operator";
  at("#who").textContent = me ? me.policy || "Operator" : "";
  at(me ? "#ask [name=question]" : "#customer input").focus();
}

function onSubmit(selector, work) {
  at(selector).addEventListener("submit", (event) => {
    event.preventDefault();
    guarded(() => work(Object.fromEntries(new FormData(event.target)), event.target));
  });
}

const money = (sum) => `EUR ${sum.toLocaleString("en")}`;

// What of a JSON text that is still being written can be said already.
function partial(text) {
  const covered = /"covered": ?"([a-z ]+)"/.exec(text)?.[1];
  const words = /"answer": ?"((?:[^"\\]|\\.)*)/.exec(text)?.[1] ?? "";
  return { covered, words };
}

class Card {
  constructor(question) {
    this.root = at("#card").content.cloneNode(true).firstElementChild;
    this.question = question;
    this.text = "";
    this.sources = [];
    at("h2", this.root).textContent = question;
    at(".decision", this.root).textContent = "…";
    at("#answers").prepend(this.root);
  }

  take(event) {
    if (event.sources) this.look(event.sources);
    if (event.delta) { this.text += event.delta; this.say(partial(this.text)); }
    if (event.decision) this.decide(event.decision);
    if (event.tool) at(".words", this.root).textContent = `${event.tool.name} …`;
    if (event.said) { at(".decision", this.root).textContent = ""; this.say({ words: event.said }); }
    if (event.error) { at(".decision", this.root).textContent = ""; this.say({ words: event.error }); }
    if (event.figures) figures(event.figures);
  }

  look(sources) {
    this.sources = sources;
    at("details", this.root).hidden = !sources.length;
    for (const source of sources) {
      const item = document.createElement("li");
      item.textContent = `${source.label} ${source.text}`;
      at("ul", this.root).append(item);
    }
  }

  say({ covered, words }) {
    if (covered) {
      at(".decision", this.root).textContent = TITLES[covered];
      at(".decision", this.root).className = `decision ${covered.replace(" ", "-")}`;
    }
    at(".words", this.root).textContent = words;
  }

  decide(decision) {
    this.say({ covered: decision.covered, words: decision.answer });
    const source = this.sources.find((one) => one.label === decision.clause);
    at("blockquote", this.root).hidden = !source;
    if (source) {
      at("blockquote p", this.root).textContent = source.text;
      const link = at("blockquote a", this.root);
      link.textContent = `Clause ${source.label}`;
      link.addEventListener("click", (event) => { event.preventDefault(); guarded(() => read(source)); });
    }
    for (const name of ["amount", "deductible"]) {
      if (decision[name] === null) continue;
      const pair = document.createElement("div");
      pair.append(document.createElement("dt"), document.createElement("dd"));
      pair.firstChild.textContent = name === "amount" ? "Up to" : "Deductible";
      pair.lastChild.textContent = money(decision[name]);
      at("dl", this.root).append(pair);
    }
    at(".feedback", this.root).hidden = false;
    at(".feedback", this.root).addEventListener("click", (event) => guarded(async () => {
      if (event.target.tagName !== "BUTTON") return;
      const useful = event.target.textContent === "Yes";
      await send("/feedback", { question: this.question, verdict: decision.covered, useful });
      at(".feedback", this.root).textContent = "Thank you.";
    }), { once: true });
  }
}

async function read(source) {
  const response = await fetch(`/document/${encodeURIComponent(source.id.split("#")[0])}`);
  if (!response.ok) throw new Error((await response.json()).error);
  const found = await response.json();
  const paper = at("#paper");
  paper.replaceChildren(Object.assign(document.createElement("h2"), { textContent: found.name }));
  for (const clause of found.clauses) {
    const line = document.createElement("p");
    line.textContent = `${clause.label} ${clause.text}`;
    if (clause.label === source.label) line.append(" ←");
    paper.append(line);
  }
  paper.hidden = false;
  paper.scrollIntoView({ behavior: "smooth" });
}

async function figures(last) {
  const found = await (await fetch("/figures")).json();
  const speed = last.tokens / Math.max(last.seconds - last.ttft, 0.001);
  const parts = [
    `first token ${Math.round(last.ttft * 1000)} ms`,
    `${Math.round(speed)} tok/s`,
    `${last.cached_tokens} of ${last.prompt_tokens} prompt tokens from the prefix cache`,
  ];
  if (found.accepted !== null) parts.push(`${Math.round(found.accepted * 100)}% of drafts accepted`);
  at("#figures").textContent = parts.join(" · ");
}

async function ask({ question, policy }, form) {
  const button = at("button", form);
  button.disabled = true;
  try {
    const response = await send("/ask", me.role === "operator" ? { question, policy } : { question });
    const card = new Card(question);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      lines.forEach((line) => card.take(JSON.parse(line)));
    }
  } finally { button.disabled = false; }
}

for (const door of ["#customer", "#operator"]) {
  onSubmit(door, async (fields, form) => { await send("/log-in", fields); form.reset(); await show(); });
}
onSubmit("#ask", ask);
at("#log-out").addEventListener("click", () => guarded(async () => {
  await send("/log-out", {});
  location.reload();
}));
show();
