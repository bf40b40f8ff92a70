(() => {
  "use strict";
  const token = document.querySelector('meta[name="cakeflow-token"]').content;
  const at = (id) => document.getElementById(id);
  const form = at("fact");
  const names = ["sentence", "answer", "subject"];
  const fieldOf = { prompt: "sentence", target_new: "answer", subject: "subject" };
  let state = null, seen = null, busy = false;

  // Texts are always put in as text: nothing of the model or the user becomes markup.
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) if (value) element.setAttribute(name, value);
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  };
  const quiet = (text) => (text === "" ? make("i", {}, "nothing") : text);

  class Failure extends Error {
    constructor(error) { super(error.message); this.view = error; }
  }

  const call = async (name, data = {}) => {
    let answer;
    try {
      answer = await fetch(`/api/${name}`, {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-Cakeflow-Token": token },
        body: JSON.stringify(data),
      });
    } catch {
      at("gone").hidden = false;
      at("gone").textContent = "The terminal does not answer: the page was closed there. Start it again with the same --run_dir, and open its new address.";
      throw new Failure({ kind: "", message: "no answer from the terminal", fields: [] });
    }
    at("gone").hidden = true;
    const view = await answer.json();
    if (view.error) throw new Failure(view.error);
    return view;
  };

  const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

  const setBusy = (on) => {
    busy = on;
    at("work").hidden = !on;
    for (const button of document.querySelectorAll("button")) button.disabled = on;
    if (!on) refuse();
  };

  // Waits for a job, and shows what it is at.
  const follow = async (number) => {
    setBusy(true);
    try {
      for (let wait = 60; ; wait = Math.min(500, wait * 1.5)) {
        const { job } = await call("job", { job: number });
        const step = job.steps.at(-1);
        at("work-title").textContent = job.title[0].toUpperCase() + job.title.slice(1) + ".";
        at("work-step").textContent = step ? step.words + (step.times > 1 ? ` (${step.times})` : "") : "";
        at("work-time").textContent = `${Math.round(job.seconds)} s`;
        if (job.state === "done") return job.result;
        if (job.state === "failed") throw new Failure(job.error);
        await pause(wait);
      }
    } finally {
      await refresh().catch(() => {});
      setBusy(false);
    }
  };

  const run = async (name, data, show, place) => {
    if (busy) return;
    clearFaults();
    setBusy(true);
    try {
      const { job } = await call(name, data);
      show(await follow(job));
    } catch (failure) {
      if (!(failure instanceof Failure)) throw failure;
      showFailure(failure.view, place);
    } finally {
      setBusy(false);
    }
  };

  const clearFaults = () => {
    for (const id of ["fault", "ask-fault", "journal-fault", "journal-note"]) at(id).hidden = true;
    for (const name of names) {
      at(name).removeAttribute("aria-invalid");
      at(`${name}-fault`).textContent = "";
    }
  };

  const showFailure = (error, place) => {
    if (!error.kind) return; // the terminal is gone, as the top of the page says
    const fields = place === "fault" ? error.fields.filter((each) => fieldOf[each.field]) : [];
    for (const { field, remedy } of fields) {
      at(fieldOf[field]).setAttribute("aria-invalid", "true");
      at(`${fieldOf[field]}-fault`).textContent = remedy;
    }
    if (fields.length) return at(fieldOf[fields[0].field]).focus();
    at(place).hidden = false;
    at(place).replaceChildren(make("strong", {}, error.kind), error.message);
    at(place).scrollIntoView({ block: "nearest" });
  };

  // ---- a fact ----

  const fields = () => Object.fromEntries(names.map((name) => [name, at(name).value]));
  const typed = () => names.map((name) => at(name).value.trim()).join("\n");

  const sentence = (fact) => [
    fact.text.slice(0, fact.start), make("mark", { title: "subject" }, fact.text.slice(fact.start, fact.end)),
    fact.text.slice(fact.end), " ", make("ins", {}, fact.target),
  ];

  const notes = (where, list, kind = "note", title = "") => {
    for (const text of list) where.append(make("p", { class: kind }, title ? make("strong", {}, title) : null, text));
  };

  const showLook = (view) => {
    const { fact } = view;
    if (!at("subject").value.trim()) at("subject").value = fact.subject;
    seen = { ...view, typed: typed() };
    at("seen-sentence").replaceChildren(...sentence(fact));
    const said = [["The model now says", view.answers.completion]];
    if ("chat" in view.answers) said.push(["and, asked in a chat", view.answers.chat]);
    at("seen-says").replaceChildren(...said.map(([words, text]) => make("div", {}, make("span", {}, words), quiet(text))));
    at("seen-notes").replaceChildren();
    notes(at("seen-notes"), view.refusals, "alert", "The policy does not allow it");
    notes(at("seen-notes"), view.earlier.map((each) => `This replaces an edit in force: the answer was set to “${each}”.`), "note plain");
    notes(at("seen-notes"), view.doubts);
    at("seen-tokens").replaceChildren(...view.tokens.map((token) => {
      const kinds = ["special", "subject", "blocked", "written"].filter((kind) => token[kind]);
      return make("span", { class: kinds.join(" "), title: kinds.join(", ") }, token.text.replaceAll("\n", "⏎").trim() || "␣");
    }));
    const legend = [];
    if (view.tokens.some((each) => each.written)) legend.push("✎ marks the token that the fact is written at.");
    legend.push(view.tokens.some((each) => each.blocked)
      ? "Struck through: blocked, because the token's key is nearly the same in every text (a massive activation)."
      : "No token is blocked.");
    at("seen-legend").textContent = legend.join(" ");
    const kinds = { paraphrase: "in other words", neighborhood: "neighbor", generation: "free text" };
    at("seen-checks").replaceChildren(...fact.checks.map((check) =>
      make("li", {}, check.prompt, " ", make("span", { class: "hint" }, kinds[check.kind]))));
    at("seen-checks-title").textContent = `What is asked beside it (${fact.checks.length}, and familiar facts)`;
    at("seen").hidden = false;
    at("outcome").hidden = true;
    refuse();
    at("seen").scrollIntoView({ block: "nearest", behavior: "smooth" });
  };

  // What was looked at is what is applied: after a change of the fields it has to be looked at again.
  const refuse = () => {
    const stale = seen !== null && seen.typed !== typed();
    const refused = seen !== null && seen.refusals.length > 0;
    at("look").classList.toggle("main-button", seen === null || stale);  // one step is the next one
    at("apply").disabled = busy || stale || refused;
    at("preview").disabled = busy || stale || refused;
    at("seen-hint").textContent = stale ? "The fact above has changed: look again."
      : refused ? "The policy of this run forbids this edit."
      : "Trying edits the model, measures, and takes it back; nothing is stored.";
  };

  // ---- the outcome ----

  const topics = { fact: "The fact", neighbor: "Neighbors", familiar: "Familiar facts" };

  const table = (rows, caption) => {
    const heads = ["Asked", "Before", "After"];
    const body = rows.map((row) => make("tr", {},
      make("th", { scope: "row" }, row.prompt, make("span", { class: "sub" }, `${row.form === "chat" ? "in a chat" : "completed"}; expected: ${row.expected}`)),
      make("td", { "data-label": "before:", class: row.was_good ? "good" : "" }, quiet(row.before.trim())),
      make("td", { "data-label": "after:", class: row.good ? "good" : "bad" }, row.good ? "✓ " : "✗ ", quiet((row.after ?? "").trim()))));
    return make("table", {},
      caption ? make("caption", { class: "hint" }, caption) : null,
      make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
      make("tbody", {}, ...body));
  };

  // The tables say the rest; the whole verdict is in the run folder.
  const others = (outcome) => outcome.rows.filter((row) => row.topic !== "fact" && !row.edited);
  const lost = (outcome) => others(outcome).filter((row) => row.was_good && !row.good);
  const verdict = (outcome) => {
    const good = Object.fromEntries(outcome.rows.filter((row) => row.topic === "fact").map((row) => [row.form, row.good]));
    const chat = "chat" in good ? (good.chat === good.completion ? ", in a chat too" : good.chat ? ", but in a chat it does" : ", but not in a chat") : "";
    const count = others(outcome).length ? ` ${lost(outcome).length} of ${others(outcome).length} other answers changed.` : "";
    return `The model ${good.completion ? "states it" : "does not state it"}${chat}.${count}`;
  };

  const showOutcome = (kind) => (view) => {
    const { outcome } = view;
    at("outcome-title").textContent = kind === "preview" ? "What came of trying it" : "What came of it";
    const chip = at("outcome-kind");
    chip.textContent = kind === "preview" ? "tried, and taken back" : "applied, and in the journal";
    chip.className = `chip ${kind === "preview" ? "some" : "good"}`;
    at("outcome-notes").replaceChildren();
    at("outcome-rows").replaceChildren();
    at("outcome-sentence").replaceChildren(...sentence(view.fact));
    at("outcome-verdict").textContent = outcome ? verdict(outcome) : "The model was not asked freely.";
    if (outcome) {
      notes(at("outcome-notes"), outcome.broken, "alert", "Side effects beyond the budget");
      const facts = outcome.rows.filter((row) => row.topic === "fact");
      const [all, changed] = [others(outcome), lost(outcome)];
      const same = all.filter((row) => !changed.includes(row));
      const part = (title, ...content) => at("outcome-rows").append(make("div", { class: "rows" }, make("h3", {}, title), ...content));
      part(topics.fact, table(facts));
      if (changed.length) part(`Side effects: ${changed.length} of ${all.length} other answers changed`, table(changed));
      else part(`Side effects: none of ${all.length} other answers changed`);
      if (same.length) {
        const more = make("details", {}, make("summary", {}, `${same.length} other answers that did not change for the worse`));
        for (const topic of ["neighbor", "familiar"]) {
          const rows = same.filter((row) => row.topic === topic);
          if (rows.length) more.append(table(rows, topics[topic]));
        }
        at("outcome-rows").append(make("div", { class: "rows" }, more));
      }
    }
    notes(at("outcome-notes"), view.warnings.filter((text) => !outcome || !outcome.broken.some((each) => text.includes(each))));
    at("outcome").hidden = false;
    if (kind === "apply") {
      at("seen").hidden = true;
      seen = null;
      form.reset();
    }
    at("outcome").scrollIntoView({ block: "start", behavior: "smooth" });
  };

  // ---- questions ----

  const showAnswer = (view) => {
    const said = [["The model says", view.now]];
    if (state && state.edits) said.push(["Without the edits", view.unedited]);
    at("ask-rows").prepend(make("div", {},
      make("p", {}, view.prompt, view.chat ? make("span", { class: "hint" }, " in a chat") : null),
      make("div", { class: "says" }, ...said.map(([words, text]) => make("div", {}, make("span", {}, words), quiet(text))))));
    while (at("ask-rows").children.length > 8) at("ask-rows").lastChild.remove();
  };

  // ---- the journal ----

  const undo = (row) => run("undo", { batch: row.batch, place: row.place }, (view) => {
    const words = view.rows.map((each) => `“${each.prompt}”: ${each.before || "nothing"} → ${each.after || "nothing"}`);
    at("journal-note").hidden = false;
    at("journal-note").className = "note plain";
    at("journal-note").replaceChildren(make("strong", {}, "Taken back"), [...words, ...view.warnings].join("\n"));
  }, "journal-fault");

  const when = (time) => new Date(time).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

  const item = (row) => {
    const gone = row.state !== "in force";
    const fact = row.text ? make("span", { class: "fact" }, `${row.text} `, make("b", {}, row.target))
      : make("span", { class: "fact" }, "text not stored ", make("code", {}, row.name));
    const button = row.can_undo ? make("button", { type: "button", "aria-label": `Undo: ${row.text} ${row.target}` }, "Undo") : make("span");
    if (row.can_undo) button.addEventListener("click", () => undo(row));
    const chips = [];
    if (gone) chips.push(make("span", { class: "chip" }, row.state));
    else if (row.good !== null) chips.push(make("span", { class: `chip ${row.good ? "good" : "bad"}` }, row.good ? "stated" : "not stated"));
    else if (row.taken !== null) chips.push(make("span", { class: `chip ${row.taken ? "good" : "bad"}` }, row.taken ? "took" : `did not take: ${row.reason}`));
    const answers = row.before === null ? null : make("dl", {},
      make("dt", {}, "before"), make("dd", {}, quiet(row.before.trim())),
      make("dt", {}, "now"), make("dd", {}, quiet((row.now ?? "").trim())));
    return make("li", { class: gone ? "gone" : "" }, fact, button, answers,
      make("span", { class: "meta" }, ...chips, `batch ${row.batch}`, make("time", { datetime: row.time }, when(row.time))));
  };

  const refresh = async () => {
    const view = await call("state");
    state = view.state;
    at("model").textContent = state.model.split("/").at(-1);
    document.title = `${state.model.split("/").at(-1)} · cakeflow desk`;
    const rules = state.policies.flatMap((policy) => Object.keys(policy));
    const about = [["Run folder", state.folder], ["Layers", state.layers.join(", ") || "chosen at the first edit"]];
    about.push(["Policy", rules.length ? rules.join(", ") : "none"]);
    at("about").replaceChildren(...about.map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text))));
    at("journal").replaceChildren(...state.journal.map(item));
    at("journal-empty").hidden = state.journal.length > 0;
    at("journal-count").textContent = state.journal.length ? `${state.edits} in force` : "";
    at("chat-field").hidden = !state.chats;
    at("footer").textContent = state.records_texts
      ? `Everything here is in the ledger of ${state.folder}; cakeflow log, verify, report and export read it.`
      : `The ledger of ${state.folder} has the hashes of the facts, not their texts.`;
    return view.job;
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run("look", fields(), showLook, "fault");
  });
  form.addEventListener("input", (event) => {
    if (event.target.id === "sentence" && seen && at("subject").value === seen.fact.subject) at("subject").value = "";
    refuse();
  });
  at("preview").addEventListener("click", () => run("preview", fields(), showOutcome("preview"), "fault"));
  at("apply").addEventListener("click", () => run("apply", fields(), showOutcome("apply"), "fault"));
  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    run("ask", { prompt: at("prompt").value, chat: at("chat").checked }, showAnswer, "ask-fault");
  });

  refresh().then((job) => (job ? follow(job).catch(() => {}) : null)).catch(() => {});
})();
