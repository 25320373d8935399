"use strict";

/* The reader's own text; jobs run on the server that serves this page. */

let acts = null;  // of the last text: tokens, and for each token its activations
let at = { token: 0, layer: 0, latent: null };
let job = null;

function state(text, bad = false) {
  byId("job").textContent = text;
  byId("job").classList.toggle("bad", bad);
}

function busy(is) {
  document.querySelectorAll("#text-form button, #edit-form button").forEach((button) => {
    button.disabled = button.id === "cancel" ? !is : is;
  });
  byId("progress").hidden = !is;
  byId("progress").removeAttribute("value");
}

async function send(path, method, body) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  const answer = await fetch(path, { method, headers, body: JSON.stringify(body) });
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error);
  return value;
}

/* Run a job to its end, and give its result; null if it was cancelled. */
async function runJob(request) {
  busy(true);
  state("running");
  try {
    job = await send("jobs", "POST", request);
    while (job.state === "running") {
      await new Promise((done) => setTimeout(done, 100));
      job = await send(`jobs/${job.id}`, "GET");
      Object.assign(byId("progress"), { max: job.total, value: job.done });
    }
    state(job.state === "failed" ? job.error : job.state, job.state === "failed");
    return job.state === "done" ? job.result : null;
  } catch (error) {
    state(error.message, true);
    return null;
  } finally {
    busy(false);
  }
}

/* Columns of activations as a map of each token's latents to their layers. */
function grouped(result) {
  const byToken = result.tokens.map(() => new Map());
  result.positions.forEach((position, i) => {
    const latents = byToken[position], latent = result.latents[i];
    if (!latents.has(latent)) latents.set(latent, new Array(head.layers.length).fill(0));
    latents.get(latent)[result.layers[i]] = result.acts[i];
  });
  return byToken;
}

async function showActs(event) {
  event.preventDefault();
  const result = await runJob({ kind: "activations", text: byId("text").value });
  if (result) drawActs(result, { token: result.tokens.length - 1, layer: 0, latent: null });
}

/* The prompt of an example: the latent at all its tokens and layers. */
async function showPrompt(latent, one) {
  byId("explore").scrollIntoView();
  const { prompt, position, layer } = one;
  const result = await runJob({ kind: "prompt", prompt, position });
  if (!result) return;
  byId("edit-latent").value = latent;
  drawActs(result, { token: position - result.first, layer, latent });
  byId("acts").scrollIntoView();
}

function drawActs(result, chosen) {
  acts = { tokens: result.tokens, byToken: grouped(result) };
  at = chosen;
  byId("acts").hidden = false;
  drawGrid();
  showCell();
}

function drawGrid() {
  const top = element("tr");
  top.append(element("th", "token"), ...head.layers.map((l) => element("th", visible(l))));
  const rows = acts.tokens.map((text, token) => {
    const row = element("tr"), name = element("th");
    name.append(tokenText(text));
    row.append(name, ...head.layers.map((_, layer) => {
      const cell = element("td");
      Object.assign(cell.dataset, { token, layer });
      return cell;
    }));
    return row;
  });
  const [thead, tbody] = [element("thead"), element("tbody")];
  thead.append(top);
  tbody.append(...rows);
  byId("grid").replaceChildren(thead, tbody);
  colourGrid();
}

function valueAt(token, layer) {
  const latents = acts.byToken[token];
  if (at.latent !== null) return (latents.get(at.latent) || [])[layer] || 0;
  return Math.max(0, ...[...latents.values()].map((of) => of[layer]));
}

function colourGrid() {
  const cells = [...document.querySelectorAll("#grid td")];
  const values = cells.map((c) => valueAt(Number(c.dataset.token), Number(c.dataset.layer)));
  const largest = Math.max(...values) || 1;
  cells.forEach((cell, i) => {
    cell.style.backgroundColor = marked(values[i] / largest);
    cell.title = digits(values[i]);
  });
}

/* The latents that are active at the chosen token, by activation at the layer. */
function showCell() {
  document.querySelectorAll("#grid .chosen").forEach((c) => c.classList.remove("chosen"));
  const cell = document.querySelector(
    `#grid td[data-token="${at.token}"][data-layer="${at.layer}"]`);
  cell.classList.add("chosen");
  cell.scrollIntoView({ block: "nearest", inline: "nearest" });
  const sum = (of) => of.reduce((a, b) => a + b, 0);
  const latents = [...acts.byToken[at.token]].sort(
    ([, a], [, b]) => b[at.layer] - a[at.layer] || sum(b) - sum(a));
  const title = element("h4", "Latents at ");
  title.append(tokenText(acts.tokens[at.token]),
    `, first those at layer ${visible(head.layers[at.layer])}`);
  const box = element("div", undefined, { className: "latents" });
  box.append(...latents.slice(0, 200).map(([latent, of]) => latentButton(latent, of)));
  const chart = element("div", undefined, { id: "token-layers" });
  byId("cell").replaceChildren(title, box, chart);
  if (at.latent !== null) drawTokenLayers(chart);
}

function latentButton(latent, of) {
  const button = element("button", `${latent}: ${digits(of[at.layer])}`, { type: "button" });
  button.dataset.latent = latent;
  button.setAttribute("aria-pressed", latent === at.latent);
  const largest = Math.max(...of);
  const pairs = of.map((act, layer) => [layer, act]).filter(([, act]) => act);
  button.append(strip(pairs, largest));
  button.addEventListener("click", () => {
    at.latent = latent === at.latent ? null : latent;
    byId("edit-latent").value = latent;
    colourGrid();
    showCell();
  });
  return button;
}

/* P(l | j, t) of the chosen latent j at the chosen token t. */
function drawTokenLayers(chart) {
  const of = acts.byToken[at.token].get(at.latent) || [];
  const total = of.reduce((a, b) => a + b, 0);
  const link = element("a", `Latent ${at.latent}`, { href: `#latent=${at.latent}` });
  chart.before(link, total ? "" : " is not active at this token");
  drawFigure(chart, [{ type: "bar", x: head.layers.map(plain),
    y: of.map((act) => act / total) }], {
    height: 240, margin: { l: 50, r: 10, t: 30, b: 40 },
    xaxis: { title: { text: "layer" }, type: "category" },
    yaxis: { title: { text: "P(layer | latent, token)" }, rangemode: "tozero" },
  });
}

function gridKeys(event) {
  const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1],
    ArrowRight: [0, 1] }[event.key];
  if (!by || !acts) return;
  event.preventDefault();
  const inside = (value, n) => Math.min(n - 1, Math.max(0, value));
  at.token = inside(at.token + by[0], acts.tokens.length);
  at.layer = inside(at.layer + by[1], head.layers.length);
  showCell();
}

async function continueText(event) {
  event.preventDefault();
  const number = (id) => Number(byId(id).value);
  const [first, last] = [number("edit-first"), number("edit-last")].sort((a, b) => a - b);
  const layers = Array.from({ length: last - first + 1 }, (_, i) => first + i);
  const result = await runJob({
    kind: "continue", text: byId("text").value, edit: byId("edit").value, layers,
    latent: number("edit-latent"), value: number("edit-value"), n_new: number("edit-n"),
  });
  if (!result) return;
  const nats = (value) => (value === null ? "none" : `${digits(value)} nats`);
  byId("continuations").replaceChildren(
    continuation("Unchanged", result.tokens, result.clean,
      `cross-entropy of the text: ${nats(result.ce_loss_clean)}`),
    continuation("Changed", result.tokens, result.edited,
      `cross-entropy of the text: ${nats(result.ce_loss_edited)}; KL divergence of the ` +
      `next token: ${nats(result.kl_div)}`));
}

function continuation(title, before, after, numbers) {
  const box = element("section", undefined, { className: "continuation" });
  const text = element("p");
  text.append(...before.map((one) => tokenText(one)),
    ...after.map((one) => tokenText(one, { className: "new" })));
  box.append(element("h4", title), text, element("small", numbers));
  return box;
}

ready.then(() => {
  for (const id of ["edit-first", "edit-last"]) {
    byId(id).append(...head.layers.map((label, layer) =>
      element("option", visible(label), { value: layer })));
    byId(id).value = Math.floor(head.layers.length / 2);
  }
  byId("text-form").addEventListener("submit", showActs);
  byId("edit-form").addEventListener("submit", continueText);
  byId("edit").addEventListener("change", () => {
    document.querySelectorAll(".of-latent").forEach((label) => {
      label.hidden = byId("edit").value === "reconstruct";
    });
  });
  byId("cancel").addEventListener("click", () => send(`jobs/${job.id}`, "DELETE"));
  byId("grid").addEventListener("keydown", gridKeys);
  byId("grid").addEventListener("click", (event) => {
    const cell = event.target.closest("td");
    if (!cell) return;
    at = { ...at, token: Number(cell.dataset.token), layer: Number(cell.dataset.layer) };
    showCell();
  });
});
