"use strict";

/* The list of latents: search, order, keys and links such as #latent=123.
   `head` is `LatentData.head`; pieces hold the latents themselves. */

const MOST_LISTED = 200;
const opened = new Map();
let head, placeOf, found = [], shown = null, nListed = MOST_LISTED;

function piece(number) {
  if (!opened.has(number)) opened.set(number, unpack(`latents-${number}`));
  return opened.get(number);
}

async function latentOf(id) {
  const place = placeOf.get(id);
  const latents = await piece(Math.floor(place / head.piece));
  return latents[place % head.piece];
}

function ownTexts(place) {
  return head.index.own[place].map((id) => head.texts[id]);
}

function search() {
  const query = byId("query").value.trim();
  const lower = query.toLowerCase();
  const places = head.index.id.map((_, place) => place);
  found = places.filter((place) => query === "" || `${head.index.id[place]}` === query
    || ownTexts(place).some((t) => t.toLowerCase().includes(lower)));
  const column = head.index[byId("order").value];
  const sign = ["total", "count"].includes(byId("order").value) ? -1 : 1;
  // A number is first of all the latent of that number.
  const first = (place) => `${head.index.id[place]}` === query;
  found.sort((a, b) => first(b) - first(a) || sign * (column[a] - column[b]));
  nListed = MOST_LISTED;
  list();
}

function list() {
  const items = found.slice(0, nListed).map(listed);
  if (found.length > nListed) {
    const more = element("button", "Show more", { type: "button" });
    more.addEventListener("click", () => { nListed += MOST_LISTED; list(); });
    items.push(element("li"));
    items.at(-1).append(more);
  }
  byId("list").replaceChildren(...items);
  byId("found").textContent = `${found.length.toLocaleString("en")} of ` +
    `${head.index.id.length.toLocaleString("en")} latents`;
}

function listed(place) {
  const id = head.index.id[place];
  const button = element("button", `${id}`, { type: "button" });
  button.dataset.latent = id;
  button.setAttribute("aria-current", id === shown);
  const texts = ownTexts(place).map(visible).join(" | ");
  button.append(element("small", `mean layer ${head.index.mean[place]}: ${texts}`));
  const item = element("li");
  item.append(button);
  return item;
}

/* Show a latent; `link` also writes its number to the address. */
async function openLatent(id, link = true) {
  shown = id;
  document.querySelectorAll("#list button").forEach((button) => {
    button.setAttribute("aria-current", button.dataset.latent === `${id}`);
  });
  if (link) history.pushState(null, "", `#latent=${id}`);
  if (!placeOf.has(id)) {
    const known = Number.isInteger(id) && id < head.d_sae;
    byId("latent").replaceChildren(element("p", known
      ? `Latent ${id} is not in this page: --latents ${id} adds it, and --n_latents ` +
        "sets how many there are."
      : `There is no latent ${id}; the SAE has ${head.d_sae.toLocaleString("en")}.`));
    return;
  }
  const latent = await latentOf(id);
  if (shown === id) showLatent(latent);
}

function step(by) {
  const ids = found.map((place) => head.index.id[place]);
  const next = ids[ids.indexOf(shown) + by];
  if (next === undefined) return;
  openLatent(next);
  const button = document.querySelector(`#list button[data-latent="${next}"]`);
  if (button) button.scrollIntoView({ block: "nearest" });
}

function fromAddress() {
  const match = /^#latent=(\d+)$/.exec(location.hash);
  if (!match) return false;
  openLatent(Number(match[1]), false);
  byId("latents").scrollIntoView();
  return true;
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
  const by = { j: 1, k: -1 }[event.key];
  if (by) step(by);
  if (event.key === "/") { event.preventDefault(); byId("query").focus(); }
}

/* Up and down in the list move the focus, and show the latent. */
function listKeys(event) {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!by || !event.target.dataset.latent) return;
  event.preventDefault();
  const item = event.target.parentElement;
  const next = (by > 0 ? item.nextElementSibling : item.previousElementSibling);
  const button = next && next.querySelector("button[data-latent]");
  if (button) { button.focus(); openLatent(Number(button.dataset.latent)); }
}

async function startBrowser() {
  head = await unpack("latent-head");
  placeOf = new Map(head.index.id.map((id, place) => [id, place]));
  byId("query").addEventListener("input", search);
  byId("order").addEventListener("change", search);
  byId("search").addEventListener("submit", (event) => {
    event.preventDefault();
    if (found.length) openLatent(head.index.id[found[0]]);
  });
  byId("list").addEventListener("click", (event) => {
    const button = event.target.closest("button[data-latent]");
    if (button) openLatent(Number(button.dataset.latent));
  });
  byId("list").addEventListener("keydown", listKeys);
  document.addEventListener("keydown", keys);
  addEventListener("popstate", fromAddress);
  if (!head.index.id.length) return;
  search();
  if (!fromAddress()) await openLatent(head.index.id[found[0]], false);
}

const ready = startBrowser();
