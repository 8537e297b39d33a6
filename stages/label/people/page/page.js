"use strict";
// The page keeps no state of its own: each answer of the server says what to show. The token stands behind the link's #,
// so that it is in no request line and in no log.

const token = location.hash.slice(1);
const byId = (id) => document.getElementById(id);
const sleep = (milliseconds) => new Promise((wake) => setTimeout(wake, milliseconds));
const KEYS = { 1: "A", 2: "B", 0: "tie", s: "skip" };
const SAID = { A: "left is better", B: "right is better", tie: "equal", skip: "skipped" };
let view = null;
let busy = false;
let sure = false; // the end button was pressed once

function tell(text, wrong = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("wrong", wrong);
}

// The server's answer, however long it takes: what it has not confirmed is sent again, and counts once.
async function call(path, body) {
  for (let wait = 250; ; wait = Math.min(2 * wait, 4000)) {
    try {
      const response = await fetch(path, {
        method: body === undefined ? "GET" : "POST",
        headers: { authorization: `Bearer ${token}`, "content-type": "application/json" },
        body: body === undefined ? undefined : JSON.stringify(body),
      });
      if (response.status < 500) {
        return { status: response.status, data: await response.json() };
      }
    } catch {
      // no answer: the server is down, or the line is
    }
    tell(body === undefined ? "The server does not answer; trying again …" : "Not saved yet: the server does not answer; trying again …", true);
    await sleep(wait);
  }
}

// Runs one action at a time; keys and buttons pressed meanwhile do nothing.
async function alone(action) {
  if (busy) return;
  busy = true;
  enable();
  try {
    await action();
  } finally {
    busy = false;
    enable();
  }
}

function enable() {
  for (const button of document.querySelectorAll("[data-choice]")) button.disabled = busy || !view?.task;
  byId("undo").disabled = busy || !view?.can_undo;
  byId("end").disabled = busy;
}

function fill(section, turns) {
  section.replaceChildren();
  for (const turn of turns) {
    const box = document.createElement("div");
    box.className = "turn";
    box.dir = "auto";
    box.innerHTML = turn.html || '<p class="empty">(empty)</p>'; // Markdown that the server rendered, raw HTML escaped
    if (turn.role) {
      const role = document.createElement("p");
      role.className = "role";
      role.textContent = turn.role;
      box.prepend(role);
    }
    section.append(box);
  }
}

function show(answer) {
  if (answer.status === 401) {
    view = null;
    byId("task").hidden = true;
    byId("nothing").hidden = false;
    byId("nothing").textContent = "This link is not valid. Use the one that was printed for you, whole.";
    tell("");
    return false;
  }
  view = answer.data;
  const { task, progress } = view;
  byId("annotator").textContent = view.annotator;
  byId("bar").max = progress.wanted;
  byId("bar").value = progress.given;
  byId("count").textContent = `${progress.finished_pairs} of ${progress.pairs} pairs finished; answers by you: ${progress.answered}`;
  byId("overview-button").hidden = !view.lead;
  byId("task").hidden = !task;
  byId("nothing").hidden = Boolean(task);
  if (task) {
    fill(byId("prompt"), task.prompt);
    fill(byId("left"), task.left);
    fill(byId("right"), task.right);
    window.scrollTo(0, 0);
  } else {
    byId("nothing").textContent = view.lead
      ? "Nothing is left for you. End the labelling in the overview (key o)."
      : "Nothing is left for you. Thank you!";
  }
  return true;
}

const choose = (choice) =>
  alone(async () => {
    if (!view?.task) return;
    tell("Saving …");
    const answer = await call("api/answer", { key: view.task.key, choice });
    if (show(answer)) {
      tell(answer.status === 409 ? "This pair was answered elsewhere; here is the next." : `Saved: ${SAID[choice]}.`, answer.status === 409);
    }
  });

const undo = () =>
  alone(async () => {
    if (!view?.can_undo) return;
    tell("Undoing …");
    if (show(await call("api/undo", { key: view.task?.key ?? null }))) tell("Undone: this pair again.");
  });

function row(cells) {
  const line = document.createElement("tr");
  for (const text of cells) {
    const cell = document.createElement("td");
    cell.textContent = text;
    line.append(cell);
  }
  return line;
}

const percent = (share) => `${Math.round(100 * share)} %`;

const overview = () =>
  alone(async () => {
    if (!view?.lead) return;
    sure = false;
    byId("end").textContent = "End the labelling";
    const panel = byId("overview");
    panel.hidden = !panel.hidden;
    if (panel.hidden) return;
    const { data } = await call("api/overview");
    tell("");
    byId("annotators").replaceChildren(
      ...data.annotators.map((one) =>
        row([one.name, one.answered, one.skipped, one.repeats ? `${percent(one.same)} of ${one.repeats}` : "–"])),
    );
    byId("between-table").hidden = data.between.length === 0;
    byId("between").replaceChildren(
      ...data.between.map((two) =>
        row([
          two.names.join(", "),
          two.count,
          percent(two.share),
          two.kappa === null ? "–" : `${two.kappa.toFixed(2)} (${two.low.toFixed(2)} to ${two.high.toFixed(2)})`,
        ])),
    );
  });

const end = () =>
  alone(async () => {
    if (!sure) {
      sure = true;
      const { finished_pairs, pairs } = view.progress;
      byId("end").textContent = `Press again to end with ${finished_pairs} of ${pairs} pairs labelled`;
      return;
    }
    const answer = await call("api/end", {});
    view = null;
    byId("overview").hidden = byId("task").hidden = byId("overview-button").hidden = true;
    byId("nothing").hidden = false;
    byId("nothing").textContent = answer.status === 200 ? "The labelling has ended. You can close this page." : answer.data.error;
    tell("");
  });

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  const key = event.key.toLowerCase();
  if (key in KEYS) choose(KEYS[key]);
  else if (key === "u") undo();
  else if (key === "o") overview();
});
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => choose(button.dataset.choice));
}
byId("undo").addEventListener("click", undo);
byId("overview-button").addEventListener("click", overview);
byId("end").addEventListener("click", end);
window.addEventListener("hashchange", () => location.reload());
enable();
alone(async () => {
  if (show(await call("api/task"))) tell("");
});
