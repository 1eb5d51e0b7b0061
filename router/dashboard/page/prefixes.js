// What the latest prompts have in common, and which workers hold it in which tier.

import { $, TIERS, cell, compact, count, fill, h, keyed, plural, setText, table, tierBar, tierText } from "./dom.js";

export class Prefixes {
  constructor() {
    const { whole, body } = table("Prefixes of the latest prompts", ["Prefix", "Tokens", "Prompts", "Held by"], "cards");
    this.body = body;
    this.empty = h("p", { class: "empty" }, "No prompt of a whole chunk yet.");
    this.frame = h("div", { class: "tall", tabindex: "0", role: "region", "aria-labelledby": "prefixes-title" }, whole);
    $("prefix-list").replaceChildren(this.frame, this.empty);
  }

  update(told) {
    setText($("prefix-note"), told.prompts ? `Of the latest ${plural(told.prompts, "prompt")}: what they begin with, known by the hash of its last chunk. Indented rows go on where the row above ends.` : "");
    keyed(this.body, told.prefixes, (one) => `${one.id} ${one.depth}`, create, show);
    this.frame.hidden = !told.prefixes.length;
    this.empty.hidden = Boolean(told.prefixes.length);
  }
}

function create() {
  const row = h("tr", { role: "row" });
  row.name = h("div");
  const parts = ["Tokens", "Prompts", "Held by"].map((label) => cell(label, h("div")));
  row.append(h("th", { role: "rowheader", scope: "row" }, row.name), ...parts);
  row.parts = parts.map((part) => part.firstElementChild);
  return row;
}

function show(row, one) {
  const [tokens, prompts, holders] = row.parts;
  row.style.setProperty("--depth", one.depth);
  fill(row.name, [one.id, one.model], () => [
    h("code", { title: one.id }, one.id.slice(0, 10)), h("small", { class: "muted" }, one.depth ? `level ${one.depth + 1}` : one.model)]);
  setText(tokens, one.start_tokens ? `${count(one.start_tokens)} to ${count(one.end_tokens)}` : count(one.end_tokens));
  setText(prompts, count(one.prompts));
  fill(holders, [one.holders, one.more_holders], () => (one.holders.length ? [
    h("ul", { class: "holders" }, one.holders.map((holder) => {
      const text = `${holder.worker} holds ${tierText(holder.tiers, "")} of ${compact(one.end_tokens)} tokens`;
      return h("li", {}, h("span", { class: "who" }, holder.worker), tierBar(TIERS.map((tier) => [tier, holder.tiers[tier] ?? 0]), one.end_tokens, text), h("small", { class: "muted" }, tierText(holder.tiers, "")));
    })), one.more_holders ? h("small", { class: "muted" }, `and ${plural(one.more_holders, "more worker")}`) : ""] : [h("span", { class: "muted" }, "nobody now")]));
}
