// Elements, and how figures are written. Text reaches the page as text only.

export const TIERS = ["gpu", "cpu", "disk", "remote", "unknown"];
export const TIER_NAMES = { gpu: "GPU", cpu: "CPU", disk: "Disk", remote: "Remote", unknown: "Tier not told" };

export const $ = (id) => document.getElementById(id);

const build = (element, props, children) => {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
};

export const h = (tag, props = {}, ...children) => build(document.createElement(tag), props, children);
export const svg = (tag, props = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

/** Put `make()` into an element, unless what it is made from is as it was. */
export function fill(element, from, make) {
  const key = JSON.stringify(from);
  if (element.filledFrom === key) return;
  element.filledFrom = key;
  element.replaceChildren(...[make()].flat());
}

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** One child for each item, in their order; children that stay are kept, so that focus stays with them. */
export function keyed(parent, items, keyOf, create, update) {
  const held = (parent.keyedChildren ??= new Map());
  const wanted = new Set(items.map(keyOf));
  for (const [key, child] of held) {
    if (!wanted.has(key)) {
      child.remove();
      held.delete(key);
    }
  }
  let before = null;
  for (const item of items) {
    const key = keyOf(item);
    let child = held.get(key);
    if (!child) held.set(key, (child = create(item)));
    update(child, item);
    const place = before ? before.nextElementSibling : parent.firstElementChild;
    if (place !== child) parent.insertBefore(child, place);
    before = child;
  }
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const percents = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 0 });
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const minute = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });

export const none = "–";
export const count = (n) => (n === null || n === undefined ? none : whole.format(n));
export const compact = (n) => (n === null || n === undefined ? none : n < 1000 ? whole.format(n) : short.format(n));
export const percent = (x) => (x === null || x === undefined ? none : percents.format(x));
export const rate = (x) => (x === null || x === undefined ? none : x > 0 && x < 10 ? x.toFixed(1) : compact(x));
export const at = (unix) => clock.format(new Date(unix * 1000));
export const atMinute = (unix) => minute.format(new Date(unix * 1000));
export function seconds(s) {
  if (s === null || s === undefined) return none;
  if (s === 0) return "0";
  if (s < 0.9995) return s < 0.00995 ? `${(s * 1000).toFixed(1)} ms` : `${Math.round(s * 1000)} ms`;
  return s < 10 ? `${s.toFixed(2)} s` : `${s.toFixed(s < 100 ? 1 : 0)} s`;
}
export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (n >= 1024 && unit < units.length - 1) (n /= 1024), unit++;
  return `${n < 10 && unit ? n.toFixed(1) : Math.round(n)} ${units[unit]}`;
}
export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

/** A bar cut into tiers. `parts` are [tier, amount]; the text says the same. */
export function tierBar(parts, total, text) {
  const bar = h("span", { class: "bar", role: "img", "aria-label": text, title: text });
  for (const [tier, amount] of parts) {
    if (amount > 0) bar.append(h("span", { class: `t-${tier}`, vars: { "--w": `${Math.min(100, (100 * amount) / total)}%` } }));
  }
  return bar;
}

export const tierText = (tiers, unit) =>
  TIERS.filter((tier) => tiers[tier]).map((tier) => `${TIER_NAMES[tier]} ${compact(tiers[tier])}${unit}`).join(", ");

export function table(caption, columns, className = "") {
  const body = h("tbody", { role: "rowgroup" });
  const head = h("tr", { role: "row" }, columns.map((name) => h("th", { role: "columnheader", scope: "col" }, name)));
  const whole = h("table", { class: className, role: "table" },
    h("caption", { class: "visually-hidden" }, caption),
    h("thead", { role: "rowgroup" }, head), body);
  return { whole, body };
}

/** A cell that shows its column's name where the table is a list of cards. */
export const cell = (label, ...children) => h("td", { role: "cell", "data-label": label }, ...children);

export function toast(text, bad = false) {
  const note = h("div", { class: bad ? "toast bad" : "toast" }, text);
  $("toasts").append(note);
  setTimeout(() => note.remove(), bad ? 12000 : 6000);
}

/** Ask once more; whether it was confirmed. */
export function ask(title, lines, yes) {
  const dialog = $("dialog");
  setText($("dialog-title"), title);
  $("dialog-body").replaceChildren(...lines.map((line) => (line instanceof Node ? line : h("p", {}, line))));
  $("dialog-yes").hidden = !yes;
  setText($("dialog-yes"), yes ?? "");
  setText($("dialog-no"), yes ? "Cancel" : "Close");
  dialog.returnValue = "";
  dialog.showModal();
  $("dialog-no").focus();
  return new Promise((done) => {
    $("dialog-yes").onclick = () => dialog.close("yes");
    $("dialog-no").onclick = () => dialog.close("");
    dialog.onclose = () => done(dialog.returnValue === "yes");
  });
}
