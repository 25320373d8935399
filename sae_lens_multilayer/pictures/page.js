"use strict";

/* Parts that all of the page uses: elements, texts, data and figures.
   Text from models and files is always set as text, never as markup. */

function element(tag, text, properties) {
  const made = Object.assign(document.createElement(tag), properties || {});
  if (text !== undefined) made.textContent = text;
  return made;
}

function byId(id) {
  return document.getElementById(id);
}

/* Line breaks, tabs and characters that are invisible or change the direction of
   text, as something to see. */
const SIGNS = { "\n": "↵", "\t": "⇥", "\r": "␍" };
function visible(text) {
  return text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (c) =>
    SIGNS[c] || `\\u{${c.codePointAt(0).toString(16)}}`);
}

function tokenText(text, properties) {
  const made = element("span", visible(text), properties);
  made.classList.add("token");
  return made;
}

/* Plotly reads markup and formulas in its texts. */
function plain(text) {
  return visible(text).replace(/&/g, "&amp;").replace(/</g, "&lt;")
    .replace(/>/g, "&gt;").replace(/\$/g, "&#36;");
}

function marked(share) {
  return share > 0 ? `rgba(var(--mark), ${0.15 + 0.75 * Math.min(1, share)})` : "";
}

/* Four digits, as in Python's `.4g`. */
function digits(number) {
  if (Number.isInteger(number)) return number.toLocaleString("en");
  return `${Number(number.toPrecision(4))}`;
}

/* The JSON of an element that holds it compressed (gzip) and in base64. Those at the
   end of the page may not have been read yet. */
async function unpack(id) {
  if (!byId(id)) {
    await new Promise((done) => document.addEventListener("DOMContentLoaded", done));
  }
  const bytes = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
  const unzipped = new Blob([bytes]).stream()
    .pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(unzipped).text());
}

/* Figures in the colours of the page, which depend on the scheme. */
const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = new Map();
const figureOptions = { responsive: true, displaylogo: false };
const smallFigureOptions = { responsive: true, displayModeBar: false };

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue("--text").trim();
  const line = style.getPropertyValue("--line").trim();
  const made = structuredClone(layout);
  Object.assign(made, { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" });
  made.font = { ...made.font, color: text };
  made.modebar = { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: text };
  for (const name of Object.keys(made).filter((n) => /^[xy]axis/.test(n))) {
    const lines = { gridcolor: line, linecolor: line, zerolinecolor: line };
    made[name] = { ...made[name], ...lines };
  }
  for (const shape of made.shapes || []) shape.line = { ...shape.line, color: text };
  return made;
}

function drawFigure(div, data, layout, options = smallFigureOptions) {
  drawn.set(div, [data, layout, options]);
  return Plotly.react(div, data, themed(layout), options);
}

dark.addEventListener("change", () => {
  for (const [div, [data, layout, options]] of drawn) {
    if (div.isConnected) Plotly.react(div, data, themed(layout), options);
    else drawn.delete(div);
  }
});

/* Figures are drawn when they come near, as there may be many. */
const figures = JSON.parse(byId("figure-data").textContent);
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    observer.unobserve(target);
    const figure = figures[target.dataset.figure][target.dataset.panel];
    drawFigure(target, figure.data, figure.layout, figureOptions);
  }
}, { rootMargin: "600px" });
document.querySelectorAll(".figure").forEach((div) => observer.observe(div));
