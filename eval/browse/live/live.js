"use strict";
const facts = JSON.parse(document.body.dataset.facts);
const $ = (id) => document.getElementById(id);
const make = (tag, text, properties) => Object.assign(document.createElement(tag), text === undefined ? {} : { textContent: text }, properties || {});
let answer = null, chosen = Infinity, latent = null, edits = {}, asking = null, timer = 0;

const ask = async () => {
  if (asking) asking.abort();
  asking = new AbortController();
  $("status").classList.remove("wrong");
  $("status").textContent = "";
  if (!$("text").value) { answer = null; draw(); return true; }
  $("status").textContent = "…";
  try {
    const reply = await fetch("look", {
      method: "POST", headers: { "Content-Type": "application/json" }, signal: asking.signal,
      body: JSON.stringify({ text: $("text").value, coder: $("coder").value, edits, error: $("error").checked }),
    });
    const found = await reply.json();
    if (!reply.ok) throw new Error(found.error);
    answer = found;
    chosen = Math.min(chosen, answer.tokens.length - 1);
    $("status").textContent = answer.left_out ? `The last ${answer.left_out} tokens were left out.` : "";
    draw();
    return true;
  } catch (error) {
    if (error.name === "AbortError") return true;
    $("status").textContent = error.message;
    $("status").classList.add("wrong");
    return false;
  }
};
const soon = () => { clearTimeout(timer); timer = setTimeout(ask, 250); };

const draw = () => {
  const there = answer !== null;
  $("legend").hidden = !there;
  drawEdits();
  if (!there) {
    for (const part of [$("tokens"), $("latents").tBodies[0], $("next").tBodies[0], $("kl")]) part.replaceChildren();
    return;
  }
  const strength = answer.latents.map((own) => latent === null ? (own.length ? own[0][2] : 0) : (own.find(([i]) => i === latent) || [0, 0, 0])[2]);
  const most = Math.max(1e-9, ...strength), worst = Math.max(0.05, ...answer.kl);
  $("tokens").replaceChildren(...answer.tokens.map((text, i) => {
    const token = make("span", text || "\u2009", { role: "button", tabIndex: 0, className: i === chosen ? "token chosen" : "token" });
    token.style.setProperty("--s", Math.round(9 * Math.max(0, strength[i]) / most));
    token.style.setProperty("--k", answer.edited ? Math.round(9 * answer.kl[i] / worst) : 0);
    token.title = answer.edited ? `KL ${answer.kl[i]}` : "";
    token.addEventListener("click", () => { chosen = i; draw(); });
    token.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); chosen = i; draw(); $("tokens").children[i].focus(); } });
    return token;
  }));
  $("where").textContent = JSON.stringify(answer.tokens[chosen]);
  const pages = facts.coders.find((c) => c.name === $("coder").value).pages;
  $("latents").tBodies[0].replaceChildren(...answer.latents[chosen].map(([i, value, margin]) => {
    const row = make("tr", undefined, { className: i === latent ? "chosen" : "" });
    const name = make("td"), edit = make("td", undefined, { className: "left" });
    const mark = make("button", String(i), { type: "button", title: "Mark where it fires" });
    mark.addEventListener("click", () => { latent = latent === i ? null : i; draw(); });
    name.append(mark);
    if (pages) name.append(" ", make("a", "page", { href: `pages/coders/${encodeURIComponent(pages)}/${Math.floor(i / 1000)}/${i}.html`, target: "_blank", rel: "noreferrer" }));
    const off = make("button", "off", { type: "button" }), set = make("button", "set", { type: "button" });
    off.addEventListener("click", () => change(i, 0));
    set.addEventListener("click", () => { $("number").value = i; $("value").value = value; $("value").focus(); $("value").select(); });
    edit.append(off, " ", set);
    row.append(name, make("td", String(value)), make("td", String(margin)), edit);
    return row;
  }));
  $("next").tBodies[0].replaceChildren(...answer.next[chosen].map(([text, before, after]) => {
    const row = make("tr", undefined, { className: after > before * 1.05 ? "up" : after < before / 1.05 ? "down" : "" });
    const name = make("td");
    name.append(make("code", text));
    row.append(name, make("td", `${(100 * before).toFixed(2)} %`), make("td", answer.edited ? `${(100 * after).toFixed(2)} %` : ""));
    return row;
  }));
  $("kl").textContent = answer.edited ? `KL from before to after: ${answer.kl[chosen]} nats on this token, ${(answer.kl.reduce((a, b) => a + b, 0) / answer.kl.length).toPrecision(3)} on the mean.` : "";
};
const drawEdits = () => {
  $("edits").replaceChildren(...Object.entries(edits).map(([i, value]) => {
    const line = make("li", `${i}: ${value === 0 ? "off" : `set to ${value}`} `), undo = make("button", "undo", { type: "button" });
    undo.addEventListener("click", () => { delete edits[i]; ask(); });
    line.append(undo);
    return line;
  }));
};
// An edit that is refused is taken back, so that the others still act.
const change = async (i, value) => {
  const before = { ...edits }, width = facts.coders.find((c) => c.name === $("coder").value).latents;
  if (!Number.isInteger(i) || i < 0 || i >= width || !Number.isFinite(Math.fround(value))) {
    $("status").textContent = `A latent is a number from 0 to ${width - 1}, and its value is one too.`;
    $("status").classList.add("wrong");
    return;
  }
  edits[i] = value;
  if (!await ask()) { edits = before; drawEdits(); }
};

$("text").addEventListener("input", () => { chosen = Infinity; soon(); });
$("coder").addEventListener("change", () => { edits = {}; latent = null; ask(); });
$("error").addEventListener("change", ask);
$("add").addEventListener("click", () => { if ($("number").value !== "" && $("value").value !== "") change(Number($("number").value), Number($("value").value)); });
$("text").value = "def parse(self, text):\n    return text.";
ask();
