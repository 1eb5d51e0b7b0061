// One page of the workers, with the buttons that change something.

import * as api from "./api.js";
import { $, TIER_NAMES, ask, bytes, cell, compact, count, fill, h, keyed, none, percent, plural, seconds, setText, table, tierBar, toast } from "./dom.js";

const PAGE = 20;
const TONES = { up: "good", draining: "warn", "kept out": "warn", down: "bad" };

export class Workers {
  constructor(refresh) {
    this.refresh = refresh;
    this.offset = 0;
    this.matching = 0;
    const { whole, body } = table("Workers", ["Worker", "State", "Load", "Cache by tier", "Trust", "Actions"], "cards");
    this.body = body;
    this.table = whole;
    this.empty = h("div", { class: "empty", hidden: true });
    $("worker-list").replaceChildren(whole, this.empty);
    let typing;
    $("worker-search").addEventListener("input", () => {
      clearTimeout(typing);
      typing = setTimeout(() => this.turn(-this.offset), 250);
    });
    for (const id of ["worker-state", "worker-sort"]) $(id).addEventListener("change", () => this.turn(-this.offset));
    $("worker-back").addEventListener("click", () => this.turn(-PAGE));
    $("worker-on").addEventListener("click", () => this.turn(PAGE));
  }

  get query() {
    const sort = $("worker-sort").value;
    return { sort: sort.replace("-", ""), descending: sort.startsWith("-"), search: $("worker-search").value.trim(), state: $("worker-state").value, offset: this.offset, limit: PAGE };
  }

  turn(by) {
    const last = PAGE * Math.floor(Math.max(0, this.matching - 1) / PAGE);
    this.offset = Math.max(0, Math.min(this.offset + by, last));
    this.refresh();
  }

  update(told) {
    this.matching = told.matching;
    if (this.offset && this.offset >= told.matching) return this.turn(-PAGE);
    keyed(this.body, told.workers, (worker) => worker.name, (worker) => this.create(worker), show);
    const any = Object.keys(told.states).length > 0;
    this.table.hidden = !told.workers.length;
    this.empty.hidden = Boolean(told.workers.length);
    fill(this.empty, any, () => any ? [h("p", {}, "No worker matches.")] : [
      h("p", {}, h("strong", {}, "No workers yet.")),
      h("p", { class: "muted" }, "Name them with ", h("code", {}, "--worker http://HOST:PORT"), ", in the configuration file, by DNS name, or add one while the gateway runs with ", h("code", {}, "POST /admin/workers"), ".")]);
    const last = Math.min(told.matching, this.offset + told.workers.length);
    setText($("worker-count"), told.matching ? `${count(this.offset + 1)}–${count(last)} of ${count(told.matching)}` : "");
    for (const [id, off] of [["worker-back", !this.offset], ["worker-on", last >= told.matching]]) $(id).setAttribute("aria-disabled", String(off));
    document.querySelector(".pages").classList.toggle("single", told.matching <= PAGE);
  }

  create(worker) {
    const row = h("tr", { role: "row" });
    const parts = ["State", "Load", "Cache by tier", "Trust"].map((label) => cell(label, h("div")));
    const drain = h("button", { type: "button", onclick: () => this.drain(row.worker) });
    const clear = h("button", { type: "button", class: "danger-quiet", onclick: () => this.clear(row.worker) }, "Clear cache", h("span", { class: "visually-hidden" }, ` of ${worker.name}`));
    row.name = h("div");
    row.append(h("th", { role: "rowheader", scope: "row" }, row.name), ...parts, cell("Actions", h("div", { class: "buttons" }, drain, clear)));
    Object.assign(row, { parts: parts.map((part) => part.firstElementChild), drain, clear, worker });
    return row;
  }

  async drain(worker) {
    const drain = !worker.drained;
    if (drain && !(await ask(`Drain ${worker.name}?`, ["It finishes what it has and gets no further requests until you take it back."], "Drain"))) return;
    await this.act(() => api.post("workers/drain", { worker: worker.name, drain }), drain ? `${worker.name} is draining.` : `${worker.name} takes requests again.`);
  }

  async clear(worker) {
    const remote = worker.tiers.some((tier) => tier.tier === "remote") ? " The remote tier is shared: what is cleared there is gone for every worker." : "";
    const tiers = worker.tiers.filter((tier) => tier.tier !== "gpu").map((tier) => `${TIER_NAMES[tier.tier]} ${compact(tier.chunks)} chunks`).join(", ");
    if (!(await ask(`Clear the cache of ${worker.name}?`, [`Everything it holds behind the GPU is dropped${tiers ? `: ${tiers}` : ""}.${remote}`, "Prompts it would have loaded are computed again."], "Clear cache"))) return;
    await this.act(async () => {
      const [answer] = (await api.post("cache/clear", undefined, { worker: worker.name })).workers;
      if (answer.error) throw new Error(`${worker.name}: ${answer.error}`);
    }, `The cache of ${worker.name} was cleared.`);
  }

  async act(work, done) {
    try {
      await work();
      toast(done);
    } catch (error) {
      toast(`Not done: ${error.message}`, true);
    }
    this.refresh();
  }
}

function show(row, worker) {
  row.worker = worker;
  const [state, load, cache, trust] = row.parts;
  fill(row.name, [worker.name, worker.url, worker.models], () => [
    h("strong", {}, worker.name), h("small", { class: "muted" }, worker.url.replace(/^http:\/\//, "")), h("small", { class: "muted" }, worker.models.join(", "))]);
  fill(state, [worker.state, worker.why, worker.leaving], () => [
    h("span", { class: "pill", "data-tone": TONES[worker.state] }, worker.state), worker.leaving ? h("small", {}, "leaving") : "", worker.why ? h("small", { class: "muted" }, worker.why) : ""]);
  const running = worker.running === null ? [] : [`${count(worker.running)} running, ${count(worker.waiting)} waiting`];
  fill(load, [worker.in_flight, running, worker.uncached_tokens, worker.gpu_usage], () => [
    h("span", {}, h("strong", {}, count(worker.in_flight)), " in flight"),
    h("small", { class: "muted" }, [...running, `${compact(worker.uncached_tokens)} tokens to compute`, ...(worker.gpu_usage ? [`GPU cache ${percent(worker.gpu_usage)} in use`] : [])].join(" · "))]);
  fill(cache, worker.tiers, () => (worker.tiers.length ? h("ul", { class: "tiers" }, worker.tiers.map(occupancy)) : h("span", { class: "muted" }, "not known")));
  fill(trust, [worker.trust, worker.cache_source, worker.synced, worker.predictions, worker.reports_error, Math.round(worker.heartbeat_age_s ?? 0)], () => trusted(worker));
  const text = worker.drained ? "Take back" : "Drain"; // one whose pod is not ready drains too, and is nobody's to take back
  fill(row.drain, [text, worker.name], () => [text, h("span", { class: "visually-hidden" }, ` ${worker.name}`)]);
  row.clear.hidden = !worker.report_port;
}

function occupancy({ tier, chunks, capacity, chunk_bytes }) {
  const size = `${compact(chunks)}${capacity ? ` of ${compact(capacity)}` : ""} chunks`;
  const text = `${TIER_NAMES[tier]}: ${size}${chunk_bytes ? `, ${bytes(chunks * chunk_bytes)}` : ""}`;
  return h("li", { title: text }, h("span", {}, TIER_NAMES[tier]), tierBar([[tier, chunks]], capacity || chunks || 1, text), h("small", { class: "muted" }, capacity ? percent(Math.min(1, chunks / capacity)) : compact(chunks)));
}

function trusted(worker) {
  if (worker.cache_source === "none") {
    return [h("span", {}, "load only"), h("small", { class: "muted" }, worker.reports_error || "it reports no cache")];
  }
  const judged = Object.values(worker.predictions).reduce((sum, n) => sum + n, 0);
  const notes = [judged ? `${percent(worker.predictions.exact / judged)} exact of ${plural(judged, "prediction")}` : "nothing compared yet"];
  if (worker.cache_source === "routed") notes.unshift("as prompts were sent");
  else if (!worker.synced) notes.unshift(worker.cache_source === "events" ? "not from their beginning" : "being listed");
  if (worker.heartbeat_age_s > 3) notes.push(`silent for ${seconds(worker.heartbeat_age_s)}`);
  return [h("span", {}, h("strong", {}, worker.trust === null ? none : worker.trust.toFixed(2)), ` ${worker.cache_source}`), h("small", { class: "muted" }, notes.join(" · "))];
}
