"use strict";

/* The view of one latent: a record of `LatentData.latents`. */

function showLatent(latent) {
  const place = placeOf.get(latent.id);
  const parts = [latentHead(latent), facts(latent, place), charts(latent)];
  if (latent.top) parts.push(outputs(latent));
  if (latent.similar) {
    parts.push(others("Similar decoder directions (cosine similarity)", latent.similar));
  }
  if (latent.coactive) {
    parts.push(others("Active for the same vectors (Jaccard index)", latent.coactive));
  }
  parts.push(examples("Largest activations", latent.examples));
  if (latent.samples.length) parts.push(...samples(latent.samples));
  byId("latent").replaceChildren(...parts);
  drawCharts(latent);
}

function latentHead(latent) {
  const line = element("div", undefined, { className: "latent-head" });
  const title = element("h3", `Latent ${latent.id}`);
  const link = element("a", "link", { href: `#latent=${latent.id}` });
  const [back, on] = [["← previous", -1], ["next →", 1]].map(([text, by]) => {
    const button = element("button", text, { type: "button" });
    button.title = by > 0 ? "Key: j" : "Key: k";
    button.addEventListener("click", () => step(by));
    return button;
  });
  line.append(title, link, back, on);
  return line;
}

function facts(latent, place) {
  const list = element("dl", undefined, { className: "latent-facts" });
  const { index, layers, n_tokens: nTokens } = head;
  const density = index.count[place] / (nTokens * layers.length);
  for (const [name, value] of [
    ["mean layer", index.mean[place]], ["standard deviation", index.std[place]],
    ["activations", index.count[place]], ["their sum", index.total[place]],
    ["density (all layers)", density],
  ]) {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", digits(value)));
    list.append(pair);
  }
  return list;
}

function charts(latent) {
  const box = element("div", undefined, { className: "two" });
  box.append(element("div", undefined, { id: "latent-layers" }));
  if (latent.histogram) box.append(element("div", undefined, { id: "latent-acts" }));
  return box;
}

function drawCharts(latent) {
  const layers = head.layers.map(plain);
  const margin = { l: 55, r: 50, t: 16, b: 40 };
  const xaxis = { title: { text: "layer" }, type: "category" };
  const frequency = latent.counts.map((count) => count / head.n_tokens);
  drawFigure(byId("latent-layers"), [
    { type: "bar", x: layers, y: latent.probs, name: "P(layer | latent)" },
    { type: "scatter", mode: "lines+markers", x: layers, y: frequency, yaxis: "y2",
      name: "share of tokens where it is active" },
  ], {
    height: 300, margin, xaxis, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
    yaxis: { title: { text: "P(layer | latent)" }, rangemode: "tozero" },
    yaxis2: { overlaying: "y", side: "right", rangemode: "tozero", showgrid: false,
      tickmode: "auto", nticks: 6, tickformat: ".2~p" },
  });
  if (!latent.histogram) return;
  const nBins = latent.histogram[0].length;
  const bins = Array.from({ length: nBins }, (_, bin) => bin);
  const nUsed = 1 + Math.max(...bins.filter((b) => latent.histogram.some((of) => of[b])));
  const counts = bins.map((bin) => latent.histogram.map((of) => of[bin] || null));
  drawFigure(byId("latent-acts"), [{
    type: "heatmap", x: layers, y: bins.map((bin) => (bin + 0.5) * latent.width),
    z: counts.map((row) => row.map((n) => n && Math.log10(n))), customdata: counts,
    colorscale: "Viridis", hoverongaps: false, zmin: 0,
    hovertemplate: "layer %{x}<br>activation about %{y:.4~g}<br>" +
      "%{customdata} activations<extra></extra>",
    colorbar: { title: { text: "activations", side: "right" }, thickness: 12,
      tickvals: [0, 1, 2, 3, 4, 5, 6], ticktext: ["1", "10", "100", "1k", "10k",
        "100k", "1M"] },
  }], {
    height: 300, margin: { ...margin, r: 10 }, xaxis,
    yaxis: { title: { text: "activation" }, range: [0, nUsed * latent.width] },
  });
}

/* Top and bottom output tokens; with a lens, one of several rows is chosen. */
function outputs(latent) {
  const box = element("section", undefined, { id: "latent-outputs" });
  const title = element("div", undefined, { className: "row" });
  title.append(element("h4", "Output tokens of the decoder direction (logits)"));
  const columns = element("div", undefined, { className: "two" });
  const fill = (row) => columns.replaceChildren(
    tokenList("Top", latent.top[row]), tokenList("Bottom", latent.bottom[row]));
  if (head.outputs.length > 1) {
    const names = head.outputs.map((name) =>
      name === "decoder" ? "through the lens" : `layer ${name}, without the lens`);
    const select = element("select", undefined, { ariaLabel: "row of output tokens" });
    select.append(...names.map((name, i) => element("option", name, { value: i })));
    select.addEventListener("change", () => fill(Number(select.value)));
    title.append(select);
  }
  fill(0);
  box.append(title, columns);
  return box;
}

function tokenList(name, pairs) {
  const line = element("div", `${name}: `, { className: "tokens" });
  for (const [id, logit] of pairs) {
    const one = element("span");
    one.append(tokenText(head.texts[id]), element("small", ` ${logit.toFixed(2)}`));
    line.append(one, " ");
  }
  return line;
}

function others(title, pairs) {
  const box = element("section");
  const line = element("div", undefined, { className: "others" });
  for (const [id, value] of pairs) {
    const text = `${id}: ${value.toFixed(3)}`;
    const known = placeOf.has(id);
    line.append(known ? element("a", text, { href: `#latent=${id}` })
      : element("span", text, { className: "quiet", title: "not in this page" }));
  }
  box.append(element("h4", title), pairs.length ? line : element("p", "none"));
  return box;
}

function examples(title, some) {
  const box = element("section");
  box.append(element("h4", title), ...some.map((one) => example(one, some[0].act)));
  return box;
}

/* A sample from the whole range of activations, in parts of equal size. */
function samples(some) {
  const nParts = 5;
  const parts = Array.from({ length: nParts }, (_, i) =>
    some.filter((one) => Math.floor(one.above * nParts) === i));
  const largest = Math.max(...some.map((one) => one.act));
  return parts.map((part, i) => {
    const box = element("section", undefined, { className: "quantile" });
    const [low, high] = [100 - (i + 1) * 20, 100 - i * 20];
    box.append(element("h4", `Sample from the ${low} to ${high} % quantile`),
      ...part.map((one) => example(one, largest)));
    return box;
  }).filter((box) => box.querySelector(".example"));
}

function example(one, largest) {
  const box = element("div", undefined, { className: "example" });
  box.append(element("small", `activation ${digits(one.act)} at layer ` +
    `${head.layers[one.layer]}, prompt ${one.prompt}, position ${one.position}`));
  const code = element("code");
  const acts = new Map(one.acts);
  one.ids.forEach((id, i) => {
    const act = acts.get(i) || 0;
    const span = tokenText(head.texts[id], { title: digits(act) });
    span.style.backgroundColor = marked(act / largest);
    if (i === one.own) span.classList.add("own");
    code.append(span);
  });
  box.append(code, strip(one.layer_acts, largest));
  // Only the served page can run the model.
  if (typeof showPrompt === "function") box.append(promptButton(shown, one));
  return box;
}

function promptButton(latent, one) {
  const button = element("button", "whole prompt, all layers", { type: "button" });
  button.addEventListener("click", () => showPrompt(latent, one));
  return button;
}

/* Activations of the latent at all layers, at one token. */
function strip(pairs, largest) {
  const acts = new Map(pairs);
  const line = element("div", undefined, { className: "strip" });
  line.setAttribute("role", "img");
  line.setAttribute("aria-label", "activation at each layer: " + pairs.map(
    ([layer, act]) => `${head.layers[layer]}: ${digits(act)}`).join(", "));
  head.layers.forEach((label, layer) => {
    const act = acts.get(layer) || 0;
    const cell = element("i", undefined, { title: `layer ${label}: ${digits(act)}` });
    cell.style.backgroundColor = marked(act / largest);
    line.append(cell);
  });
  return line;
}
