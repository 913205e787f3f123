// One conversation: its turns, the stream of the newest answer, stop and regenerate.

import { stream } from "./api.js";
import { announce, make, showText } from "./dom.js";
import { longestAnswer, settings } from "./settings.js";

export class Conversation {
  /** `model()` names who answers; `scroll(force)` keeps the end in sight. */
  constructor({ model, scroll, label, onchange = () => {} }) {
    this.messages = [];
    this.node = make("div", { class: "turns", role: "log", "aria-live": "polite", "aria-label": label });
    this.model = model;
    this.scroll = scroll;
    this.onchange = onchange;
    this.controller = null;
  }

  get busy() {
    return this.controller !== null;
  }

  clear() {
    this.stop();
    this.messages = [];
    this.node.replaceChildren();
    this.onchange();
  }

  stop() {
    this.controller?.abort();
  }

  send(text) {
    this.messages.push({ role: "user", content: text });
    this.node.append(make("article", { class: "turn user" },
      make("span", { class: "sr-only" }, "You: "), make("div", { class: "text" }, text)));
    return this.answer();
  }

  /** Answers the last message of the user again. */
  regenerate() {
    if (this.busy) return undefined;
    if (this.messages.at(-1)?.role === "assistant") this.messages.pop();
    this.node.lastElementChild?.remove();
    return this.answer();
  }

  async answer() {
    const model = this.model();
    const text = make("div", { class: "text" });
    const foot = make("p", { class: "foot" });
    const turn = make("article", { class: "turn assistant", "aria-busy": "true" },
      make("span", { class: "who" }, model), text, foot);
    this.node.querySelectorAll(".again").forEach((button) => button.remove());
    this.node.append(turn);
    this.scroll(true);

    const controller = new AbortController();
    this.controller = controller;
    this.onchange();
    const started = performance.now();
    const state = { content: "", first: null, tokens: null, reason: null };
    let failure = null;
    try {
      await this.read(model, state, text, started, controller.signal);
    } catch (error) {
      if (error.name === "AbortError") state.reason = "stopped";
      else failure = error.message;
    }
    if (this.controller === controller) this.controller = null;
    turn.setAttribute("aria-busy", "false");
    showText(text, state.content);
    if (state.content && this.messages.at(-1)?.role === "user") {
      this.messages.push({ role: "assistant", content: state.content });
    }
    foot.append(...this.facts(state, failure, started));
    this.scroll();
    announce(failure ? "The answer failed." : state.reason === "stopped" ? "Stopped." : "The answer is complete.");
    this.onchange();
  }

  async read(model, state, node, started, signal) {
    const system = settings.system ? [{ role: "system", content: settings.system }] : [];
    const body = {
      model,
      messages: [...system, ...this.messages],
      temperature: settings.temperature,
      max_tokens: longestAnswer(),
      stream: true,
      stream_options: { include_usage: true },
    };
    const growing = document.createTextNode("");
    node.append(growing);
    for await (const event of stream("/v1/chat/completions", body, signal)) {
      if (event.usage) state.tokens = event.usage.completion_tokens;
      const [part] = event.choices;
      if (part?.finish_reason) state.reason = part.finish_reason;
      if (!part?.delta.content) continue;
      state.first ??= performance.now() - started;
      state.content += part.delta.content;
      growing.appendData(part.delta.content);
      this.scroll();
    }
  }

  /** What stands under an answer. */
  facts(state, failure, started) {
    const again = make("button", { class: "quiet small again", type: "button", onclick: () => this.regenerate() }, "Regenerate");
    if (failure) return [make("span", { class: "failed" }, failure), again];
    const seconds = (performance.now() - started) / 1000;
    const facts = [];
    if (state.first !== null) facts.push(`${(state.first / 1000).toFixed(2)} s to the first word`);
    // The first token comes with reading the prompt: speed is that of the tokens after it.
    if (state.tokens > 1) facts.push(`${((state.tokens - 1) / (seconds - state.first / 1000)).toFixed(0)} tokens/s`);
    if (state.reason === "stopped") facts.push("stopped");
    if (state.reason === "length") facts.push(`cut at ${state.tokens} tokens`);
    if (!state.content && state.reason === "stop") facts.push("no text");
    return [again, ...facts.map((fact) => make("span", {}, fact))];
  }
}
