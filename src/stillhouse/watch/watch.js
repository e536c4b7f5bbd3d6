"use strict";
// Updates the live part of the page while runs write, and shows the chat's answers.

const SECONDS = 5;

function replace(part, html) {
  const focused = part.contains(document.activeElement) ? document.activeElement : null;
  const address = focused && focused.getAttribute("href");
  part.innerHTML = html;
  if (address) part.querySelector(`a[href="${CSS.escape(address)}"]`)?.focus();
}

function live() {
  const part = document.getElementById("live");
  const state = document.getElementById("live-state");
  let tag = null;

  async function update() {
    if (document.hidden) return;
    try {
      const headers = tag === null ? {} : { "If-None-Match": tag };
      const reply = await fetch(part.dataset.address, { headers });
      if (reply.status === 200) {
        tag = reply.headers.get("ETag");
        replace(part, await reply.text());
      } else if (reply.status !== 304) {
        throw new Error(await reply.text());
      }
      state.textContent = `updated every ${SECONDS} seconds`;
    } catch (error) {
      state.textContent =
        error instanceof TypeError ? "not updating: stillhouse watch has stopped" : error.message;
    }
  }

  setInterval(update, SECONDS * 1000);
  document.addEventListener("visibilitychange", update);
}

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

function chat() {
  const form = document.getElementById("chat");
  const prompt = document.getElementById("prompt");
  const turns = document.getElementById("turns");
  const state = document.getElementById("chat-state");
  const [send, stop, clear] = ["send", "stop", "clear"].map((id) => document.getElementById(id));
  const member = document.getElementById("member");
  const temperature = document.getElementById("temperature");
  const token = document.querySelector('meta[name="token"]').content;
  let before = [];
  let stopping = null;

  function addTurn(text) {
    const turn = element("article");
    const answers = element("div", "", "answers");
    const parts = {};
    turn.append(element("p", text, "prompt"), answers);
    for (const [role, name] of [["teacher", "Teacher"], ["student", "Student"]]) {
      const section = element("section", "", `${role}-answer`);
      const answer = element("p");
      const note = element("small");
      answer.dataset.role = role;
      section.append(element("h3", name), answer, note);
      answers.append(section);
      parts[role] = { answer, note };
    }
    turns.append(turn);
    turn.scrollIntoView({ block: "nearest" });
    return parts;
  }

  function show(event, parts, turn) {
    if (event.state) state.textContent = event.state;
    const part = parts[event.role];
    if (!part) return;
    if (event.text !== undefined) {
      part.answer.textContent = event.text;
      turn.answers[event.role] = event.text;
    }
    if (event.note) part.note.textContent = event.note;
    if (event.error) {
      part.note.textContent = event.error;
      part.note.className = "problem";
    }
  }

  async function read(reply, each) {
    const decoder = new TextDecoder();
    const reader = reply.body.getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) each(JSON.parse(line));
      if (done) return;
    }
  }

  async function ask() {
    const turn = { prompt: prompt.value, answers: {} };
    const parts = addTurn(turn.prompt);
    const request = {
      prompt: turn.prompt,
      turns: form.dataset.turns === "yes" ? before : [],
      member: member === null ? "" : member.value,
      max_tokens: Number(document.getElementById("max-tokens").value),
      temperature: temperature === null ? 0 : Number(temperature.value),
    };
    prompt.value = "";
    stopping = new AbortController();
    send.disabled = clear.disabled = true;
    stop.hidden = false;
    state.textContent = "sent";
    try {
      const reply = await fetch("chat", {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-Stillhouse-Token": token },
        body: JSON.stringify(request),
        signal: stopping.signal,
      });
      if (!reply.ok) throw new Error(await reply.text());
      await read(reply, (event) => show(event, parts, turn));
      before.push(turn);
      state.textContent = "";
    } catch (error) {
      if (error.name === "AbortError") state.textContent = "stopped";
      else if (error instanceof TypeError) state.textContent = "stillhouse watch has stopped";
      else state.textContent = error.message;
    }
    send.disabled = clear.disabled = false;
    stop.hidden = true;
    prompt.focus();
  }

  function forget() {
    before = [];
    turns.replaceChildren();
    state.textContent = "";
    prompt.focus();
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!send.disabled) ask();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  stop.addEventListener("click", () => stopping.abort());
  clear.addEventListener("click", forget);
  if (member !== null) member.addEventListener("change", forget);
}

live();
if (document.getElementById("chat") !== null) chat();
