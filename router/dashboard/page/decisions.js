// Decisions as they are made, latest first, and why one ended where it did.

import * as api from "./api.js";
import { $, ask, at, cell, compact, count, fill, h, keyed, none, seconds, setText, table, tierBar, tierText, toast } from "./dom.js";

const KEPT = 300;
const SHOWN = 30;
const TONES = { served: "good", running: "idle", abandoned: "warn", failed: "bad", broken: "bad" };

export class Decisions {
  constructor() {
    this.known = new Map();
    this.total = 0;
    this.paused = false;
    const { whole, body } = table("Decisions, latest first", ["Time", "Worker", "Reason", "Prompt", "First token", "Outcome", "Details"], "cards tight");
    this.body = body;
    this.empty = h("p", { class: "empty" }, "No requests yet: decisions appear here as they are made.");
    this.frame = h("div", { class: "tall", tabindex: "0", role: "region", "aria-labelledby": "decisions-title" }, whole);
    $("decision-list").replaceChildren(this.frame, this.empty);
    $("decision-pause").addEventListener("click", () => this.pause());
    $("decision-search").addEventListener("input", () => this.show());
    this.show();
  }

  /** Follow the stream for good; `told` hears what becomes of it. */
  async follow(abort, opened) {
    for await (const [name, content] of api.events("decisions", abort)) {
      opened();
      if (name === "end") return;
      if (name === "decisions") this.take(content);
    }
  }

  take({ decisions, skipped }) {
    create.first = !this.total;
    this.total += skipped;
    for (const one of decisions) this.add(one);
    while (this.known.size > KEPT) this.known.delete(this.known.keys().next().value);
    if (!this.paused) this.show();
    else setText($("decision-note"), `Paused. ${this.noted()}`);
  }

  add(one) {
    const key = `${one.at} ${one.request_id}`;
    if (!this.known.has(key)) this.total++;
    this.known.set(key, Object.assign(one, { key }));
  }

  pause() {
    this.paused = !this.paused;
    $("decision-pause").setAttribute("aria-pressed", String(this.paused));
    setText($("decision-pause"), this.paused ? "Go on" : "Pause");
    this.show();
  }

  noted() {
    return `${count(this.total)} decisions since this page was opened; the latest ${count(Math.min(SHOWN, this.known.size))} are shown.`;
  }

  show() {
    const text = $("decision-search").value.trim().toLowerCase();
    const matches = (one) => !text || [one.worker, one.reason, one.model, one.request_id, one.outcome].some((part) => part.toLowerCase().includes(text));
    const latest = [...this.known.values()].filter(matches).sort((a, b) => b.at - a.at).slice(0, SHOWN);
    keyed(this.body, latest, (one) => one.key, create, update);
    this.frame.hidden = !latest.length;
    this.empty.hidden = Boolean(latest.length);
    setText(this.empty, this.known.size ? "No decision matches." : "No requests yet: decisions appear here as they are made.");
    setText($("decision-note"), this.known.size ? `${this.paused ? "Paused. " : ""}${this.noted()}` : "");
  }
}

function create(one) {
  const row = h("tr", { role: "row", class: create.first ? "" : "fresh" });
  const parts = ["Worker", "Reason", "Prompt", "First token", "Outcome"].map((label) => cell(label, h("div")));
  const why = h("button", { type: "button", class: "quiet", onclick: () => explain(row.decision) }, "Why", h("span", { class: "visually-hidden" }, ` request ${one.request_id}`));
  row.append(h("th", { role: "rowheader", scope: "row", "data-label": "Time" }, at(one.at)), ...parts, cell("Details", why));
  row.parts = parts.map((part) => part.firstElementChild);
  return row;
}

function update(row, one) {
  if (row.decision === one) return;
  row.decision = one;
  const [worker, reason, prompt, ttft, outcome] = row.parts;
  fill(worker, [one.worker, one.model], () => [h("strong", {}, one.worker || none), h("small", { class: "muted" }, one.model)]);
  fill(reason, one.reason, () => one.reason);
  fill(prompt, [one.prompt_tokens, one.predicted_hit_tokens, one.actual_hit_tokens, one.cached_tokens], () => reuse(one));
  setText(ttft, seconds(one.ttft_s));
  fill(outcome, [one.outcome, one.status, one.attempts], () => [
    h("span", { class: "pill", "data-tone": one.status >= 400 ? "bad" : (TONES[one.outcome] ?? "idle") }, one.outcome),
    h("small", { class: "muted" }, [one.status || "", one.attempts > 1 ? `attempt ${one.attempts}` : ""].filter(Boolean).join(", "))]);
}

function reuse(one) {
  if (!one.prompt_tokens) return [h("span", { class: "muted" }, "by load")];
  const actual = one.actual_hit_tokens ?? (one.cached_tokens === null ? null : { unknown: one.cached_tokens });
  const reused = actual ? Object.values(actual).reduce((sum, n) => sum + n, 0) : one.predicted_hit_tokens;
  const told = actual ? tierText(actual, "") || "nothing" : `${compact(one.predicted_hit_tokens)} predicted`;
  const text = `${told} reused of ${compact(one.prompt_tokens)} tokens`;
  return [tierBar(Object.entries(actual ?? { predicted: reused }), one.prompt_tokens, text), h("small", {}, text)];
}

async function explain(one) {
  let lines;
  try {
    const { decision, end } = await api.get("explain", { id: one.request_id });
    const facts = [["Worker", decision.worker], ["Reason", decision.reason], ["Hit ended because", end.why],
      ["Prompt", `${count(decision.prompt_tokens)} tokens, tokenized by ${decision.tokenized_by}`],
      ["Reuse", `${count(decision.predicted_hit_tokens)} tokens predicted; ${decision.actual_hit_tokens ? tierText(decision.actual_hit_tokens, "") || "none" : count(decision.cached_tokens)} reused`],
      ["First token", seconds(decision.ttft_s)], ["Whole answer", seconds(decision.duration_s)], ["Request", decision.request_id]];
    lines = [h("dl", { class: "facts" }, facts.map(([name, text]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(text ?? none)))))];
  } catch (error) {
    return toast(`Not explained: ${error.message}`, true);
  }
  await ask("Why there, and why so far?", lines);
}
