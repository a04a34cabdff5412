// The stream of samples, and what is computed from them. It draws nothing.

const HOUR = 3600;
const OPEN_AGAIN = [1000, 2000, 5000, 10000]; // ms between two attempts

export const store = { about: null, samples: [], events: [], replicas: [], one: [] };

export function decode(row) {
  const sample = {};
  store.about.fields.forEach((name, index) => { sample[name] = row[index]; });
  return sample;
}

function headers() {
  const key = sessionStorage.getItem("millrace-key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

export async function replicaHistory(id) {
  const answer = await fetch(`dashboard/replica?id=${id}`, { headers: headers() });
  if (!answer.ok) return [];
  return (await answer.json()).map(decode);
}

// The latest requests of this key, with what the prefix cache had of each.
export async function cachedRequests() {
  const answer = await fetch("cache/explain", { headers: headers(), cache: "no-store" });
  return answer.ok ? (await answer.json()).requests : [];
}

// Follows the stream for ever. changed(): there is more. status(word, text): live, lost or key.
export async function follow(changed, status) {
  let id = "", failures = 0;
  for (;;) {
    try {
      const answer = await fetch("dashboard/events", {
        headers: { ...headers(), ...(id ? { "Last-Event-ID": id } : {}) }, cache: "no-store",
      });
      if (answer.status === 401 || answer.status === 403) {
        await status("key", sessionStorage.getItem("millrace-key") ? "This key is not accepted." : "");
        continue;
      }
      if (!answer.ok) throw new Error(`the server says ${answer.status}`);
      for await (const event of events(answer.body)) {
        failures = 0;
        id = event.id;
        take(event);
        status("live", "live");
        changed();
      }
      throw new Error("the stream ended");
    } catch (error) {
      const wait = OPEN_AGAIN[Math.min(failures, OPEN_AGAIN.length - 1)];
      failures += 1;
      status("lost", `${error.message}; trying again`);
      await new Promise((done) => setTimeout(done, wait));
    }
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const event = {};
      for (const line of text.slice(0, end).split("\n")) {
        const at = line.indexOf(": ");
        event[line.slice(0, at)] = line.slice(at + 2);
      }
      text = text.slice(end + 2);
      yield event;
    }
  }
}

function take(event) {
  const data = JSON.parse(event.data);
  if (event.event === "all") {
    store.about = data.about;
    store.samples = [];
    store.events = [];
  }
  store.samples.push(...data.samples.map(decode));
  store.samples.splice(0, Math.max(0, store.samples.length - HOUR));
  store.events.push(...data.events);
  store.events.splice(0, Math.max(0, store.events.length - 1000));
  takeRows(data, event.event === "all");
}

// Rows come when they have changed, and the ids of all replicas when these have.
function takeRows(data, all) {
  const rows = new Map(all ? [] : store.replicas.map((one) => [one.id, one]));
  for (const [id, name, state, reason, row] of data.replicas) {
    rows.set(id, { id, name, state, reason, sample: row && decode(row) });
  }
  const ids = data.ids || [...rows.keys()];
  store.replicas = ids.map((id) => rows.get(id)).filter(Boolean);
}

// --- figures of several samples ---------------------------------------------------------------

const LEVELS = new Set(["running", "waiting", "pages", "states", "power", "clock", "at"]);

// Samples of one stretch of time as one: counts are added up, levels are those at the end.
export function together(samples) {
  const whole = { ...samples[samples.length - 1], seconds: 0 };
  for (const name of Object.keys(whole)) {
    if (!LEVELS.has(name)) whole[name] = Array.isArray(whole[name]) ? [] : 0;
  }
  for (const sample of samples) {
    whole.seconds += sample.every || 1;
    for (const [name, value] of Object.entries(sample)) {
      if (LEVELS.has(name) || name === "every") continue;
      if (!Array.isArray(value)) whole[name] += value;
      else if (Array.isArray(value[0])) value.forEach(([at, n]) => {
        whole[name][at] = (whole[name][at] || 0) + n; // by bucket
      });
      else value.forEach((n, at) => { whole[name][at] = (whole[name][at] || 0) + n; });
    }
  }
  return whole;
}

export const share = ([used, all]) => (all ? used / all : null);

// A percentile from counts by bucket, between the bounds of its bucket by proportion; null if none.
export function percentile(counts, bounds, p) {
  let total = 0;
  counts.forEach((n) => { total += n; });
  if (!total) return null;
  let below = 0;
  for (let at = 0; at < counts.length; at += 1) {
    const n = counts[at] || 0;
    if (n && below + n >= p * total) {
      const low = at ? bounds[at - 1] : 0;
      const high = at < bounds.length ? bounds[at] : low;
      return low + (high - low) * ((p * total - below) / n);
    }
    below += n;
  }
  return null;
}
