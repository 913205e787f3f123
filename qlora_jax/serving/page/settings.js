// What the reader has chosen; kept in this browser, but for the token, which this tab alone keeps.

import { byId } from "./dom.js";

const KEY = "qlora_jax.settings";
const DEFAULTS = { system: "", temperature: 0.7, maxTokens: 512 };

function stored(storage, key, fallback) {
  try {
    return JSON.parse(storage.getItem(key)) ?? fallback;
  } catch {
    return fallback;
  }
}

function keep(storage, key, value) {
  try {
    storage.setItem(key, JSON.stringify(value));
  } catch { /* storage is full or switched off: then nothing is kept */ }
}

export const settings = { ...DEFAULTS, ...stored(localStorage, KEY, {}), token: stored(sessionStorage, `${KEY}.token`, "") };

function save() {
  const { token, ...rest } = settings;
  keep(localStorage, KEY, rest);
  keep(sessionStorage, `${KEY}.token`, token);
}

let most = Infinity;

/** Takes note of what the server gives: a longer answer would be refused, not cut. */
export function limitAnswers({ max_new_tokens: tokens, max_model_len: context }) {
  most = Math.min(tokens, Math.floor(context / 2));
}

export const longestAnswer = () => Math.min(settings.maxTokens, most);

export const shownTemperature = () => settings.temperature.toFixed(2);

/** Connects the dialog; `onchange` is called whenever it closes. */
export function connectSettings(onchange) {
  const dialog = byId("settings");
  const show = () => { byId("temperature-shown").value = shownTemperature(); };
  byId("temperature").addEventListener("input", (event) => {
    settings.temperature = Number(event.target.value);
    show();
  });
  byId("open-settings").addEventListener("click", () => openSettings());
  dialog.addEventListener("close", () => {
    settings.system = byId("system").value.trim();
    settings.maxTokens = Math.max(1, Math.round(Number(byId("max-tokens").value)) || DEFAULTS.maxTokens);
    settings.token = byId("token").value.trim();
    save();
    onchange();
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
}

/** Opens the dialog, at the token where one is missing. */
export function openSettings({ needsToken = false } = {}) {
  byId("system").value = settings.system;
  byId("temperature").value = settings.temperature;
  byId("temperature-shown").value = shownTemperature();
  byId("max-tokens").value = settings.maxTokens;
  byId("token").value = settings.token;
  if (needsToken || settings.token) byId("token-field").hidden = false;
  if (!byId("settings").open) byId("settings").showModal();
  if (needsToken) byId("token").focus();
}
