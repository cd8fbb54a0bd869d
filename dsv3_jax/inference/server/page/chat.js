import {ExpertPanel, RoutedReply} from "./experts.js";

const $ = id => document.getElementById(id);
const panel = new ExpertPanel($);
let conversation = [], model = null, running = null, newest = null;

function headers() {
  const key = $("key").value;
  return {"Content-Type": "application/json", ...(key ? {"Authorization": "Bearer " + key} : {})};
}

// Models write anything: all of it goes into the page as text, never as markup.
function show(kind, text = "") {
  const element = document.createElement("div");
  element.className = "message " + kind;
  element.textContent = text;
  $("messages").append(element);
  element.scrollIntoView({block: "end"});
  return element;
}

async function getJson(path) {
  const response = await fetch(path, {headers: headers()});
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response.json();
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function request(text) {
  const limits = {max_tokens: +$("tokens").value, temperature: +$("temperature").value, top_p: +$("top_p").value};
  const asked = {stream: true, stream_options: {include_usage: true}, routed_experts: model.routing.layers > 0};
  const common = {model: model.id, ...asked, ...limits};
  return $("mode").value === "chat"
    ? ["/v1/chat/completions", {...common, messages: conversation}]
    : ["/v1/completions", {...common, prompt: text}];
}

function showNumbers(tokens, first, last, before, after) {
  const parts = [tokens + " tokens"];
  if (tokens > 1 && last > first) parts.push(((tokens - 1) / (last - first) * 1000).toFixed(1) + " tokens/s");
  const passes = after && before ? after.passes - before.passes : 0;
  if (passes > 0 && after.accepted.length) {
    // The server's counters over the time of this reply: of others' requests, too, if there were any.
    const kept = after.accepted.map((count, depth) => count - before.accepted[depth]);
    parts.push((1 + kept.reduce((sum, count) => sum + count, 0) / passes).toFixed(2) + " tokens a pass");
    parts.push("drafts that stay: " + kept.map(count => (100 * count / passes).toFixed(0) + "%").join(", "));
  }
  $("numbers").textContent = parts.join("  ·  ");
}

// A reply as it comes: its text, each token of it with its experts.
class Reply {
  constructor(element) {
    this.element = element;
    this.thinking = null;
    this.answer = "";
    this.routed = model.routing.layers ? new RoutedReply(model.routing) : null;
    this.pending = [];  // places of tokens whose text has not come yet
  }

  add(piece, experts) {
    this.pending.push(...experts.map(one => this.routed.add(one)));
    if (piece.reasoning_content) this.append(this.thought(), piece.reasoning_content);
    if (piece.content) { this.append(this.element, piece.content); this.answer += piece.content; }
    if (piece.content || piece.reasoning_content) this.pending = [];
  }

  // The token that ends a reply has no text.
  end() {
    if (this.pending.length) this.append(this.element, "").classList.add("end");
  }

  append(parent, text) {
    const span = Object.assign(document.createElement("span"), {textContent: text});
    parent.append(span);
    if (this.pending.length) {
      Object.assign(span, {className: "token", tabIndex: -1, reply: this.routed, places: this.pending});
      // One stop of the Tab key a reply; arrows lead from token to token.
      this.last?.setAttribute("tabindex", "-1");
      span.tabIndex = 0;
      this.last = newest = span;
      look();
    }
    return span;
  }

  thought() {
    if (!this.thinking) {
      this.thinking = document.createElement("details");
      this.thinking.open = true;
      this.thinking.append(Object.assign(document.createElement("summary"), {textContent: "thinking"}));
      this.element.prepend(this.thinking);
    }
    return this.thinking;
  }
}

// The experts of the token under the pointer, or else of the one in focus, or else of the newest.
function look() {
  const token = document.querySelector(".token:hover") || document.querySelector(".token:focus") || newest;
  document.querySelector(".token.shown")?.classList.remove("shown");
  if (!token) { panel.clear(); return; }
  token.classList.add("shown");
  panel.show(token.reply, token.places, token.textContent);
}

async function send(text) {
  const chat = $("mode").value === "chat", turns = conversation;
  if (chat) { turns.push({role: "user", content: text}); show("user", text); }
  const element = show("assistant", chat ? "" : text);
  let reply = null, tokens = 0, chunks = 0, first = 0, last = 0, before = null, failed = false;
  running = new AbortController();
  $("send").textContent = "stop";
  $("numbers").textContent = "";
  try {
    if (model === null) await findModel();
    reply = new Reply(element);
    before = await getJson("/statistics");
    const [path, body] = request(text);
    const options = {method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal};
    const response = await fetch(path, options);
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.usage) tokens = event.usage.completion_tokens;
      for (const choice of event.choices) {
        const piece = choice.delta || {content: choice.text}, experts = choice.routed_experts || [];
        reply.add(piece, experts);
        if (experts.length || piece.content || piece.reasoning_content) {
          last = performance.now();
          first ||= last;
          chunks += 1;
        }
        if (reply.routed) showNumbers(reply.routed.tokens.length, first, last);
        const main = $("messages");
        if (main.scrollHeight - main.scrollTop - main.clientHeight < 200) main.scrollTop = main.scrollHeight;
      }
    }
    reply.end();
  } catch (error) {
    failed = error.name !== "AbortError";
    if (failed) show("error", error.message);
  }
  running = null;
  $("send").textContent = "send";
  if (turns !== conversation) return;  // a new chat has begun
  if (chat) {
    if (failed && !reply?.answer) turns.pop();
    else turns.push({role: "assistant", content: reply.answer});
  }
  if (failed) return;
  // A reply that was stopped has no usage.
  const counted = tokens || reply.routed?.tokens.length || chunks;
  showNumbers(counted, first, last, before, await getJson("/statistics").catch(() => null));
}

async function findModel() {
  model = (await getJson("/v1/models")).data[0];
  $("model").textContent = document.title = model.id;
}

$("form").addEventListener("submit", event => {
  event.preventDefault();
  if (running) { running.abort(); return; }
  const text = $("input").value;
  if (!text.trim()) return;
  $("input").value = "";
  send(text);
});
$("input").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("form").requestSubmit();
  }
});
$("clear").addEventListener("click", () => {
  if (running) running.abort();
  conversation = [];
  newest = null;
  $("messages").replaceChildren();
  $("numbers").textContent = "";
  look();
  $("input").focus();
});
for (const kind of ["pointerover", "pointerleave", "focusin", "focusout"]) $("messages").addEventListener(kind, look);
$("messages").addEventListener("keydown", event => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key], token = event.target.closest(".token");
  if (!step || !token) return;
  const all = [...token.closest(".message").querySelectorAll(".token")];
  all[all.indexOf(token) + step]?.focus();
  event.preventDefault();
});
$("key").addEventListener("change", () => findModel().catch(error => show("error", error.message)));
findModel().catch(() => show("assistant", "This server needs an API key: enter it above."));
