// The same messages to two models, answers side by side; each side keeps its own history.

import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { follower, make, select } from "./dom.js";

export function showCompare(view, models, base) {
  if (models.length < 2) {
    view.replaceChildren(make("div", { class: "column" }, make("div", { class: "empty" },
      make("h1", {}, "Nothing to compare with"),
      make("p", {}, `Only ${base} is loaded. Start the server with an adapter (--workdir or --adapter).`))));
    return { focus() {}, stop() {} };
  }
  const scroll = make("div", { class: "scroll" });
  const follow = follower(scroll);
  const changed = () => composer.setBusy(sides.some(({ talk }) => talk.busy));
  const sides = [["Left", models[0]], ["Right", models[1]]].map(([label, name]) => {
    const who = select(`${label} model`, models, name);
    const talk = new Conversation({ model: () => who.value, scroll: follow, label: `${label} answers`, onchange: () => changed() });
    return { talk, node: make("section", { class: "side", "aria-label": label }, make("header", {}, who), talk.node) };
  });
  const fresh = make("button", { class: "quiet small", type: "button", onclick: () => {
    sides.forEach(({ talk }) => talk.clear());
    composer.area.focus();
  } }, "Start again");
  const composer = new Composer({
    label: "A message to both",
    placeholder: "Write a message to both",
    onsend: (text) => sides.forEach(({ talk }) => talk.send(text)),
    onstop: () => sides.forEach(({ talk }) => talk.stop()),
    tools: [make("div", { class: "right" }, fresh)],
  });
  scroll.append(make("div", { class: "column wide compare" },
    make("div", { class: "pair" }, ...sides.map(({ node }) => node))));
  view.replaceChildren(scroll, composer.node);
  return { focus: () => composer.area.focus(), stop: () => sides.forEach(({ talk }) => talk.stop()) };
}
