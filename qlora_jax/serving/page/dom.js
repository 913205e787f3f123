// Builds the page out of nodes. Text only ever enters as text: nothing here parses markup, and the
// page's policy (require-trusted-types-for) makes the browser refuse it, too.

/** Makes an element: attributes and listeners by name, then children (nodes or texts). */
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Says something to those who hear the page. */
export function announce(text) {
  byId("status").textContent = text;
}

/** Shows what went wrong, or with "" nothing. */
export function notify(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

const ICONS = {
  send: "M10 16V4m0 0L5 9m5-5 5 5",
  stop: "M6 6h8v8H6z",
};

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  for (const [key, value] of [["viewBox", "0 0 20 20"], ["width", "20"], ["height", "20"], ["aria-hidden", "true"]]) {
    svg.setAttribute(key, value);
  }
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", ICONS[name]);
  svg.classList.toggle("solid", name === "stop");
  svg.append(path);
  return svg;
}

/** A choice of one: radio buttons. `options` are [value, label]. */
export function choice(legend, name, options, chosen, onchange) {
  const labels = options.map(([value, label]) =>
    make("label", { title: label },
      make("input", { type: "radio", name, value, checked: value === chosen, onchange: () => onchange(value) }),
      make("span", {}, label)));
  return make("fieldset", { class: "choice" }, make("legend", {}, legend), make("div", { class: "options" }, ...labels));
}

export function select(label, names, chosen, onchange = () => {}) {
  const node = make("select", { "aria-label": label, onchange: () => onchange(node.value) },
    ...names.map((name) => make("option", { value: name, selected: name === chosen }, name)));
  return node;
}

/** Puts a complete answer into a node; what stands between ``` fences becomes blocks of code. */
export function showText(node, text) {
  const parts = text.split(/^```[^\n`]*\n([\s\S]*?)\n?^```[ \t]*$\n?/m);
  // The margin of a block stands for the empty lines around it.
  const plain = (part, i) => part.slice(i ? part.search(/[^\n]|$/) : 0).replace(i < parts.length - 1 ? /\n+$/ : /$^/, "");
  node.replaceChildren(...parts.map((part, i) =>
    i % 2 ? make("pre", { tabindex: "0" }, make("code", {}, part)) : document.createTextNode(plain(part, i))));
}

/** Keeps a scrolling box at its end, unless its reader has scrolled away from there. */
export function follower(box) {
  let follows = true;
  box.addEventListener("scroll", () => {
    follows = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  }, { passive: true });
  return (force = false) => {
    if (force) follows = true;
    if (follows) box.scrollTop = box.scrollHeight;
  };
}
