// A conversation with the base or one of its adapters.

import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { choice, follower, make } from "./dom.js";
import { openSettings, shownTemperature } from "./settings.js";

const EXAMPLES = [
  "Why is the sky blue?",
  "Write a haiku about the sea.",
  "How do I boil an egg?",
];

export function showChat(view, models, base, chosen) {
  const scroll = make("div", { class: "scroll" });
  const state = { model: chosen };
  const empty = make("div", { class: "empty" },
    make("h1", {}, "Ask it something"),
    make("p", {}, models.length > 1
      ? "Switch the adapter on and off between two answers: the difference is what was trained."
      : `${base} answers as it is; no adapter was loaded.`),
    make("div", { class: "examples" }, ...EXAMPLES.map((text) =>
      make("button", { type: "button", onclick: () => talk.send(text) }, text))));

  const fresh = make("button", { class: "quiet small", type: "button", onclick: () => {
    talk.clear();
    composer.area.focus();
  } }, "New chat");
  const temperature = make("button", { class: "quiet small temperature", type: "button", "aria-haspopup": "dialog",
    onclick: () => openSettings() });
  const showTemperature = () => { temperature.textContent = `Temperature ${shownTemperature()}`; };
  showTemperature();
  const tools = [make("div", { class: "right" }, fresh, temperature)];
  if (models.length > 1) {
    const options = models.map((name) => [name, name === base ? "off" : name]);
    tools.unshift(choice("Adapter", "chat-model", options, chosen, (name) => { state.model = name; }));
  }
  const composer = new Composer({
    label: "Your message",
    placeholder: "Write a message",
    onsend: (text) => talk.send(text),
    onstop: () => talk.stop(),
    tools,
  });
  const talk = new Conversation({
    model: () => state.model,
    scroll: follower(scroll),
    label: "Conversation",
    onchange: () => {
      composer.setBusy(talk.busy);
      empty.hidden = talk.node.childElementCount > 0;
      fresh.hidden = !empty.hidden;
    },
  });
  fresh.hidden = true;
  scroll.append(make("div", { class: "column" }, empty, talk.node));
  view.replaceChildren(scroll, composer.node);
  return { focus: () => composer.area.focus(), stop: () => talk.stop(), settingsChanged: showTemperature };
}
