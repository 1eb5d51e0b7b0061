// A dry run of a pasted prompt: which worker, why, and what every candidate has of it.

import * as api from "./api.js";
import { $, TIERS, compact, count, fill, h, percent, plural, tierBar, tierText } from "./dom.js";

const FEW = 256; // why a hit ends is looked up for each worker
const SHOWN = 12;

export class Prompt {
  constructor() {
    this.workers = 0;
    $("try-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.explain();
    });
    $("try-kind").addEventListener("change", () => ($("try-model").disabled = $("try-kind").value === "json"));
  }

  fleet(told) {
    this.workers = Object.values(told.states).reduce((sum, n) => sum + n, 0);
    const chosen = $("try-model").value;
    fill($("try-model"), told.models, () => told.models.map((model) => h("option", { value: model, selected: model === chosen }, model)));
  }

  body() {
    const kind = $("try-kind").value, text = $("try-text").value, model = $("try-model").value;
    if (kind === "json") return text;
    return kind === "chat" ? { model, messages: [{ role: "user", content: text }] } : { model, prompt: text };
  }

  async explain() {
    const place = $("try-answer");
    place.setAttribute("aria-busy", "true");
    try {
      const told = await api.post(this.workers > FEW ? "route" : "explain", this.body());
      place.replaceChildren(...answer(told));
    } catch (error) {
      place.replaceChildren(h("p", { class: "error" }, error.message));
    }
    place.removeAttribute("aria-busy");
  }
}

function answer(told) {
  const chosen = told.candidates.find((one) => one.worker === told.worker);
  const ends = new Map((told.ends ?? []).map((end) => [end.worker, end]));
  const size = Math.max(1, told.prompt_tokens);
  const verdict = told.worker
    ? h("p", { class: "verdict" }, "It would go to ", h("strong", {}, told.worker), h("span", { class: "muted" }, ` ${told.reason}`))
    : h("p", { class: "verdict error" }, told.reason);
  const facts = [`${plural(told.prompt_tokens, "token")}, tokenized by ${told.tokenized_by}`, `policy ${told.policy}`, `model ${told.model}`];
  if (chosen) facts.unshift(`${percent(chosen.hit_tokens / size)} reused`);
  const rank = [...told.candidates].sort((a, b) => (b.worker === told.worker) - (a.worker === told.worker) || b.hit_tokens - a.hit_tokens || a.load - b.load);
  const parts = [verdict, h("p", { class: "muted" }, facts.join(" · "))];
  if (told.why_not_router) parts.push(h("p", { class: "muted" }, `Not tokenized by the router: ${told.why_not_router}`));
  parts.push(h("ul", { class: "candidates" }, rank.slice(0, SHOWN).map((one) => candidate(one, size, told.worker, ends.get(one.worker)))));
  if (rank.length > SHOWN) parts.push(h("p", { class: "muted" }, `${plural(rank.length - SHOWN, "further candidate")} with no longer hit.`));
  return parts;
}

function candidate(one, size, chosen, end) {
  const tiers = one.hit_tokens_by_tier;
  const told = one.hit_tokens ? tierText(tiers, "") || `${count(one.hit_tokens)} tokens` : "nothing held";
  const text = `${told}; ${count(Math.max(0, size - one.hit_tokens))} tokens to compute`;
  return h("li", { class: one.worker === chosen ? "chosen" : "" },
    h("div", { class: "who" }, h("strong", {}, one.worker), one.worker === chosen ? h("span", { class: "pill", "data-tone": "good" }, "chosen") : "",
      h("small", { class: "muted" }, `${count(one.in_flight)} in flight · load ${compact(one.load)} · trust ${one.trust.toFixed(2)}`)),
    tierBar(TIERS.map((tier) => [tier, tiers[tier] ?? 0]), size, text), h("small", {}, text),
    end ? h("small", { class: "muted" }, end.why) : "");
}
