
// Answers, keyboard, progress. Whatever a reader writes reaches the page as text, never as HTML.
const FORMAT = 1;
const MAX_FILE_BYTES = 16e6;
const data = JSON.parse(document.getElementById("questionnaire").textContent);
const $ = (id) => document.getElementById(id);
const asks = (question) => data.ask.includes(question);
const blank = () => ({ report: "", generated: null, confidence: null });
const state = { rater: "", place: 0, answers: {}, saved: "", changed: false };

const paper = new EcgPaper($("paper"), data.rate_hz, data.leads, data.filter, (text) => {
  $("measure").textContent = text;
});

// int16 of every lead one after another, as base64.
function decode(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const units = new DataView(bytes.buffer), length = bytes.length / 2 / data.leads.length;
  return data.leads.map((_, lead) =>
    Float32Array.from({ length }, (_, k) =>
      (units.getInt16(2 * (lead * length + k), true) * data.uv_per_unit) / 1000));
}

// Progress lives in this browser, one entry a reader, so that two do not see each other's answers.
const storeName = (rater) => `ecg-review ${data.questionnaire} ${rater}`;
const lastName = `ecg-review ${data.questionnaire}`;

function keep() {
  try {
    const { place, answers, saved, changed } = state;
    localStorage.setItem(storeName(state.rater), JSON.stringify({ place, answers, saved, changed }));
    localStorage.setItem(lastName, state.rater);
    return true;
  } catch {
    say("This browser keeps no progress: save to a file before you close the page.", "bad");
    return false;
  }
}

function kept(rater) {
  try {
    return JSON.parse(localStorage.getItem(storeName(rater)));
  } catch {
    return null;
  }
}

function lastRater() {
  try {
    return localStorage.getItem(lastName) ?? "";
  } catch {
    return "";
  }
}

// The next reader must not land in the answers of this one.
function forgetLast() {
  try {
    localStorage.removeItem(lastName);
  } catch {
    // Nothing was kept.
  }
}

// Take only what has the right form: the browser's store and a file are input like any other.
function cleaned(answer) {
  const clean = blank();
  if (typeof answer?.report === "string") clean.report = answer.report.slice(0, 5000);
  if (typeof answer?.generated === "boolean") clean.generated = answer.generated;
  if ([1, 2, 3].includes(answer?.confidence)) clean.confidence = answer.confidence;
  return clean;
}

function begin(rater, held) {
  const answers = {};
  for (const { id } of data.records) answers[id] = cleaned(held?.answers?.[id]);
  const place = Number.isInteger(held?.place) ? held.place : 0;
  Object.assign(state, { rater, answers, saved: "", changed: held?.changed === true });
  if (typeof held?.saved === "string") state.saved = held.saved;
  $("start").hidden = true;
  $("review").hidden = false;
  $("rater-name").textContent = `Reader: ${rater}`;
  say(state.saved);
  show(Math.min(Math.max(place, 0), data.records.length - 1));
}

const current = () => state.answers[data.records[state.place].id];

function isAnswered(answer) {
  return (!asks("report") || answer.report.trim() !== "")
    && (!asks("generated") || (answer.generated !== null && answer.confidence !== null));
}

const numAnswered = () => Object.values(state.answers).filter(isAnswered).length;

function show(place) {
  state.place = place;
  const { id, signals } = data.records[place];
  $("place").textContent = `Recording ${place + 1} of ${data.records.length}`;
  $("record-id").textContent = `Id ${id}`;
  $("previous").disabled = place === 0;
  $("next").disabled = place === data.records.length - 1;
  paper.show(decode(signals));
  const answer = current();
  $("report").value = answer.report;
  for (const input of document.querySelectorAll("input[name=generated]")) {
    input.checked = answer.generated !== null && (input.value === "yes") === answer.generated;
  }
  for (const input of document.querySelectorAll("input[name=confidence]")) {
    input.checked = Number(input.value) === answer.confidence;
  }
  $("form").scrollTop = 0;
  refresh();
  keep();
}

function refresh() {
  const done = numAnswered(), all = data.records.length;
  $("progress").max = all;
  $("progress").value = done;
  $("progress-text").textContent = done === all
    ? `All ${all} answered. Please save your answers to a file and send it back.`
    : `${done} of ${all} answered${isAnswered(current()) ? "" : "; this one is not"}`;
  $("unanswered").disabled = done === all;
  $("save").classList.toggle("primary", done === all && state.changed);
}

function change(part) {
  Object.assign(current(), part);
  state.changed = true;
  if (keep()) say(state.saved ? `Changed since: ${state.saved}` : "Progress is kept in this browser.");
  refresh();
}

function choose(name, value) {
  if (!asks("generated")) return;
  const input = document.querySelector(`input[name=${name}][value="${value}"]`);
  input.checked = true;
  input.dispatchEvent(new Event("change", { bubbles: true }));
}

function step(by) {
  const place = state.place + by;
  if (place >= 0 && place < data.records.length) show(place);
}

function nextUnanswered() {
  const count = data.records.length;
  for (let k = 1; k <= count; k++) {
    const place = (state.place + k) % count;
    if (!isAnswered(state.answers[data.records[place].id])) return show(place);
  }
}

function say(text, kind = "") {
  $("status").textContent = text;
  $("status").className = kind;
}

function save() {
  const answers = data.records
    .map(({ id }) => ({ id, ...state.answers[id] }))
    .filter(({ report, generated, confidence }) =>
      report.trim() !== "" || generated !== null || confidence !== null);
  const file = {
    format: FORMAT, questionnaire: data.questionnaire, rater: state.rater, answers,
    saved: new Date().toISOString(),
  };
  const name = state.rater.replace(/[^A-Za-z0-9]+/g, "-").replace(/^-|-$/g, "") || "reader";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(
    new Blob([JSON.stringify(file, null, 1)], { type: "application/json" }));
  link.download = `answers-${data.questionnaire.slice(0, 6)}-${name}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  const time = new Date().toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  state.saved = `Saved at ${time}: ${numAnswered()} of ${data.records.length} answered.`;
  state.changed = false;
  keep();
  say(state.saved, "good");
  refresh();
}

async function load(file) {
  try {
    if (file.size > MAX_FILE_BYTES) throw new Error("it is too large");
    const held = JSON.parse(await file.text());
    if (held?.questionnaire !== data.questionnaire) throw new Error("it is of another questionnaire");
    const rater = typeof held.rater === "string" ? held.rater.trim().slice(0, 80) : "";
    if (!rater || !Array.isArray(held.answers)) throw new Error("it is damaged");
    const here = Object.values(kept(rater)?.answers ?? {}).map(cleaned).filter(isAnswered).length;
    if (here && !confirm(`Replace the ${here} answers of this reader in this browser?`)) return;
    const answers = Object.fromEntries(held.answers.map((answer) => [answer?.id, answer]));
    begin(rater, { answers });
  } catch (error) {
    $("start-message").textContent = `This file cannot be used: ${error.message}.`;
  }
}

// Display.
function press(id, on) {
  $(id).setAttribute("aria-pressed", String(on));
}

function setLayout(name) {
  for (const each of Object.keys(LAYOUTS)) press(`layout-${each}`, each === name);
  paper.setLayout(name);
}

function setTool(tool) {
  paper.tool = tool;
  press("tool-calipers", tool === "calipers");
  press("tool-pan", tool === "pan");
  $("paper").classList.toggle("pan", tool === "pan");
}

function march() {
  paper.setMarching(!paper.marching);
  press("march", paper.marching);
}

const KEYS = {
  ArrowRight: () => step(1), n: () => step(1), ArrowLeft: () => step(-1), p: () => step(-1),
  u: nextUnanswered, s: save, w: () => asks("report") && $("report").focus(),
  r: () => choose("generated", "no"), g: () => choose("generated", "yes"),
  1: () => choose("confidence", 1), 2: () => choose("confidence", 2), 3: () => choose("confidence", 3),
  l: () => setLayout(paper.layout === "3x4" ? "12x1" : "3x4"),
  c: () => setTool(paper.tool === "pan" ? "calipers" : "pan"), m: march,
  "+": () => paper.zoom(1.25), "=": () => paper.zoom(1.25), "-": () => paper.zoom(0.8),
  0: () => paper.fit(), Escape: () => paper.measure(null), "?": () => $("help").showModal(),
};
const NUDGES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

document.addEventListener("keydown", (event) => {
  if ($("review").hidden || $("help").open) return;
  if (event.target === $("report")) {
    if (event.key === "Escape") $("report").blur();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) step(1);
    else return;
    event.preventDefault();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.target === $("gain")) return;
  const nudge = event.shiftKey && NUDGES[event.key];
  if (nudge) {
    if (paper.nudge(...nudge)) event.preventDefault();
    return;
  }
  const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

const on = (id, act, name = "click") => $(id).addEventListener(name, act);
on("start-form", (event) => {
  event.preventDefault();
  const rater = $("rater").value.trim();
  if (rater) begin(rater, kept(rater));
}, "submit");
on("load", () => $("load").files[0] && load($("load").files[0]), "change");
on("form", (event) => event.preventDefault(), "submit");
on("report", () => change({ report: $("report").value }), "input");
on("form", ({ target }) => {
  if (target.name === "generated") change({ generated: target.value === "yes" });
  if (target.name === "confidence") change({ confidence: Number(target.value) });
}, "change");
on("previous", () => step(-1));
on("next", () => step(1));
on("unanswered", nextUnanswered);
on("save", save);
on("leave", () => {
  keep();
  forgetLast();
  $("rater").value = "";
  $("review").hidden = true;
  $("start").hidden = false;
});
on("keys", () => $("help").showModal());
on("help-close", () => $("help").close());
on("layout-3x4", () => setLayout("3x4"));
on("layout-12x1", () => setLayout("12x1"));
on("tool-calipers", () => setTool("calipers"));
on("tool-pan", () => setTool("pan"));
on("march", march);
on("zoom-in", () => paper.zoom(1.25));
on("zoom-out", () => paper.zoom(0.8));
on("zoom-fit", () => paper.fit());
on("gain", () => paper.setGain(Number($("gain").value)), "change");
window.addEventListener("beforeunload", (event) => {
  if (state.changed && !kept(state.rater)) event.preventDefault();
});

for (const element of document.querySelectorAll("[data-ask]")) {
  element.hidden = !asks(element.dataset.ask);
}
$("start-count").textContent = data.records.length;
$("start-seconds").textContent =
  atob(data.records[0].signals).length / 2 / data.leads.length / data.rate_hz;
// A reload goes on where this reader was.
const before = lastRater();
if (before && kept(before)) begin(before, kept(before));
