// Starts everything, keeps it fresh while the page is seen, and says when it is not.

import * as api from "./api.js";
import { Decisions } from "./decisions.js";
import { $, at, setText } from "./dom.js";
import { Overview } from "./overview.js";
import { Prefixes } from "./prefixes.js";
import { Prompt } from "./prompt.js";
import { Workers } from "./workers.js";

const LONGEST_MS = 10000;

/** Calls `work` every `period` while the page is visible and somebody is signed in; waits longer where it fails. */
class Poll {
  constructor(period, work) {
    Object.assign(this, { period, work, failures: 0, round: 0 });
  }

  async now() {
    const round = ++this.round;
    clearTimeout(this.timer);
    if (document.hidden || !app.open) return;
    try {
      const show = await this.work();
      if (round !== this.round) return;
      show();
      this.failures = 0;
      app.reached();
    } catch (error) {
      if (round !== this.round) return;
      this.failures++;
      app.failed(error);
    }
    this.timer = setTimeout(() => this.now(), Math.min(LONGEST_MS, this.period * 2 ** this.failures));
  }
}

const app = {
  open: true,
  heard: 0,
  notice: "",

  start() {
    this.overview = new Overview();
    this.workers = new Workers(() => this.polls[0].now());
    this.decisions = new Decisions();
    this.prompt = new Prompt();
    this.prefixes = new Prefixes();
    this.overview.onrange = () => this.polls[1].now();
    this.polls = [
      new Poll(2000, () => this.fleet()),
      new Poll(5000, () => api.get("timeline", { minutes: this.overview.minutes }).then((told) => () => this.overview.timeline(told))),
      new Poll(8000, () => api.get("prefixes").then((told) => () => this.prefixes.update(told))),
    ];
    document.addEventListener("visibilitychange", () => this.wake());
    $("sign-in-form").addEventListener("submit", (event) => {
      event.preventDefault();
      api.token.set($("token").value.trim());
      $("token").value = "";
      setText($("sign-in-error"), "");
      this.enter();
    });
    $("sign-out").addEventListener("click", () => {
      api.token.forget();
      location.reload();
    });
    this.enter();
  },

  async fleet() {
    const told = await api.get("fleet", this.workers.query);
    return () => {
      setText($("version"), `${told.version} · ${told.policy}`);
      this.overview.fleet(told);
      this.workers.update(told);
      this.prompt.fleet(told);
      this.notice = told.draining ? "This gateway is stopping: it finishes what it has and takes nothing more." : "";
    };
  },

  enter() {
    this.open = true;
    this.wake();
  },

  /** Asks for one thing first: whoever may not have it may have nothing. */
  async wake() {
    this.stream?.abort();
    const stream = (this.stream = new AbortController());
    const [first, ...others] = this.polls;
    await first.now();
    if (document.hidden || !this.open || stream !== this.stream) return;
    for (const poll of others) poll.now();
    this.follow(stream);
  },

  async follow(controller) {
    let pause = 500;
    while (!controller.signal.aborted && this.open) {
      try {
        await this.decisions.follow(controller.signal, () => (pause = 500));
      } catch (error) {
        if (controller.signal.aborted) return;
        if (error instanceof api.Refused && error.status !== 429) this.failed(error);
        pause = Math.min(LONGEST_MS, pause * 2);
      }
      await new Promise((done) => setTimeout(done, pause));
    }
  },

  reached() {
    this.heard = Date.now() / 1000;
    this.show("content");
    this.state("Live", "good");
    $("content").classList.remove("stale");
    this.say(this.notice);
  },

  failed(error) {
    const status = error instanceof api.Refused ? error.status : 0;
    if (status === 401) return this.ask();
    if (status === 403) return this.shut(error.message);
    this.state(status ? "Failing" : "No connection", "bad");
    $("content").classList.add("stale");
    const since = this.heard ? ` What you see is of ${at(this.heard)}.` : "";
    this.say(`${status ? `The gateway answers ${status}: ${error.message}.` : "The gateway does not answer; trying again."}${since}`);
  },

  ask() {
    if (!this.open) return;
    const wrong = Boolean(api.token.get());
    api.token.forget();
    this.close("sign-in", "Token needed");
    setText($("sign-in-error"), wrong ? "That is not this gateway's admin token." : "");
    $("token").focus();
  },

  shut(why) {
    this.close("closed", "Closed");
    setText($("closed-why"), why);
  },

  close(section, state) {
    this.open = false;
    this.stream?.abort();
    this.show(section);
    this.say("");
    this.state(state, "warn");
  },

  show(section) {
    for (const id of ["content", "sign-in", "closed"]) $(id).hidden = id !== section;
    $("nav").hidden = section !== "content";
    $("sign-out").hidden = section !== "content" || !api.token.get();
  },

  state(text, tone) {
    setText($("connection"), text);
    $("connection").dataset.tone = tone;
  },

  say(text) {
    setText($("banner"), text);
    $("banner").hidden = !text;
  },
};

app.start();
