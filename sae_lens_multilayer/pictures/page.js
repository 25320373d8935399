"use strict";

const figures = JSON.parse(document.getElementById("figure-data").textContent);
const data = JSON.parse(document.getElementById("latent-data").textContent);
const options = { responsive: true, displaylogo: false };
const MOST_LISTED = 200;

function element(tag, text, properties) {
  const made = Object.assign(document.createElement(tag), properties || {});
  if (text !== undefined) made.textContent = text;
  return made;
}

function visible(text) {
  return text.replace(/\n/g, "↵").replace(/\t/g, "⇥");
}

/* Figures are drawn when they come near, as there may be many. */
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    observer.unobserve(target);
    const figure = figures[target.dataset.figure];
    Plotly.newPlot(target, figure.data, figure.layout, options);
  }
}, { rootMargin: "600px" });
document.querySelectorAll(".figure").forEach((div) => observer.observe(div));

function ownTexts(latent) {
  const texts = latent.examples.map((e) => data.texts[e.ids[e.own]]);
  return [...new Set(texts)];
}

function matches(latent, query) {
  if (/^\d+$/.test(query) && latent.id === Number(query)) return true;
  return ownTexts(latent).some((t) => t.toLowerCase().includes(query.toLowerCase()));
}

function search() {
  const query = document.getElementById("query").value.trim();
  const found = data.latents.filter((l) => query === "" || matches(l, query));
  // A number is first of all the latent of that number.
  found.sort((a, b) => (String(b.id) === query) - (String(a.id) === query));
  const list = document.getElementById("list");
  list.replaceChildren(...found.slice(0, MOST_LISTED).map(listed));
  const shown = Math.min(found.length, MOST_LISTED);
  const of = shown < found.length ? ` (the first ${shown} are listed)` : "";
  document.getElementById("found").textContent =
    `${found.length} of ${data.latents.length} latents${of}`;
  return found;
}

function listed(latent) {
  const button = element("button", `${latent.id}`, { type: "button" });
  button.dataset.latent = latent.id;
  const texts = ownTexts(latent).map((t) => visible(t)).join(" | ");
  button.append(element("small", `mean layer ${latent.mean}: ${texts}`));
  button.addEventListener("click", () => show(latent));
  const item = element("li");
  item.append(button);
  return item;
}

function show(latent) {
  document.querySelectorAll("#list button").forEach((button) => {
    button.setAttribute("aria-current", button.dataset.latent === `${latent.id}`);
  });
  const facts = element("dl", undefined, { className: "latent-facts" });
  for (const [name, value] of [
    ["mean layer", latent.mean], ["standard deviation", latent.std],
    ["activations", latent.count], ["their sum", latent.total],
  ]) {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", `${value}`));
    facts.append(pair);
  }
  const chart = element("div", undefined, { id: "latent-layers" });
  const parts = [element("h3", `Latent ${latent.id}`), facts, chart];
  if (latent.nearest.length) parts.push(nearest(latent));
  parts.push(element("h4", "Largest activations"));
  document.getElementById("latent").replaceChildren(
    ...parts, ...latent.examples.map((e) => example(e)));
  const bars = { type: "bar", x: data.layers, y: latent.probs };
  Plotly.newPlot(chart, [bars], {
    height: 270, margin: { l: 50, r: 10, t: 36, b: 40 },
    xaxis: { title: { text: "layer" }, type: "category" },
    yaxis: { title: { text: "P(layer | latent)" }, rangemode: "tozero" },
  }, options);
}

function nearest(latent) {
  const line = element("p", "Nearest unembeddings: ", { className: "tokens" });
  latent.nearest.forEach((id) => {
    line.append(element("code", visible(data.texts[id])), " ");
  });
  return line;
}

function example(one) {
  const box = element("div", undefined, { className: "example" });
  box.append(element("small", `activation ${one.act} at layer ` +
    `${data.layers[one.layer]}, prompt ${one.prompt}, position ${one.position}`));
  const code = element("code");
  one.ids.forEach((id, i) => {
    const span = element("span", visible(data.texts[id]), { title: `${one.acts[i]}` });
    if (one.acts[i] > 0) {
      const share = Math.min(1, one.acts[i] / one.act);
      span.style.backgroundColor = `rgba(255, 140, 0, ${0.15 + 0.6 * share})`;
    }
    if (i === one.own) span.className = "own";
    code.append(span);
  });
  box.append(code);
  return box;
}

document.getElementById("query").addEventListener("input", search);
document.getElementById("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const found = search();
  if (found.length) show(found[0]);
});
const all = search();
if (all.length) show(all[0]);
