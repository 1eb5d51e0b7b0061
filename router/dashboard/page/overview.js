// The tiles, and the charts of the last minutes.

import { Chart } from "./charts.js";
import { $, TIERS, TIER_NAMES, bytes, compact, count, fill, h, none, percent, plural, rate, seconds, tierBar } from "./dom.js";

export class Overview {
  constructor() {
    this.minutes = 5;
    this.hits = new Chart($("hit-chart"), {
      id: "hits", title: "Hit rate by tier", about: "Share of prompt tokens that were reused instead of computed",
      series: [...TIERS.map((tier) => ({ name: tier, label: TIER_NAMES[tier], kind: "bar", rare: tier !== "gpu" })), { name: "predicted", label: "Predicted", kind: "line" }],
      format: percent, top: 1,
    });
    this.ttft = new Chart($("ttft-chart"), {
      id: "ttft", title: "Time to first token", about: "From a request's arrival to the first byte of its answer",
      series: [{ name: "p50", label: "Median", kind: "line" }, { name: "p95", label: "95th percentile", kind: "line" }],
      format: seconds,
    });
    $("range").addEventListener("change", (event) => {
      this.minutes = Number(event.target.value);
      this.onrange?.();
    });
    this.tiles = new Map(["Requests", "Hit rate", "First token", "Workers", "Cache held", "Predictions"].map((name) => {
      const value = h("dd"), more = h("dd", { class: "more" });
      $("tiles").append(h("div", { class: "tile card" }, h("dt", {}, name), value, more));
      return [name, { value, more }];
    }));
  }

  timeline(told) {
    const { now } = told;
    this.tile("Requests", [rate(now.requests_per_s), h("small", {}, " per second")], [`${plural(now.failed, "failure")}, ${count(now.rejected)} refused in the last minute`], now);
    const all = hitRate(now.hit_rate);
    this.tile("Hit rate", [percent(all)], all === null ? ["no prompt in the last minute"] : [bar(now.hit_rate), `predicted ${percent(now.predicted)}`], now);
    this.tile("First token", now.ttft_p50_s === null ? [none] : [seconds(now.ttft_p50_s), h("small", {}, " median")], [now.ttft_p95_s === null ? "no answer in the last minute" : `95% within ${seconds(now.ttft_p95_s)}`], now);
    const right = now.judged ? now.exact / now.judged : null;
    this.tile("Predictions", right === null ? [none] : [percent(right), h("small", {}, " exact")], [now.judged ? `${compact(now.judged)} compared in the last minute` : "none compared in the last minute"], now);
    const times = told.at;
    const empty = () => times.map(() => null);
    this.hits.update(times, { ...Object.fromEntries(TIERS.map((tier) => [tier, told.hit_rate?.[tier] ?? empty()])), predicted: told.predicted ?? empty() });
    this.ttft.update(times, { p50: told.ttft_p50_s ?? empty(), p95: told.ttft_p95_s ?? empty() });
  }

  fleet(told) {
    const total = Object.values(told.states).reduce((sum, n) => sum + n, 0);
    const others = Object.entries(told.states).filter(([state]) => state !== "up").map(([state, n]) => `${count(n)} ${state}`);
    const flying = `${count(told.in_flight)} in flight, ${count(told.queued)} queued`;
    this.tile("Workers", [count(told.states.up ?? 0), h("small", {}, ` of ${count(total)} up`)], [others.join(", ") || flying, others.length ? `; ${flying}` : ""], [told.states, told.in_flight, told.queued]);
    const tiers = Object.entries(told.tiers);
    const held = tiers.reduce((sum, [, tier]) => sum + tier.bytes, 0);
    const chunks = tiers.reduce((sum, [, tier]) => sum + tier.chunks, 0);
    this.tile("Cache held", tiers.length ? [compact(chunks), h("small", {}, " chunks")] : [none], tiers.length ? tiers.map(([tier, one]) => h("span", { class: "line" },
      h("span", { class: `key k-bar t-${tier}`, "aria-hidden": "true" }), `${TIER_NAMES[tier]} ${compact(one.chunks)}${one.capacity ? ` of ${compact(one.capacity)}` : ""}`)).concat(bytes(held)) : ["no worker reports its cache"], told.tiers);
  }

  tile(name, value, more, from) {
    const tile = this.tiles.get(name);
    fill(tile.value, from, () => value);
    fill(tile.more, from, () => more);
  }
}

const hitRate = (rates) => (rates.gpu === null ? null : Math.min(1, Object.values(rates).reduce((sum, x) => sum + x, 0)));
const bar = (rates) => tierBar(TIERS.map((tier) => [tier, rates[tier]]), 1, TIERS.filter((tier) => rates[tier]).map((tier) => `${TIER_NAMES[tier]} ${percent(rates[tier])}`).join(", ") || "nothing reused");
