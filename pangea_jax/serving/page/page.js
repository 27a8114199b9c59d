// The page: a chat with the model of this server. page.py says what it gets; texts/ has its words.
//
// Texts of unknown origin (answers, questions, names of files) become text nodes, never markup.

import { readPicture, Unreadable } from "./pictures.js";
import { complete, Failure } from "./stream.js";

const find = (id) => document.getElementById(id);
const [scroll, log, ask, problem] = ["scroll", "log", "ask", "problem"].map(find);

const state = {
  info: null, // page.py's description of the model
  language: null, // one of info.languages
  texts: {}, // its texts
  history: [], // messages that the model reads with the next question
  pending: [], // data URLs of pictures of the next question
  running: null, // the AbortController of the answer that is coming
  ended: Promise.resolve(), // when that answer has ended
  key: "",
  atEnd: true, // whether the reader sees the end of the chat
};

// Texts ---------------------------------------------------------------------------------------------

/** A text of the current language. Values are isolated, so they do not turn the text round; several make a list. */
function text(key, values = {}) {
  const isolated = (value) => `\u2068${value}\u2069`;
  const filled = (_, name) => [values[name] ?? ""].flat().map(isolated).join(" · ");
  return state.texts[key].replace(/\{(\w+)\}/g, filled);
}

/** Puts a text into an element, and again whenever the language changes. */
function say(element, key, values = {}) {
  element.dataset.text = key;
  element.dataset.values = JSON.stringify(values);
  element.textContent = text(key, values);
}

function sayAll() {
  const values = (element) => JSON.parse(element.dataset.values ?? "{}");
  for (const element of document.querySelectorAll("[data-text]"))
    element.textContent = text(element.dataset.text, values(element));
  for (const [name, attribute] of [["label", "aria-label"], ["placeholder", "placeholder"], ["title", "title"], ["alt", "alt"]])
    for (const element of document.querySelectorAll(`[data-${name}]`))
      element.setAttribute(attribute, text(element.dataset[name], values(element)));
}

/** Shows what would not be seen, or would turn round other text, as its number; as pangea_jax/figures/inert.py. */
function visible(string) {
  const number = (character) => `<${character.codePointAt(0).toString(16).toUpperCase().padStart(2, "0")}>`;
  return string
    .replace(/\r\n?/g, "\n")
    .replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, number);
}

/** Shows a text as paragraphs, each in its own direction. Called again with more text, it adds to them. */
function showText(box, string) {
  const parts = visible(string).trimEnd().split(/\n\s*\n/);
  for (const [n, part] of parts.entries()) {
    if (!part) continue;
    const paragraph = box.children[n] ?? box.appendChild(make("p", { dir: "auto" }));
    if (paragraph.textContent !== part) paragraph.textContent = part;
  }
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Language ------------------------------------------------------------------------------------------

function listLanguages() {
  const order = new Intl.Collator("en");
  const sorted = [...state.info.languages].sort((a, b) => order.compare(a.name, b.name));
  for (const { code, name, direction } of sorted) {
    const option = make("option", { value: code, lang: code, dir: direction }, name);
    find("language").append(option);
  }
}

/** The language chosen before, or the first one of the browser's that the page has, or English. */
function firstLanguage() {
  const wanted = [recall("language"), ...navigator.languages].filter(Boolean);
  for (const tag of wanted.map((tag) => tag.toLowerCase()))
    for (const name of [tag, tag.split("-")[0]])
      for (const language of state.info.languages)
        if (language.code === name || language.aliases.includes(name)) return language.code;
  return "en";
}

async function setLanguage(code) {
  const texts = await load(`page/texts/${code}.json`);
  state.language = state.info.languages.find((language) => language.code === code);
  state.texts = texts;
  document.documentElement.lang = code;
  document.documentElement.dir = state.language.direction;
  find("language").value = code;
  remember("language", code);
  sayAll();
  say(find("about"), `about_${state.info.ability}`);
  const learnt = state.info.languages.filter((language) => state.info.learnt.includes(language.code));
  find("learnt").hidden = !learnt.length;
  say(find("learnt"), "learnt", { languages: learnt.map(({ name }) => name) });
  offerQuestions();
  nameDrawings();
}

function recall(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null; // the browser may forbid storage
  }
}

function remember(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {
    // The choice then lasts until the page is closed.
  }
}

async function load(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: status ${response.status}`);
  return response.json();
}

// Examples ------------------------------------------------------------------------------------------

const exampleQuestions = () => state.info.questions[state.language.code] ?? state.texts.questions;

function offerQuestions() {
  const buttons = exampleQuestions().map((question) => {
    const button = make("button", { type: "button" }, question);
    button.addEventListener("click", () => write(question));
    return button;
  });
  find("questions").replaceChildren(...buttons);
}

function offerDrawings() {
  for (const example of state.info.examples) {
    const image = make("img", { src: `page/${example.file}`, alt: "" });
    const button = make("button", { type: "button" }, image);
    button.addEventListener("click", () => askAbout(example));
    find("drawings").append(button);
  }
  find("drawings").hidden = !state.info.examples.length;
}

function nameDrawings() {
  for (const [n, { names }] of state.info.examples.entries()) {
    const code = state.language.code;
    const button = find("drawings").children[n];
    button.setAttribute("aria-label", names[code] ?? names.en);
    button.setAttribute("lang", names[code] ? code : "en");
  }
}

async function askAbout(example) {
  const file = await (await fetch(`page/${example.file}`)).blob();
  const picture = await readPicture(file, state.info.max_side);
  await send(exampleQuestions()[0], [picture]);
}

function giveCredit() {
  for (const credit of state.info.credits) {
    const link = (label, href) => make("a", { href, target: "_blank", rel: "noopener noreferrer" }, label);
    const who = make("bdi", { lang: "en", dir: "ltr" });
    who.append(link(credit.title, credit.url), `, ${credit.author}, `, link(credit.licence, credit.licence_url));
    who.title = credit.changed;
    find("credits").append(find("credits").hasChildNodes() ? " · " : "", who);
  }
}

// Pictures of the next question -----------------------------------------------------------------------

async function addPictures(files) {
  problem.hidden = true;
  for (const file of files) {
    if (state.pending.length >= state.info.max_pictures) {
      complain("too_many", { n: state.info.max_pictures });
      break;
    }
    try {
      state.pending.push(await readPicture(file, state.info.max_side));
    } catch (error) {
      if (!(error instanceof Unreadable)) throw error;
      complain("unreadable", { name: visible(file.name ?? "") });
    }
  }
  showPending();
  ask.focus();
}

function showPending() {
  const items = state.pending.map((url, n) => {
    const values = JSON.stringify({ n: n + 1 });
    const remove = make("button", { type: "button", "data-label": "remove", "data-values": values }, "×");
    remove.addEventListener("click", () => {
      state.pending.splice(n, 1);
      showPending();
      ask.focus();
    });
    return make("li", {}, make("img", { src: url, "data-alt": "picture", "data-values": values }), remove);
  });
  find("pending").replaceChildren(...items);
  find("pending").hidden = !items.length;
  sayAll();
}

function complain(key, values) {
  problem.hidden = false;
  say(problem, key, values);
}

// The chat ------------------------------------------------------------------------------------------

/** Asks the model. A running answer is stopped first. */
async function send(question, pictures) {
  state.running?.abort();
  await state.ended;
  for (const retry of log.querySelectorAll(".note button")) retry.remove();
  // A question that got no answer is forgotten.
  if (state.history.at(-1)?.role === "user") state.history.pop();
  if (pictures.length && state.info.pictures_start_chat && state.history.length) {
    state.history = [];
    const separator = make("p", { class: "separator" });
    say(separator, "new_chat");
    log.append(separator);
  }
  const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  const content = parts.length ? [...parts, { type: "text", text: question }] : question;
  state.history.push({ role: "user", content });
  showQuestion(question, pictures);
  state.ended = answer();
  await state.ended;
}

function addMessage(kind, speaker) {
  const name = make("h2", { class: "unseen" });
  say(name, speaker);
  const box = make("div", { class: "text" });
  const message = make("article", { class: `message ${kind}`, lang: state.language.code }, name, box);
  return { message, box };
}

function showQuestion(question, pictures) {
  const { message, box } = addMessage("user", "you");
  const images = pictures.map((url, n) => {
    const values = JSON.stringify({ n: n + 1 });
    return make("li", {}, make("img", { src: url, "data-alt": "picture", "data-values": values }));
  });
  if (images.length) box.before(make("ul", { class: "pictures" }, ...images));
  showText(box, question);
  log.append(message);
  sayAll();
  state.atEnd = true;
  followEnd();
}

/** Streams the answer to the last question of the history. It never throws: what goes wrong is shown. */
async function answer() {
  const { message, box } = addMessage("answer", "model");
  // Screen readers read the whole answer when it is no longer busy, not its pieces.
  message.setAttribute("aria-busy", "true");
  log.append(message);
  const controller = new AbortController();
  setRunning(controller);
  const { model, max_tokens } = state.info;
  const request = { model, messages: state.history, temperature: 0, ...(max_tokens && { max_tokens }) };
  const chat = state.history;
  let said = "";
  let note = null;
  try {
    for await (const { text: piece, finish } of complete(request, state.key, controller.signal)) {
      if (finish === "length") note = "cut";
      if (!piece) continue;
      said += piece;
      showText(box, said);
    }
    if (!said.trim()) note = "empty";
  } catch (error) {
    note = controller.signal.aborted ? "stopped" : error;
  }
  // A question without an answer stays last in the history, and can be asked again.
  const failed = note instanceof Error;
  if (said.trim() && !failed) chat.push({ role: "assistant", content: said });
  if (note?.kind === "key_needed") askForKey(message);
  else if (note) message.append(failed ? failure(note, message) : remark(note));
  message.removeAttribute("aria-busy");
  if (state.running === controller) setRunning(null);
}

function remark(key) {
  const note = make("p", { class: "note" });
  say(note, key);
  return note;
}

/** A sentence on what went wrong, what the server said, and a button to ask again. */
function failure(error, message) {
  if (!(error instanceof Failure)) console.error(error);
  const kind = error instanceof Failure ? error.kind : "failed";
  const words = make("span");
  say(words, kind);
  const note = make("div", { class: "note wrong" }, words);
  const retry = make("button", { type: "button" });
  say(retry, "retry");
  retry.addEventListener("click", () => askAgain(message));
  note.append(retry);
  if (error.detail) note.append(make("bdi", { class: "detail", lang: "en", dir: "auto" }, visible(error.detail)));
  return note;
}

async function askAgain(message) {
  // After another question or in a new chat, this one is no longer in the history.
  if (state.running || message !== log.lastElementChild) return;
  message.remove();
  ask.focus();
  state.ended = answer();
  await state.ended;
}

function askForKey(message) {
  const form = find("key-form");
  form.hidden = false;
  find("key").focus();
  form.onsubmit = (event) => {
    event.preventDefault();
    state.key = find("key").value.trim();
    form.hidden = true;
    askAgain(message);
  };
}

/** Keeps the end of the chat in sight, unless the reader has scrolled back. */
function followEnd() {
  if (state.atEnd && log.childElementCount) scroll.scrollTop = scroll.scrollHeight;
}

function setRunning(controller) {
  const [send, stop] = [find("send"), find("stop")];
  const hadFocus = [send, stop].includes(document.activeElement);
  state.running = controller;
  send.hidden = controller !== null;
  stop.hidden = controller === null;
  if (hadFocus) ask.focus(); // the button that had it is gone
  const status = find("status");
  if (controller) say(status, "answering");
  else {
    delete status.dataset.text;
    status.textContent = "";
  }
}

async function startOver() {
  state.running?.abort();
  await state.ended;
  state.history = [];
  state.pending = [];
  log.replaceChildren();
  problem.hidden = true;
  showPending();
  write("");
}

// Writing and sending -------------------------------------------------------------------------------

function write(question) {
  ask.value = question;
  fitHeight();
  ask.focus();
}

function fitHeight() {
  ask.dir = ask.value ? "auto" : ""; // its hint has the direction of the page
  ask.style.blockSize = "auto";
  ask.style.blockSize = `${ask.scrollHeight}px`;
}

function submit() {
  if (state.running || !state.info) return;
  const question = ask.value.trim();
  // Pictures alone are no question: one is proposed.
  if (!question && state.pending.length) return write(exampleQuestions()[0]);
  if (!question) return ask.focus();
  const pictures = state.pending;
  state.pending = [];
  problem.hidden = true;
  showPending();
  write("");
  send(question, pictures);
}

function listen() {
  find("language").addEventListener("change", (event) => setLanguage(event.target.value));
  find("new-chat").addEventListener("click", startOver);
  find("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  // The second click of a double click on "send" lands on "stop".
  find("stop").addEventListener("click", (event) => event.detail < 2 && state.running?.abort());
  ask.addEventListener("input", fitHeight);
  ask.addEventListener("keydown", (event) => {
    // While an input method composes a word, Enter belongs to it. Safari reports its last one as 229.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    submit();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && state.running?.abort());
  for (const [button, input] of [["add", "files"], ["photo", "camera"]]) {
    find(button).addEventListener("click", () => find(input).click());
    find(input).addEventListener("change", async ({ target }) => {
      await addPictures([...target.files]);
      target.value = ""; // the same file can be chosen again
    });
  }
  listenForFiles();
  let before = 0;
  scroll.addEventListener("scroll", () => {
    const { scrollTop, scrollHeight, clientHeight } = scroll;
    // The event may come after the chat has grown; only the reader scrolls back.
    if (scrollHeight - scrollTop - clientHeight < 80) state.atEnd = true;
    else if (scrollTop < before) state.atEnd = false;
    before = scrollTop;
  });
  // The chat grows with each piece and each picture, and its window shrinks when the question grows.
  const observer = new ResizeObserver(followEnd);
  observer.observe(log);
  observer.observe(scroll);
}

/** Pictures that are pasted, or dropped anywhere on the page. */
function listenForFiles() {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    addPictures(files);
  });
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!hasFiles(event)) return;
    event.preventDefault();
    addPictures([...event.dataTransfer.files]);
  });
}

async function start() {
  state.info = await load("page/info.json");
  find("model").textContent = visible(state.info.model);
  listLanguages();
  offerDrawings();
  giveCredit();
  await setLanguage(firstLanguage());
  listen();
  if (matchMedia("(pointer: fine)").matches) ask.focus();
}

start();
