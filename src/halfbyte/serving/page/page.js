"use strict";
// One conversation with the model of this server. Nothing is kept: closing the page forgets it.

const $ = (id) => document.getElementById(id);
const messages = [];
let facts = { model: "", pictures: false, key: false };
let pictures = [];
let running = null; // AbortController of the answer that is being written

function headers() {
  const found = { "Content-Type": "application/json" };
  const key = $("key").value.trim();
  if (key) found.Authorization = `Bearer ${key}`;
  return found;
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Follow the text while it grows, unless the reader has scrolled up.
function atEnd() {
  const talk = $("talk");
  return talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
}
function toEnd() {
  $("talk").scrollTop = $("talk").scrollHeight;
}

function show(role, text, shown) {
  const article = element("article", role);
  for (const url of shown || []) {
    const image = element("img");
    image.src = url;
    image.alt = "a picture";
    article.append(image);
  }
  article.append(element("div", "text", text));
  $("talk").append(article);
  toEnd();
  return article;
}

function addFooter(article, note, isError) {
  const footer = element("footer");
  const copy = element("button", "copy", "Copy");
  copy.type = "button";
  copy.addEventListener("click", async () => {
    await copyText(article.querySelector(".text").textContent);
    copy.textContent = "Copied";
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  });
  const text = article.querySelector(".text");
  if (text.textContent) footer.append(copy);
  else text.remove();
  footer.append(element("span", isError ? "error" : "note", note));
  article.append(footer);
}

async function copyText(text) {
  if (navigator.clipboard) {
    try { return await navigator.clipboard.writeText(text); } catch { /* not allowed: the old way */ }
  }
  const area = element("textarea"); // pages without TLS on another host have no clipboard
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function request() {
  const system = $("system").value.trim();
  const body = {
    model: facts.model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true },
  };
  if ($("temperature").value !== "") body.temperature = Number($("temperature").value);
  if ($("limit").value !== "") body.max_tokens = Number($("limit").value);
  return body;
}

async function answer() {
  const article = show("assistant", "");
  const text = article.querySelector(".text");
  const thoughts = element("div", "thoughts");
  const began = performance.now();
  let first = null, tokens = 0, finish = null;
  running = new AbortController();
  busy(true);
  let note = "", isError = false;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(request()), signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) tokens = event.usage.completion_tokens;
      const choice = event.choices && event.choices[0];
      if (!choice) continue;
      finish = choice.finish_reason || finish;
      const delta = choice.delta || {};
      const thought = delta.reasoning_content || delta.reasoning; // shown, and no part of the answer
      if (!thought && !delta.content) continue;
      if (first === null) first = performance.now();
      const follow = atEnd();
      if (thought) {
        if (!thoughts.isConnected) text.before(thoughts);
        thoughts.append(thought);
      }
      if (delta.content) text.append(delta.content);
      if (follow) toEnd();
    }
    const seconds = (performance.now() - (first || began)) / 1000;
    if (finish === "length") note = "cut at the longest length; ";
    note += tokens > 1 && seconds > 0.1 ? `${tokens} tokens, ${((tokens - 1) / seconds).toFixed(1)} a second` : "";
  } catch (error) {
    isError = error.name !== "AbortError";
    note = isError ? error.message : "stopped";
    if (isError && /API key/.test(note)) $("settings").open = true;
  }
  running = null;
  busy(false);
  if (!article.isConnected) return; // a new conversation has begun meanwhile
  const said = text.textContent;
  if (said) messages.push({ role: "assistant", content: said });
  else { // not answered, so not asked: templates refuse two questions in a row
    const asked = messages.pop();
    if (isError && asked && !$("text").value) {
      $("text").value = typeof asked.content === "string" ? asked.content : asked.content.at(-1).text;
      grow();
    }
  }
  addFooter(article, note, isError);
  toEnd();
  $("text").focus({ preventScroll: true });
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
}

function grow() {
  const text = $("text");
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`;
}

function showPictures() {
  const box = $("pictures");
  box.replaceChildren(...pictures.map((url, i) => {
    const button = element("button");
    button.type = "button";
    button.title = "Remove";
    const image = element("img");
    image.src = url;
    image.alt = "a picture to send; click to remove";
    button.append(image);
    button.addEventListener("click", () => { pictures.splice(i, 1); showPictures(); });
    return button;
  }));
  box.hidden = pictures.length === 0;
}

function read(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(file);
  });
}

function send() {
  const text = $("text").value.trim();
  if (running || (!text && pictures.length === 0)) return;
  const content = pictures.length === 0 ? text : [
    ...pictures.map((url) => ({ type: "image_url", image_url: { url } })),
    { type: "text", text },
  ];
  messages.push({ role: "user", content });
  show("user", text, pictures);
  pictures = [];
  showPictures();
  $("text").value = "";
  grow();
  answer();
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("text").addEventListener("input", grow);
$("text").addEventListener("keydown", (event) => {
  // On a touch keyboard Enter is a new line; Send sends.
  const touch = matchMedia("(pointer: coarse)").matches;
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch) {
    event.preventDefault();
    send();
  }
});
$("stop").addEventListener("click", () => { if (running) running.abort(); });
$("new").addEventListener("click", () => {
  if (running) running.abort();
  messages.length = 0;
  $("talk").replaceChildren();
  $("text").focus();
});
$("file").addEventListener("change", async (event) => {
  pictures.push(...await Promise.all([...event.target.files].map(read)));
  event.target.value = "";
  showPictures();
});

fetch("/page.json").then((reply) => reply.json()).then((found) => {
  facts = found;
  document.title = `${facts.model} · halfbyte`;
  $("model").textContent = facts.model;
  $("attach").hidden = !facts.pictures;
  $("settings").open = facts.key;
  $("key").parentElement.hidden = !facts.key;
  if (!facts.key) $("text").focus();
}).catch(() => { $("model").textContent = "the server does not answer"; });
