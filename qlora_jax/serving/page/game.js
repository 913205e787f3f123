// Tell them apart: two anonymous answers, a vote, and only then the names.

import { get, post, stream } from "./api.js";
import { announce, choice, make, notify, select, showText } from "./dom.js";
import { longestAnswer, settings } from "./settings.js";

const SIDES = ["a", "b"];

export async function showGame(view) {
  let state;
  try {
    state = await get("/game");
  } catch (error) {
    if (error.status !== 404) throw error;
    view.replaceChildren(make("div", { class: "column" }, make("div", { class: "empty" }, make("h1", {}, "The game is switched off"))));
    return { focus() {}, stop() {} };
  }
  return new Game(view, state);
}

class Game {
  constructor(view, state) {
    this.live = state.models.length > 1;
    this.stored = state.stored_questions > 0;
    this.source = this.live ? "live" : "stored";
    this.controller = null;
    this.votable = null;

    this.area = make("textarea", { rows: "3", "aria-label": "Your question", placeholder: "A question to both", maxlength: "200000" });
    this.area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.start();
      }
    });
    this.players = state.models.length > 1 ? state.models.slice(0, 2).map((name, i) =>
      select(i ? "Second player" : "First player", state.models, name)) : [];
    this.who = make("p", { class: "players", hidden: state.models.length < 3 },
      make("span", {}, "Between"), ...this.players.flatMap((p, i) => (i ? [make("span", {}, "and"), p] : [p])));
    this.go = make("button", { class: "primary", type: "button", onclick: () => (this.controller ? this.stop() : this.start()) });
    this.again = make("button", { class: "primary", type: "button", hidden: true, onclick: () => this.reset() }, "Next round");
    this.ask = make("div", { class: "ask" });
    if (this.live && this.stored) {
      const options = [["live", "Ask them now"], ["stored", `From files (${state.stored_questions})`]];
      this.ask.append(choice("Answers", "game-source", options, "live", (value) => {
        this.source = value;
        this.reset();
      }));
    }
    this.ask.append(this.who, this.area, make("div", { class: "actions" }, this.go));

    this.question = make("p", { class: "question", tabindex: "-1", hidden: true });
    this.sides = Object.fromEntries(SIDES.map((side) => [side, new Side(side)]));
    this.pair = make("div", { class: "pair", hidden: true }, ...SIDES.map((side) => this.sides[side].node));
    const buttons = [["a", "A is better", ""], ["tie", "Equally good", "tie"], ["b", "B is better", ""]];
    this.votes = make("div", { class: "votes", role: "group", "aria-label": "Your vote", hidden: true },
      ...buttons.map(([winner, label, kind]) =>
        make("button", { type: "button", class: kind, onclick: () => this.vote(winner) }, label)));
    this.next = make("div", { class: "votes" }, this.again);
    this.score = make("div");
    this.showScore(state);

    const lead = this.live || this.stored
      ? "Two answers without names. Choose the better one, and then see who wrote which."
      : "It takes two: start the server with an adapter (--workdir, --adapter) or with stored answers (--answers).";
    view.replaceChildren(make("div", { class: "scroll" }, make("div", { class: "column wide game" },
      make("div", {}, make("h1", {}, "Tell them apart"), make("p", { class: "lead" }, lead)),
      this.ask, this.question, this.pair, this.votes, this.next, this.score)));
    this.ask.hidden = !(this.live || this.stored);
    this.reset();
  }

  focus() {
    (this.source === "live" ? this.area : this.go).focus();
  }

  stop() {
    this.controller?.abort();
  }

  reset() {
    this.stop();
    this.votable = null;
    this.area.value = "";
    const live = this.source === "live";
    this.area.hidden = !live;
    this.who.hidden = !live || this.players.length === 0 || this.players[0].options.length < 3;
    this.go.textContent = live ? "Ask both" : "Draw a question";
    for (const node of [this.question, this.pair, this.votes, this.again]) node.hidden = true;
    this.ask.hidden = !(this.live || this.stored);
    this.go.hidden = false;
    this.focus();
  }

  async start() {
    const body = this.body();
    if (this.controller || !body) return;
    notify("");
    const controller = new AbortController();
    this.controller = controller;
    this.go.textContent = "Stop";
    SIDES.forEach((side) => this.sides[side].begin());
    let round = null;
    try {
      for await (const event of stream("/game/rounds", body, controller.signal)) {
        if (event.round) {
          round = event.round;
          this.question.textContent = event.question;
          this.question.hidden = this.pair.hidden = false;
        } else {
          this.sides[event.side].take(event);
        }
      }
    } catch (error) {
      this.controller = null;
      SIDES.forEach((side) => this.sides[side].end());
      if (error.name === "AbortError") this.abandon();
      else {
        this.abandon();
        notify(error.message);
      }
      return;
    }
    this.controller = null;
    this.votable = round;
    this.ask.hidden = true;
    this.votes.hidden = false;
    this.setVoting(true);
    announce("Both answers are complete. Choose the better one.");
    this.votes.firstElementChild.focus({ preventScroll: true });
    this.votes.scrollIntoView({ block: "nearest" });
  }

  body() {
    if (this.source === "stored") return { stored: true };
    const prompt = this.area.value.trim();
    if (!prompt) {
      this.area.focus();
      return null;
    }
    return {
      prompt,
      models: this.players.map((player) => player.value),
      system: settings.system || undefined,
      temperature: settings.temperature,
      max_tokens: longestAnswer(),
    };
  }

  abandon() {
    this.go.textContent = this.source === "live" ? "Ask both" : "Draw a question";
    this.question.hidden = this.pair.hidden = true;
    announce("The round was stopped.");
  }

  setVoting(enabled) {
    for (const button of this.votes.children) button.disabled = !enabled;
  }

  async vote(winner) {
    if (!this.votable) return;
    this.setVoting(false);
    let result;
    try {
      result = await post("/game/votes", { round: this.votable, winner });
    } catch (error) {
      notify(error.message);
      if (error.status === 404) this.reset();
      else this.setVoting(true);
      return;
    }
    this.votable = null;
    SIDES.forEach((side) => this.sides[side].reveal(result[side], winner === side));
    this.votes.hidden = true;
    this.again.hidden = false;
    this.showScore(result);
    const verdict = winner === "tie" ? "A tie." : `You chose ${result[winner]}.`;
    announce(`${verdict} A was ${result.a}, B was ${result.b}.`);
    this.again.focus({ preventScroll: true });
  }

  showScore({ votes, score }) {
    if (!votes) {
      this.score.replaceChildren();
      return;
    }
    const head = ["", "won", "tied", "lost", ""].map((label) => make("th", { scope: "col" }, label));
    const rows = score.map(({ model, wins, ties, losses }) => {
      const total = wins + ties + losses;
      const parts = [wins, ties].map((count) => {
        const part = make("i");
        part.style.setProperty("--part", count / total);
        return part;
      });
      return make("tr", {}, make("th", { scope: "row" }, model),
        ...[wins, ties, losses].map((count) => make("td", {}, String(count))),
        make("td", {}, make("div", { class: "share", "aria-hidden": "true" }, ...parts)));
    });
    this.score.replaceChildren(make("table", { class: "score" },
      make("caption", {}, `Score after ${votes} ${votes === 1 ? "vote" : "votes"}`),
      make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
  }
}

/** One anonymous answer. */
class Side {
  constructor(side) {
    this.name = make("h2", { class: "name" });
    this.won = make("span", { class: "won" });
    this.text = make("div", { class: "text" });
    this.body = make("div", { class: "answer" }, this.text);
    this.node = make("section", { class: "side", "aria-label": `Answer ${side.toUpperCase()}`, "aria-live": "polite" },
      make("header", {}, make("span", { class: "badge" }, side.toUpperCase()), this.name, this.won), this.body);
  }

  begin() {
    this.content = "";
    this.growing = document.createTextNode("");
    this.text.replaceChildren(this.growing);
    this.name.textContent = this.won.textContent = "";
    this.node.classList.remove("winner");
    this.node.setAttribute("aria-busy", "true");
  }

  take(event) {
    if (event.text) {
      this.content += event.text;
      this.growing.appendData(event.text);
    }
    if (event.finish_reason) this.end();
  }

  end() {
    this.node.setAttribute("aria-busy", "false");
    showText(this.text, this.content || "(no text)");
  }

  reveal(name, won) {
    this.name.textContent = name;
    this.won.textContent = won ? "Your choice" : "";
    this.node.classList.toggle("winner", won);
  }
}
