// The plan: a bar of predicted bytes by stage against the budget, seconds, why, and the other ways.

import { $, bytes, el, icon, peak, seconds } from "./dom.js";

const PATIENCE = 200; // milliseconds after which an answer to what was asked before is called one no longer
const FEW = 12; // below this share of the budget the bars are drawn enlarged

/** `pin` is called with the precision and residency of a plan that is chosen by hand, or null. */
export class PlanView {
  constructor(pin) {
    this.pin = pin;
    $("unpin").addEventListener("click", () => pin(null));
  }

  /** The last answer stands for a moment; one that there was no plan does not. */
  wait() {
    const { shows } = $("plan").dataset;
    $("plan").setAttribute("aria-busy", "true");
    $("plan").dataset.shows = "before";
    if (shows === "none") this.#late();
    else this.timer ??= setTimeout(() => this.#late(), PATIENCE);
  }

  /** One way, while others are not looked at yet. `isCurrent` says that nothing was changed meanwhile. */
  glance(passes, pinned, isCurrent) {
    this.#all(passes, pinned);
    $("plan").dataset.shows = "one way";
    $("reason").textContent = "This way was the best before; all others are looked at now.";
    const fits = passes.every((pass) => pass.plans[0].verdict === "fits");
    if (!fits || this.isLate) return this.#late(`${fits ? "So far" : "Not as before"}: ${manner(passes[0].plans[0])}`);
    if (!isCurrent) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.#late(), PATIENCE);
  }

  show(passes, pinned) {
    this.#answered(pinned ? "one way" : "all"); // the others are asked for then
    this.#all(passes, pinned);
  }

  /** What is shown is no answer to what is asked: it stays, paler. */
  #late(words = "") {
    $("plan").dataset.late = $("mini").parentElement.dataset.late = "";
    this.#verdict("", "Planning …", words);
    $("mini-words").textContent = "Planning …";
  }

  get isLate() { return "late" in $("plan").dataset; }

  #answered(shows) {
    clearTimeout(this.timer);
    this.timer = null;
    $("plan").setAttribute("aria-busy", "false");
    $("plan").dataset.shows = shows;
    for (const place of [$("plan"), $("mini").parentElement]) delete place.dataset.late;
    $("others").hidden = shows === "none";
  }

  #all(passes, pinned) {
    const [first] = passes;
    const chosen = passes.map((pass) => pass.plans[0]);
    const worst = chosen.find((plan) => plan.verdict !== "fits") ?? chosen[0];
    const fits = worst.verdict === "fits";
    const total = Math.max(...chosen.map(peak));
    const time = chosen.reduce((sum, plan) => sum + plan.seconds, 0);
    this.#verdict(worst.verdict, fits ? "It fits" : `It does not fit: ${worst.verdict}`, manner(chosen[0]));
    this.#figures([
      ["time", fits ? `${seconds(time)}` : "–"],
      ["memory", bytes(total)],
      ["budget", bytes(worst.budget_bytes)],
    ]);
    this.#bars(chosen, passes);
    $("reason").textContent = sentence(worst.reason);
    this.#notes([...(first.notes ?? []), ...later(passes)]);
    this.#mini(total, worst.budget_bytes, fits, `${fits ? "Fits" : "Does not fit"}: ${manner(chosen[0])}, ${fits ? `${seconds(time)}, ` : ""}${bytes(total)} of ${bytes(worst.budget_bytes)}`);
    $("pinned").hidden = !pinned;
    if (pinned) $("pinned").firstChild.textContent = `You chose ${[pinned.precision, pinned.residency].filter(Boolean).join(", ")}.`;
  }

  /** All ways, the best of each precision and residency. */
  list(plans, pinned) {
    $("plan").dataset.shows = "all";
    const best = new Map();
    for (const plan of plans) {
      const key = `${plan.precision} ${plan.residency}`;
      if (!best.has(key)) best.set(key, plan);
    }
    const order = { fits: 0, "too large": 1, "too coarse": 2, refused: 3 };
    const rows = [...best.values()].sort((a, b) => order[a.verdict] - order[b.verdict] || a.seconds - b.seconds);
    const chosen = pinned ?? plans[0];
    const body = $("others").querySelector("tbody");
    const focused = document.activeElement?.dataset?.plan;
    body.replaceChildren(...rows.map((plan) => this.#row(plan, plan.precision === chosen.precision && plan.residency === chosen.residency)));
    if (focused) body.querySelector(`[data-plan="${focused}"]`)?.focus();
    $("others").querySelector(".state").textContent = `${rows.filter((plan) => plan.verdict === "fits").length} of ${rows.length} fit`;
  }

  /** Why there is no plan at all. */
  fail(message) {
    this.#answered("none");
    this.#verdict("refused", "No plan", message);
    $("figures").replaceChildren();
    $("bars").replaceChildren();
    $("reason").textContent = "";
    this.#notes([]);
    $("mini").hidden = true;
    $("mini-words").textContent = "";
  }

  #row(plan, isChosen) {
    const fits = plan.verdict === "fits";
    const choose = fits
      ? el("button", { type: "button", class: "plain", "data-plan": `${plan.precision} ${plan.residency}`, "aria-pressed": String(isChosen),
          "aria-label": `Run in ${plan.precision}, ${plan.residency}`, onclick: () => this.pin({ precision: plan.precision, residency: plan.residency }) }, isChosen ? "taken" : "take")
      : el("span", { class: "tag" }, plan.verdict);
    const cells = [plan.precision, plan.residency, bytes(peak(plan)), fits || plan.verdict === "too large" ? brief(plan.seconds) : "–", Math.round(plan.psnr)];
    return el("tr", { class: fits ? "" : "no", title: sentence(plan.reason), "aria-current": isChosen ? "true" : null },
      cells.map((cell, place) => el("td", { class: place > 1 ? "number" : "" }, cell)), el("td", {}, choose));
  }

  #verdict(verdict, words, more) {
    $("verdict").className = { fits: "good", "": "" }[verdict] ?? "bad";
    $("verdict").replaceChildren(icon({ fits: "check", "": "wait" }[verdict] ?? "cross"), el("p", {}, el("strong", {}, words), el("span", {}, more)));
  }

  #figures(pairs) {
    $("figures").replaceChildren(...pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", { id: `figure-${name}` }, value))));
  }

  #bars(chosen, passes) {
    const budget = chosen[0].budget_bytes;
    const most = Math.max(...chosen.map(peak));
    const enlarged = most * FEW < budget; // tensors alone then, in a scale of their own
    const whole = enlarged ? Math.max(...chosen.map((plan) => plan.peak_bytes)) * 1.02 : Math.max(budget, most) * 1.02;
    const at = (count) => `${(100 * count) / whole}%`;
    const rows = chosen.flatMap((plan, number) => Object.entries(plan.stages).filter(([, count]) => count > 0)
      .map(([stage, count]) => this.#bar(passes.length > 1 ? `${number + 1}. ${stage}` : stage, stage, count, plan, at, enlarged)));
    const words = el("span", {}, enlarged ? `Enlarged: the budget is ${Math.floor(budget / most)} times as much.` : `budget ${bytes(budget)}`);
    // On the side of the line that has room for it.
    if (!enlarged && 2 * budget < whole) words.style.left = at(budget);
    else if (!enlarged) words.style.right = `calc(100% - ${at(budget)})`;
    const scale = el("li", { class: enlarged ? "scale far" : "scale" }, el("span"), el("div", { class: "track" }, words), el("span"));
    $("bars").replaceChildren(el("ul", {}, rows, scale), this.#legend(chosen[0], enlarged));
  }

  #bar(name, stage, count, plan, at, enlarged) {
    const { context_bytes: context, budget_bytes: budget } = plan;
    const over = count + context - budget;
    const track = el("div", { class: "track", "aria-hidden": "true" });
    const part = (kind, from, length) => {
      const node = el("i", { class: kind });
      node.style.left = at(from);
      node.style.width = at(length);
      if (length > 0) track.append(node);
    };
    const begin = enlarged ? 0 : context;
    if (!enlarged) part("context", 0, context);
    part(`stage ${stage}`, begin, Math.min(count, Math.max(budget - context, 0)));
    part("over", Math.max(budget, context), over > 0 ? count + context - Math.max(budget, context) : 0);
    if (!enlarged) {
      const line = el("i", { class: "budget" });
      line.style.left = at(budget);
      track.append(line);
    }
    const words = over > 0 ? `${bytes(count)}, ${bytes(over)} over` : bytes(count);
    return el("li", { "data-stage": stage, "data-bytes": count }, el("span", { class: "name" }, name), track,
      el("span", { class: over > 0 ? "number bad" : "number" }, words));
  }

  #legend(plan, enlarged) {
    const parts = [];
    const holder = plan.device === "cpu" ? "the process itself" : "the device's context";
    if (plan.context_bytes) parts.push(el("span", {}, enlarged ? null : el("i", { class: "context" }), `${enlarged ? "Besides " : ""}${bytes(plan.context_bytes)} for ${holder}`));
    if (plan.host_bytes) parts.push(el("span", {}, `${bytes(plan.host_bytes)} wait in the host's memory`));
    return el("p", { class: "legend quiet" }, parts);
  }

  #notes(notes) {
    $("plan-notes").replaceChildren(...[...new Set(notes)].map((note) => el("li", {}, sentence(note))));
  }

  #mini(total, budget, fits, words) {
    const most = Math.max(total, budget);
    $("mini").hidden = false;
    $("mini").className = fits ? "mini good" : "mini bad";
    $("mini").querySelector(".fill").style.width = `${(100 * total) / most}%`;
    $("mini").querySelector(".budget").style.left = `${(100 * budget) / most}%`;
    $("mini-words").textContent = words;
  }
}

const brief = (count) => (count < 9.95 || count >= 1000 ? seconds(count) : `${Math.round(count)} s`);

/** "int8-dynamic, staged" */
const manner = (plan) => `${plan.precision}, ${plan.residency}`;

const sentence = (text) => (text ? text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".") : "");

function later(passes) {
  return passes.length > 1 ? [`two passes: ${passes.map((pass) => manner(pass.plans[0])).join(", then ")}`] : [];
}
