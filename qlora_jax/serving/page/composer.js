// Where one writes: a box that grows, Enter sends, Escape stops, and one button that does both.

import { icon, make } from "./dom.js";

export class Composer {
  constructor({ label, placeholder, onsend, onstop, tools = [] }) {
    this.area = make("textarea", { rows: "1", "aria-label": label, placeholder, maxlength: "200000" });
    this.button = make("button", { class: "primary round", type: "submit" });
    const box = make("div", { class: "box" }, this.area, this.button);
    this.node = make("form", { class: "composer column" },
      make("div", { class: "tools" }, ...tools), box,
      make("p", { class: "hint" }, "Enter sends · Shift + Enter begins a line · Esc stops"));
    const send = () => {
      const text = this.area.value.trim();
      if (this.busy || !text) return;
      this.area.value = "";
      this.update();
      onsend(text);
    };
    this.node.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.busy) onstop();
      else send();
    });
    this.area.addEventListener("input", () => this.update());
    this.area.addEventListener("keydown", (event) => {
      // While an input method composes a character, Enter belongs to it.
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    this.setBusy(false);
  }

  setBusy(busy) {
    this.busy = busy;
    this.button.setAttribute("aria-label", busy ? "Stop" : "Send");
    this.button.replaceChildren(icon(busy ? "stop" : "send"));
    this.update();
  }

  update() {
    this.button.disabled = !this.busy && !this.area.value.trim();
    if (CSS.supports("field-sizing", "content")) return;
    this.area.style.height = "auto";
    this.area.style.height = `${this.area.scrollHeight}px`;
  }
}
