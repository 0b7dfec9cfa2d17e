// Asks the server for pairs, plays them, and sends the answers. An answer is kept until the server has it.
import {frames, prepare} from "./drawings.js";

const AGAIN = {held: 15000, nothing: 3000, gone: 2000};  // milliseconds until the server is asked again
const LOOK = 250;  // for which a new pair takes no answer: a key that is pressed twice is not one to the next pair
const REST = 0.8;  // seconds for which the last step stays
const KEYS = {
  ArrowLeft: "1", 1: "1", ArrowRight: "0", 2: "0", ArrowUp: "0.5", "=": "0.5", ArrowDown: "null", s: "null", S: "null",
};
const SAID = {1: "Left is better", 0: "Right is better", 0.5: "Equally good", null: "Skipped"};

const find = (name) => document.getElementById(name);
const figures = [...document.querySelectorAll("figure")];
const kept = (name) => localStorage.getItem(`bilevel_jax.${name}`);
const keep = (name, value) => value === null ? localStorage.removeItem(`bilevel_jax.${name}`) : localStorage.setItem(`bilevel_jax.${name}`, value);

let settings = read(document);
let name = kept("name");
let pending = JSON.parse(kept("pending"));  // an answer that the server has not confirmed
let busy = false;  // one request at a time
let timer;
let file = null;
let pair = null;  // what is shown: number, clips, drawers, and when it came
let paused = false;
let began = 0;  // when the clips began to play, or for how long they had played when they were paused

function read(page) {
  return JSON.parse(page.querySelector("meta[name=settings]")?.content ?? "null");
}

function say(words, warning = false) {
  if (find("message").textContent !== words) find("message").textContent = words;
  find("message").classList.toggle("warning", warning);
}

const gone = () => find("message").classList.contains("warning");

// The server.

class Refused extends Error {}
class Gone extends Error {}

async function request(path, options = {}) {
  try {
    return await fetch(path, {...options, signal: AbortSignal.timeout(15000)});
  } catch {
    throw new Gone("The server does not answer.");
  }
}

async function post(path, body, again = true) {
  const headers = {"Content-Type": "application/json", "X-Token": settings.token};
  const response = await request(path, {method: "POST", headers, body: JSON.stringify(body)});
  if (response.status === 403 && again) {  // the server was started anew and has another token
    const page = await request("/");
    settings = read(new DOMParser().parseFromString(await page.text(), "text/html")) ?? settings;
    return post(path, body, false);
  }
  const answer = await response.json();
  if (response.status >= 500) throw new Gone(`The server cannot go on: ${answer.error}.`);
  if (!response.ok) throw new Refused(answer.error);
  return answer;
}

async function turn(path = "/next", words = null, warning = false) {
  if (busy || name === null) return;
  busy = true;
  clearTimeout(timer);
  enable();
  let next = [];
  let wait = AGAIN.held;
  try {
    if (pending !== null) {
      const sent = pending;
      const message = await post("/label", sent);
      forget();
      if (sent.by === name) show(message, `${SAID[sent.value]}: written.`);
      else wait = 0;  // it was given under another name, whose next pair this is
    } else {
      show(await post(path, {by: name, file, holding: pair?.number ?? null}), words, warning);
    }
    if (pair === null) wait = Math.min(wait, AGAIN.nothing);
  } catch (error) {
    wait = AGAIN.gone;
    if (error instanceof Refused) {
      forget();
      next = ["/next", `Not done. ${error.message}.`, true];
      say(next[1], true);
    } else if (error instanceof Gone) {
      say(`${error.message} ${pending === null ? "The page goes on when it can." : "Your answer is kept and sent when it can be."}`, true);
    } else {
      throw error;
    }
  } finally {
    busy = false;
    enable();
    // A page that nobody looks at does not keep its pair from others.
    timer = setTimeout(() => { if (!document.hidden || pair === null || pending !== null) turn(...next); }, wait);
  }
}

function forget() {
  pending = null;
  keep("pending", null);
  figures.forEach((figure) => figure.classList.remove("chosen"));
}

function answer(value) {
  if (busy || pending !== null || pair === null || performance.now() - pair.came < LOOK) return;
  pending = {by: name, file, pair: pair.number, value: JSON.parse(value)};
  keep("pending", JSON.stringify(pending));
  if (value === "1" || value === "0.5") figures[0].classList.add("chosen");
  if (value === "0" || value === "0.5") figures[1].classList.add("chosen");
  turn();
}

function undo() {
  if (busy || name === null) return;
  if (pending !== null) {  // the server is gone
    forget();
    say("Taken back, nothing was sent.");
    enable();
    return;
  }
  turn("/undo", "Your last answer is taken back. This is its pair.");
}

// What is shown.

function show(message, words = null, warning = false) {
  file = message.file;
  const {mine, skipped, all, pairs, left} = message.counts;
  const counted = `${mine} answered by you${skipped ? ` (${skipped} skipped)` : ""} · ${all} of ${pairs} labelled by anyone · ${left} left for you`;
  if (find("counter").textContent !== counted) find("counter").textContent = counted;
  find("question").textContent = message.question ?? "Which clip is better?";
  find("legend").replaceChildren(...message.legend.map(({name, colour}) => {
    const item = document.createElement("li");
    const swatch = document.createElement("canvas");
    const g = swatch.getContext("2d");
    g.fillStyle = colour;
    g.fillRect(0, 0, swatch.width, swatch.height);
    item.append(swatch, name);
    return item;
  }));
  find("legend").hidden = !message.legend.length;
  const {count, lines} = message.refused;
  find("refused").hidden = !count;
  find("refused").querySelector("summary").textContent = `${count} ${count === 1 ? "line" : "lines"} of the file cannot be used`;
  find("refused").querySelector("ul").replaceChildren(...lines.map(({line, reason}) => {
    const item = document.createElement("li");
    item.textContent = `line ${line}: ${reason}`;
    return item;
  }));
  if (message.pair === null) {
    pair = null;
    const nothing = pairs ? "Nothing is left for you. New pairs appear here as they come." : "There are no pairs yet. They appear here as they come.";
    words = words === null ? nothing : `${words} ${nothing}`;
  } else if (message.pair.clips !== null) {
    const clips = message.pair.clips;
    const length = Math.max(1, ...clips.map((clip) => Math.max(clip.length, frames(clip))));
    pair = {number: message.pair.number, clips, length, draw: prepare(clips, message.environment, message.actions), came: performance.now(), drawn: null};
    began = paused ? 0 : performance.now();
    words ??= "";
  } else if (gone()) {
    words ??= "The server is back.";
  }
  if (words !== null) say(words, warning);
  find("task").hidden = pair === null;
  find("task").dataset.pair = pair === null ? "" : pair.number;
}

function enable() {
  const waits = busy || pending !== null || pair === null;
  for (const button of document.querySelectorAll("[data-value]")) button.ariaDisabled = waits ? "true" : "false";
  find("skip").hidden = find("pause").hidden = pair === null;
}

function play(now) {
  requestAnimationFrame(play);
  if (pair === null) return;
  const played = (paused ? began : now - began) / 1000;
  const length = pair.length / settings.fps + REST;
  const tick = Math.min(pair.length - 1, Math.max(0, Math.floor(played % length * settings.fps)));
  const size = `${tick} ${figures[0].clientWidth} ${window.devicePixelRatio} ${matchMedia("(prefers-color-scheme: dark)").matches}`;
  if (pair.drawn === size) return;
  pair.drawn = size;
  figures.forEach((figure, side) => {
    const canvas = figure.querySelector("canvas");
    figure.querySelector("span").textContent = pair.draw[side](canvas, tick);
    canvas.ariaLabel = `${side ? "Right" : "Left"} clip, ${pair.clips[side].steps} steps`;
  });
}

function pause() {
  paused = !paused;
  began = performance.now() - began;
  find("pause").ariaPressed = String(paused);
  find("pause").lastChild.textContent = paused ? " Play" : " Pause";
}

function ask() {
  find("entry").value = name ?? settings.by;
  find("naming").showModal();
}

function greet() {
  find("person").hidden = name === null;
  find("name").textContent = name ?? "";
}

find("naming").addEventListener("cancel", (event) => { if (name === null) event.preventDefault(); });
find("naming").addEventListener("submit", (event) => {
  event.preventDefault();
  const entered = find("entry").value.trim();
  if (!entered) return;
  if (entered !== name) pair = null;  // what the other one looked at stays theirs
  name = entered;
  keep("name", name);
  find("naming").close();
  greet();
  turn();
});
find("rename").addEventListener("click", ask);
find("undo").addEventListener("click", undo);
find("pause").addEventListener("click", pause);
for (const button of document.querySelectorAll("[data-value]")) button.addEventListener("click", () => answer(button.dataset.value));
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || find("naming").open) return;
  if (event.key in KEYS) answer(KEYS[event.key]);
  else if (event.key === "u" || event.key === "U" || event.key === "Backspace") undo();
  else if (event.key === " " && !event.target.closest("button, summary")) pause();
  else return;
  event.preventDefault();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) turn(); });

greet();
enable();
requestAnimationFrame(play);
if (name === null) ask();
else turn();
