// The theme of the small pages, and the list of endpoints on one of them.

const dark = (() => {
  try { return localStorage.getItem("millrace-theme"); } catch { return null; }
})() || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.documentElement.classList.toggle("dark", dark === "dark");

async function list(body) {
  const answer = await fetch("openapi.json");
  if (!answer.ok) throw new Error(`openapi.json: the server says ${answer.status}`);
  const { paths } = await answer.json();
  for (const [path, methods] of Object.entries(paths)) {
    for (const [method, { summary }] of Object.entries(methods)) {
      const line = document.createElement("tr");
      for (const text of [path, method.toUpperCase(), summary]) {
        line.append(Object.assign(document.createElement("td"), { textContent: text, className: "text" }));
      }
      body.append(line);
    }
  }
}

const body = document.getElementById("endpoints");
if (body) list(body).catch((error) => { document.getElementById("problem").textContent = error.message; });
