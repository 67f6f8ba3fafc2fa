// Keeps pages live, brings the parts that take longer, and sends what buttons ask for. Everything else is in the pages.
"use strict";

const own = { "x-outhaul-page": "1" };

// Shows times in the viewer's zone.
function showTimes(within) {
  for (const time of within.querySelectorAll("time:not([title])")) {
    const moment = new Date(time.dateTime);
    time.title = time.textContent;
    const today = moment.toDateString() === new Date().toDateString();
    time.textContent = today ? moment.toLocaleTimeString() : moment.toLocaleString();
  }
}

// Makes an element like another one, and leaves alone what is the same: what is selected or scrolled in it stays so.
function liken(part, other) {
  for (const { name } of [...part.attributes]) if (!other.hasAttribute(name)) part.removeAttribute(name);
  for (const { name, value } of other.attributes) {
    if (part.getAttribute(name) !== value) part.setAttribute(name, value);
  }
  const [olds, news] = [[...part.childNodes], [...other.childNodes]];
  for (const [at, node] of news.entries()) {
    const old = olds[at];
    if (!old) part.append(node);
    // What is clicked must not become another one.
    else if (old.nodeName !== node.nodeName || old.dataset?.get !== node.dataset?.get) old.replaceWith(node);
    else if (node.nodeType === Node.ELEMENT_NODE) liken(old, node);
    else if (old.data !== node.data) old.data = node.data;
  }
  for (const old of olds.slice(news.length)) old.remove();
}

// Whether a part was not put in its place, since a download was under way in it.
let isMissing = false;

// Puts a new state of a part in its place; what has the focus there keeps it.
function put(part, html) {
  if (part.querySelector("button[aria-disabled]")) {
    isMissing = true;
    return;
  }
  const focused = part.contains(document.activeElement) ? document.activeElement : null;
  const key = focused && (focused.getAttribute("href") || focused.dataset.get || focused.tagName);
  const fresh = part.cloneNode(false);
  fresh.innerHTML = html;
  showTimes(fresh);
  liken(part, fresh);
  if (key) {
    const all = part.querySelectorAll("a, button, [tabindex]");
    for (const one of all) {
      if ((one.getAttribute("href") || one.dataset.get || one.tagName) === key) {
        one.focus({ preventScroll: true });
        break;
      }
    }
  }
}

const connection = document.getElementById("connection");
let events = null;
let isOver = false;

function say(text, kind) {
  // The same once more would be read out once more.
  if (connection.textContent !== text) connection.textContent = text;
  connection.className = kind;
}

function take(event) {
  say("live", "live");
  for (const [id, html] of Object.entries(JSON.parse(event.data))) {
    const part = document.getElementById(id);
    if (part) put(part, html);
  }
}

// Follows the page's subject while it is looked at.
function follow() {
  const address = connection.dataset.live;
  const hidden = document.visibilityState === "hidden";
  if (!address || isOver || hidden) {
    if (events) events.close();
    events = null;
    return;
  }
  if (events) return;
  const source = new EventSource(address);
  events = source;
  events.addEventListener("parts", take);
  events.addEventListener("over", (event) => {
    take(event);
    isOver = true;
    events.close();
    events = null;
    say("", "");
  });
  events.onerror = () => {
    if (source.readyState !== EventSource.CLOSED) return say("reconnecting…", "lost");
    // It was answered, and not with events: then the browser gives up.
    say("not live: the daemon refused, or too many pages are live; trying again…", "lost");
    if (events === source) events = null;
    setTimeout(follow, 10000);
  };
}

// Gets all parts again.
function followAgain() {
  if (events) events.close();
  events = null;
  isOver = false;
  follow();
}

async function load(part) {
  try {
    const answer = await fetch(part.dataset.load, { headers: own });
    if (!answer.ok) throw new Error(answer.statusText);
    put(part, await answer.text());
  } catch (error) {
    part.textContent = "This part could not be loaded: " + error.message;
  }
}

async function bring(button) {
  const said = button.nextElementSibling;
  // Not disabled: that would take the focus away.
  button.setAttribute("aria-disabled", "true");
  said.className = "got";
  said.textContent = "downloading…";
  let text;
  try {
    const answer = await fetch("/get", {
      method: "POST",
      headers: { ...own, "content-type": "application/json" },
      body: JSON.stringify({ paths: [button.dataset.get] }),
    });
    text = answer.ok ? await answer.json() : { error: (await answer.text()).trim() };
  } catch (error) {
    text = { error: "The daemon did not answer: " + error.message };
  }
  button.removeAttribute("aria-disabled");
  said.textContent = text.error || "on disk";
  said.className = text.error ? "got bad" : "got good";
  if (!text.error) {
    const state = button.closest("tr, main")?.querySelector(".state");
    if (state) {
      state.textContent = "on disk";
      state.className = "state on disk";
    }
    said.tabIndex = -1;
    said.focus();
    button.remove();
  }
  if (isMissing && !document.querySelector("button[aria-disabled]")) {
    isMissing = false;
    followAgain();
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-get]");
  if (button && !button.hasAttribute("aria-disabled")) bring(button);
});

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, select, textarea");
  const search = document.getElementById("q");
  if (event.key === "/" && search && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    search.focus();
  }
});

document.addEventListener("visibilitychange", follow);
window.addEventListener("pagehide", () => events?.close());
window.addEventListener("pageshow", (event) => {
  if (event.persisted) {
    events = null;
    follow();
  }
});
showTimes(document);
for (const part of document.querySelectorAll("[data-load]")) load(part);
follow();
