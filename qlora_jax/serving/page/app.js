// Starts the page: asks who is there, builds the views, and lets one switch between them.

import { get } from "./api.js";
import { showChat } from "./chat.js";
import { showCompare } from "./compare.js";
import { byId, notify } from "./dom.js";
import { showGame } from "./game.js";
import { connectSettings, limitAnswers, openSettings } from "./settings.js";

const NAMES = ["chat", "compare", "game"];
const views = {};
let current = "chat";

function show(name, focusTab = false) {
  current = name;
  for (const other of NAMES) {
    const tab = byId(`tab-${other}`);
    tab.setAttribute("aria-selected", String(other === name));
    tab.tabIndex = other === name ? 0 : -1;
    byId(`view-${other}`).hidden = other !== name;
  }
  document.title = `${byId(`tab-${name}`).textContent} · qlora_jax`;
  if (focusTab) byId(`tab-${name}`).focus();
}

function connectTabs() {
  for (const [i, name] of NAMES.entries()) {
    const tab = byId(`tab-${name}`);
    tab.addEventListener("click", () => {
      show(name);
      views[name]?.focus();
    });
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const ends = { Home: 0, End: NAMES.length - 1 }[event.key];
      if (step === undefined && ends === undefined) return;
      event.preventDefault();
      show(NAMES[ends ?? (i + step + NAMES.length) % NAMES.length], true);
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !byId("settings").open) views[current]?.stop();
  });
}

async function start() {
  notify("");
  let models;
  try {
    models = (await get("/v1/models")).data;
    limitAnswers(models[0]);
    const names = models.map(({ id }) => id);
    const base = models.find(({ parent }) => !parent).id;
    byId("base-name").textContent = base;
    byId("base-name").title = base;
    views.chat = showChat(byId("view-chat"), names, base, names[1] ?? base);
    views.compare = showCompare(byId("view-compare"), names, base);
    views.game = await showGame(byId("view-game"));
    // On a phone that would open the keyboard over half of the page.
    if (matchMedia("(hover: hover)").matches) views[current].focus();
  } catch (error) {
    if (error.status === 401) openSettings({ needsToken: true });
    notify(error.status === 401 ? "This server asks for its access token." : error.message);
  }
}

connectTabs();
connectSettings(() => {
  if (!views.chat) start();
  views.chat?.settingsChanged();
});
start();
