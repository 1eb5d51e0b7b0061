// Charts over time: an SVG, a legend with the figures of the moment under the pointer, and the same as a table.

import { atMinute, at, h, none, svg } from "./dom.js";

const WIDTH = 600;
const HEIGHT = 160;

/** A chart in `root`. `series` are {name, label, kind: "bar" | "line", format}; bars are stacked. */
export class Chart {
  constructor(root, { id, title, about, series, format, top }) {
    Object.assign(this, { series, format, top, title });
    this.plot = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-labelledby": `${id}-summary` });
    this.cursor = h("div", { class: "cursor", hidden: true });
    this.scale = h("div", { class: "scale", "aria-hidden": "true" });
    this.times = h("div", { class: "times", "aria-hidden": "true" });
    this.when = h("span", { class: "muted when" });
    this.values = new Map(series.map((one) => [one.name, h("span", { class: "value" }, none)]));
    this.items = new Map();
    const legend = h("ul", { class: "legend" }, series.map((one) => this.item(one)));
    this.summary = h("p", { class: "visually-hidden", id: `${id}-summary` });
    this.empty = h("p", { class: "empty over", hidden: true }, h("span", {}, "Nothing yet: figures come with the first requests."));
    this.rows = h("tbody");
    this.details = h("details", { ontoggle: () => this.fillTable() }, h("summary", {}, "Show as table"),
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${title}, as a table` }, h("table", { class: "plain" },
        h("caption", { class: "visually-hidden" }, title),
        h("thead", {}, h("tr", {}, ["Time", ...series.map((one) => one.label)].map((text) => h("th", { scope: "col" }, text)))), this.rows)));
    const area = h("div", { class: "area", onpointermove: (event) => this.point(event), onpointerleave: () => this.point(null) }, this.plot, this.cursor, this.empty);
    root.replaceChildren(h("figure", { class: "chart" },
      h("figcaption", {}, h("h3", {}, title), h("p", { class: "muted" }, about)), legend, this.when,
      h("div", { class: "frame" }, this.scale, area, this.times), this.summary, this.details));
  }

  item(one) {
    const item = h("li", {}, h("span", { class: `key k-${one.kind} t-${one.name}`, "aria-hidden": "true" }), `${one.label} `, this.values.get(one.name));
    this.items.set(one.name, item);
    return item;
  }

  /** `times` are Unix times, `columns` a list for each series with null where nothing happened. */
  update(times, columns) {
    this.data = { times, columns };
    const most = Math.max(0, ...times.map((_, i) => this.highest(i)));
    const high = this.top ?? nice(most);
    for (const one of this.series) this.items.get(one.name).hidden = Boolean(one.rare) && !columns[one.name].some(Boolean);
    this.empty.hidden = times.some((_, i) => this.series.some((one) => columns[one.name][i] !== null));
        this.scale.replaceChildren(...[1, 0.5, 0].map((share) => h("span", {}, this.format(high * share))));
    this.times.replaceChildren(...[0, 0.5, 1].map((share) => h("span", {}, times.length ? atMinute(times[Math.round(share * (times.length - 1))]) : "")));
    const step = WIDTH / Math.max(1, times.length);
    const y = (value) => HEIGHT - (HEIGHT * Math.min(value, high)) / (high || 1);
    const marks = [0.25, 0.5, 0.75].map((share) => svg("line", { class: "rule", x1: 0, x2: WIDTH, y1: HEIGHT * share, y2: HEIGHT * share }));
    this.plot.replaceChildren(...marks, ...this.bars(times, columns, step, y), ...this.lines(times, columns, step, y));
    const last = this.latest();
    const said = this.series.filter((one) => !this.items.get(one.name).hidden).map((one) => `${one.label} ${this.shown(one, last)}`).join(", ");
    this.summary.textContent = last < 0 ? `${this.title}: nothing yet.` : `${this.title}. At ${at(times[last])}: ${said}. The table below has all points.`;
    this.say(last);
    this.fillTable();
  }

  bars(times, columns, step, y) {
    const base = times.map(() => 0);
    return this.series.filter((one) => one.kind === "bar").map((one) => {
      const path = times.map((_, i) => {
        const value = columns[one.name][i];
        if (!value) return "";
        const from = y(base[i]), to = y((base[i] += value));
        return `M${(i * step).toFixed(2)} ${from.toFixed(2)}H${((i + 0.86) * step).toFixed(2)}V${to.toFixed(2)}H${(i * step).toFixed(2)}Z`;
      }).join("");
      return svg("path", { class: `t-${one.name}`, d: path });
    });
  }

  lines(times, columns, step, y) {
    return this.series.filter((one) => one.kind === "line").map((one) => {
      let down = false;
      const path = columns[one.name].map((value, i) => {
        if (value === null) return (down = false), "";
        const x = ((i + 0.43) * step).toFixed(2), top = y(value).toFixed(2);
        const part = down ? `L${x} ${top}` : `M${x} ${top}h0.01`;
        down = true;
        return part;
      }).join("");
      return svg("path", { class: `line t-${one.name}`, d: path });
    });
  }

  highest(i) {
    const { columns } = this.data;
    const stacked = this.series.filter((one) => one.kind === "bar").reduce((sum, one) => sum + (columns[one.name][i] ?? 0), 0);
    return Math.max(stacked, ...this.series.filter((one) => one.kind === "line").map((one) => columns[one.name][i] ?? 0));
  }

  latest() {
    const { times, columns } = this.data;
    for (let i = times.length - 1; i >= 0; i--) if (this.series.some((one) => columns[one.name][i] !== null)) return i;
    return -1;
  }

  shown(one, i) {
    return i < 0 ? none : this.format(this.data.columns[one.name][i]);
  }

  say(i) {
    for (const one of this.series) this.values.get(one.name).textContent = this.shown(one, i);
    this.when.textContent = i < 0 ? "" : `at ${at(this.data.times[i])}`;
  }

  point(event) {
    if (!this.data) return;
    const { times } = this.data;
    this.cursor.hidden = event === null || !times.length;
    if (this.cursor.hidden) return this.say(this.latest());
    const box = this.plot.getBoundingClientRect();
    const i = Math.max(0, Math.min(times.length - 1, Math.floor(((event.clientX - box.left) / box.width) * times.length)));
    this.cursor.style.setProperty("--x", `${(100 * (i + 0.43)) / times.length}%`);
    this.say(i);
  }

  fillTable() {
    if (!this.details.open || !this.data) return;
    const { times } = this.data;
    const order = times.map((_, i) => times.length - 1 - i).filter((i) => this.series.some((one) => this.data.columns[one.name][i] !== null));
    this.rows.replaceChildren(...order.map((i) => h("tr", {}, h("th", { scope: "row" }, at(times[i])), this.series.map((one) => h("td", {}, this.shown(one, i))))));
  }
}

/** The next round number above. */
function nice(value) {
  if (!value) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 4, 5, 6, 8, 10].find((step) => step * power >= value) * power;
}
