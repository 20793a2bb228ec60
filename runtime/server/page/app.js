// The page: what is asked, what it takes, and what becomes of it.

import { api } from "./api.js";
import { Controls } from "./controls.js";
import { $, choices, el, icon, pause } from "./dom.js";
import { Easel } from "./easel.js";
import { Gallery, facts } from "./gallery.js";
import { PlanView } from "./plan.js";
import { Run } from "./run.js";

const QUIET = 60; // milliseconds without a change before all ways are planned
const KEPT = "tightfit.asked";
const RATIOS = [[1, 1], [4, 3], [3, 4], [3, 2], [2, 3], [16, 9], [9, 16]];
const STAND_IN = 64; // pixels of a picture that stands for one whose bytes no plan depends on

class Page {
  async open() {
    this.loras = [];
    this.seen = null; // the job and picture that are looked at
    const [schema, info] = await Promise.all([api.controls(), api.info()]);
    this.models = [{ name: info.model, kind: "model", fits: true, state: "fits", words: "" }]; // until all are looked at
    this.controls = new Controls(schema, (name) => this.changed(name));
    this.plan = new PlanView((wishes) => this.pin(wishes));
    this.gallery = new Gallery((job, number) => this.look(job, number));
    this.run = new Run((id, news) => this.ended(id, news));
    const given = () => { $("problem").textContent = ""; this.changed(); };
    this.image = new Easel($("image-easel"), "image", "A picture to begin with", given, true);
    this.control = new Easel($("control-easel"), "control_image", "A picture to follow", given);
    $("machine").textContent = info.machine;
    this.#shelves();
    this.#wire();
    await this.restored();
    this.changed();
    const jobs = await this.gallery.refresh();
    const active = jobs.filter((job) => job.isActive);
    const current = active.find((job) => job.state === "running") ?? active.at(-1);
    if (current) this.run.watch(current.id);
    else if (jobs.find((job) => job.pictures.length)) this.look(jobs.find((job) => job.pictures.length), 0);
    document.documentElement.dataset.ready = "true";
    await this.#looked();
  }

  /** What can be named, which takes seconds where a model was never planned. */
  async #looked() {
    this.models = await api.models();
    const known = ["model", "vae", "controlnet", "refiner", "hires_upscaler"].map((id) => [id, this.wanted[id] || $(id).value]);
    this.#shelves();
    for (const [id, name] of known) {
      if ([...$(id).options].some((option) => option.value === name)) $(id).value = name;
    }
    await this.#described();
    this.changed();
  }

  // ---------------------------------------------------------------- what is asked

  /** What a client asks of our API: model, options and wishes. */
  asked(forPlan = false) {
    const masked = Boolean(this.image.data) && !this.image.mask.isEmpty;
    const given = this.controls.given((name, about) => this.#counts(name, about, masked));
    const asked = { model: $("model").value, prompt: $("prompt").value, ...given };
    if (this.loras.length) asked.lora = this.loras.map(({ name, weight }) => `${name}:${weight}`);
    if ($("vae").value) asked.vae = [$("vae").value];
    if (this.image.data) asked.image = forPlan ? this.#standIn(this.image) : this.image.data;
    if (masked) asked.mask_image = forPlan ? this.#standIn(this.image, "white") : this.image.mask.data;
    if (this.control.data) {
      asked.control_image = forPlan ? this.#standIn(this.control) : this.control.data;
      if ($("controlnet").value) asked.controlnet = $("controlnet").value;
    }
    return { ...asked, ...this.#size(asked) };
  }

  #counts(name, about, masked) {
    if (name === "image_guidance_scale" && !this.about?.edits) return false;
    const isOutpainting = Boolean(this.controls.get("outpaint"));
    if (name.includes("mask")) return Boolean(this.image.data) && (masked || isOutpainting);
    if (about.panel === "Picture") return Boolean(this.image.data);
    if (/^(control|guess)/.test(name)) return Boolean(this.control.data);
    if (/^hires_/.test(name) && name !== "hires_size") return Boolean(this.controls.get("hires") || this.controls.get("hires_size"));
    if (name === "refiner_start") return Boolean(this.controls.get("refiner"));
    return true;
  }

  /** Said in full where a picture is given, so that another of any size may stand for it in a plan. */
  #size(asked) {
    const picture = [this.image, this.control].find((easel) => easel.data);
    if (!picture || !this.about || asked.outpaint || (asked.width && asked.height)) return {};
    const fitted = asked.mask_padding === undefined || picture !== this.image ? this.#fitted(picture) : this.about;
    return { width: asked.width ?? fitted.width, height: asked.height ?? fitted.height };
  }

  #fitted({ width, height }) {
    const step = Math.max(this.about.multiple, 8);
    const factor = Math.min(1, Math.sqrt((this.about.width * this.about.height) / (width * height)));
    const side = (pixels) => Math.max(step, Math.floor(Math.floor(pixels * factor) / step) * step);
    return { width: side(width), height: side(height) };
  }

  #standIn(easel, colour = "gray") {
    const isWhole = Boolean(this.controls.get("outpaint"));
    const [width, height] = isWhole ? [easel.width, easel.height] : [STAND_IN, STAND_IN];
    const key = `${width} ${height} ${colour}`;
    this.standIns ??= new Map();
    if (!this.standIns.has(key)) {
      const canvas = Object.assign(document.createElement("canvas"), { width, height });
      const pen = canvas.getContext("2d");
      pen.fillStyle = colour;
      pen.fillRect(0, 0, width, height);
      this.standIns.set(key, canvas.toDataURL("image/png"));
    }
    return this.standIns.get(key);
  }

  changed(name) {
    if (name === "width" || name === "height") this.#showSize();
    if (name === "scheduler") this.#showSchedules();
    this.#states();
    this.#keep();
    this.plan.wait();
    this.isStale = true;
    this.asking?.abort();
    this.planned();
  }

  // ---------------------------------------------------------------- the plan

  /** Plan until nothing has changed meanwhile: first the way that ran best before, which takes milliseconds, so
   * that the bar follows; once it is quiet all ways, which take seconds for a size that was never planned. */
  async planned() {
    if (this.planning) return;
    this.planning = true;
    while (this.isStale) {
      this.isStale = false;
      const asked = this.asked(true);
      await this.#glance(asked);
      await pause(QUIET);
      if (!this.isStale) await this.#planned(asked);
    }
    this.planning = false;
  }

  /** The same way as before. What cannot be done so is left to a look at all ways. */
  async #glance(asked) {
    if (this.best?.model !== asked.model || this.best.wished !== this.#wished()) return;
    const passes = await api.plan({ ...this.best.wishes, ...asked }).catch(() => null);
    if (passes) this.plan.glance(passes, this.pinned, !this.isStale);
  }

  async #planned(asked) {
    const { pinned } = this;
    const { signal } = (this.asking = new AbortController());
    const { precision, residency, ...free } = asked;
    try {
      const passes = await api.plan(asked, signal);
      this.controls.content();
      this.best = { model: asked.model, wished: this.#wished(), wishes: passes[0].plans[0].wishes };
      this.plan.show(passes, pinned);
      $("plan").dataset.asked = JSON.stringify({ ...asked, image: undefined, mask_image: undefined, control_image: undefined });
      const every = pinned ? (await api.plan(free, signal))[0].plans : passes[0].plans;
      this.plan.list(every, pinned && passes[0].plans[0]);
    } catch (error) {
      if (signal.aborted) return;
      this.controls.complain(error.message);
      this.plan.fail(this.controls.worded(error.message));
    }
  }

  #wished() { return JSON.stringify(this.controls.given((name) => this.controls.wished.has(name))); }

  get pinned() {
    const [precision, residency] = [this.controls.get("precision"), this.controls.get("residency")];
    return precision || residency ? { precision, residency } : null;
  }

  pin(wishes) {
    this.controls.set("precision", wishes?.precision);
    this.controls.set("residency", wishes?.residency);
    this.changed();
  }

  // ---------------------------------------------------------------- painting

  async paint() {
    $("problem").textContent = "";
    this.controls.content();
    const easels = [this.image, this.control];
    await Promise.all(easels.map((easel) => easel.taking));
    const refused = easels.find((easel) => easel.problem);
    if (refused) {
      $("problem").textContent = refused.problem;
      return this.#open(refused.file);
    }
    try {
      const job = await api.paint(this.asked());
      this.run.say("Asked for. Painting begins when its turn comes.");
      this.run.own(job.id);
      if (!this.run.id) this.run.watch(job.id);
      const { top } = $("stage").getBoundingClientRect();
      if (top < 0 || top > innerHeight / 2) $("stage").scrollIntoView({ block: "start" });
      await this.gallery.refresh();
    } catch (error) {
      if (!this.controls.complain(error.message)) $("problem").textContent = this.controls.worded(error.message);
      else this.#open(document.querySelector("[aria-invalid]"));
      this.run.say(error.message);
    }
  }

  #open(input) {
    const details = input?.closest("details");
    if (details) details.open = true;
    input?.focus();
  }

  async ended(id, news) {
    const jobs = await this.gallery.refresh().catch(() => []);
    const job = jobs.find((one) => one.id === id) ?? (await api.job(id).catch(() => null));
    const stopped = job?.pictures.length ? "Stopped; what there is so far is kept." : "Stopped before there was anything to keep.";
    const words = { done: "Done.", stopped, cancelled: "Cancelled.", postponed: "The server is closed: it is painted after its next start." };
    this.run.say(words[news.state] ?? job?.error ?? "It failed.");
    if (job?.pictures.length) this.look(job, job.pictures.length - 1);
    else if (this.seen) this.look(...this.seen);
    else this.#blank();
    if (news.state === "failed" && job && !this.controls.complain(job.error)) $("problem").textContent = this.controls.worded(job.error);
    const next = jobs.find((one) => one.state === "running") ?? jobs.filter((one) => one.isActive).at(-1);
    if (next) this.run.watch(next.id);
  }

  #blank() {
    $("shown").hidden = true;
    $("shown").removeAttribute("src");
    $("caption").hidden = true;
    $("nothing").hidden = false;
  }

  look(job, number) {
    this.seen = [job, number];
    if (this.run.id && $("frame").classList.contains("partial")) $("frame").classList.remove("partial");
    const address = job.pictures[number];
    $("shown").src = address;
    $("shown").alt = job.prompt || "A picture without a prompt";
    $("shown").hidden = false;
    $("nothing").hidden = true;
    $("caption").hidden = false;
    $("caption-prompt").textContent = job.prompt;
    $("caption-facts").textContent = facts(job, number);
    $("caption-notices").replaceChildren(...job.notices.map((notice) => el("li", {}, notice)));
    $("save").href = address;
    $("save").download = `${job.id.slice(0, 8)}-${number + 1}.png`;
  }

  async send(where) {
    const [job, number] = this.seen;
    if (where === "seed") {
      this.controls.set("seed", job.request.seed + number);
      return this.changed("seed");
    }
    const blob = await (await fetch(job.pictures[number])).blob();
    if (where === "settings") return this.restore(blob);
    const easel = where === "control" ? this.control : this.image;
    const details = $(where === "control" ? "control-details" : "image-details");
    details.open = true;
    await easel.take(blob);
    details.scrollIntoView({ block: "nearest" });
    if (where === "inpaint") $("mask").focus();
    else easel.file.focus();
  }

  // ---------------------------------------------------------------- settings kept, and of pictures

  /** Take the settings that a picture carries. */
  async restore(blob) {
    try {
      const { options, model, notices } = await api.settings(blob);
      await this.take(model ?? $("model").value, options);
      this.#notices(notices.length ? notices : ["The picture's settings are taken."]);
    } catch (error) {
      this.#notices([error.message]);
    }
    this.changed();
  }

  async take(model, { prompt = "", lora = [], vae = [], ...others }) {
    this.controls.clear();
    this.wanted = { model, vae: vae[0], ...others };
    if ([...$("model").options].some((option) => option.value === model)) $("model").value = model;
    await this.#described();
    $("prompt").value = prompt;
    this.loras = lora.map((text) => ({ name: text.split(":")[0], weight: text.split(":").slice(1).join(":") || "1" }));
    $("vae").value = vae[0] ?? "";
    if ($("vae").selectedIndex < 0) $("vae").value = "";
    for (const [name, value] of Object.entries(others)) this.controls.set(name, value);
    this.#showLoras();
    this.#showSize();
    this.#showSchedules();
    this.#states();
  }

  async restored() {
    let kept = {};
    try { kept = JSON.parse(stored(KEPT) ?? "{}"); } catch { /* of another version */ }
    await this.take(kept.model ?? $("model").value, kept.options ?? {});
  }

  #keep() {
    const { model, ...options } = this.asked(true);
    for (const name of ["image", "mask_image", "control_image"]) delete options[name];
    store(KEPT, JSON.stringify({ model, options }));
  }

  #notices(sentences) {
    $("notices").replaceChildren(...sentences.map((sentence) => el("li", {}, sentence)));
  }

  // ---------------------------------------------------------------- models

  #of(kind) { return this.models.filter((model) => model.kind === kind && !model.broken); }

  #shelves() {
    const models = this.#of("model");
    const entry = (model) => [model.name, `${model.name} · ${model.state}`];
    const fit = models.filter((model) => model.fits);
    const not = models.filter((model) => !model.fits);
    choices($("model"), [...(fit.length ? [{ label: "Fits", options: fit.map(entry) }] : []), ...(not.length ? [{ label: "Cannot be used here", options: not.map(entry) }] : [])],
      $("model").value || models[0]?.name);
    const named = (kind, none) => [["", none], ...this.#of(kind).map((one) => [one.name, one.name])];
    choices($("controlnet"), named("ControlNet", "the model's own, or the only one"), "");
    choices($("vae"), named("VAE", "the model's own"), "");
    const refiner = this.controls.fields.get("refiner");
    const upscaler = this.controls.fields.get("hires_upscaler");
    this.#asSelect(refiner, [["", "none"], ...models.map((model) => [model.name, model.name])]);
    this.#asSelect(upscaler, [...this.controls.schema.upscalers.map(({ name, label }) => [name, label]), ...this.#of("upscaler").map((one) => [one.name, one.name])]);
    $("lora-field").hidden = this.#of("LoRA").length === 0;
    $("vae-field").hidden = this.#of("VAE").length === 0;
  }

  /** A select of names in place of a field's text. */
  #asSelect(field, entries) {
    if (!field) return;
    const select = el("select", { id: field.input.id, "aria-describedby": field.input.getAttribute("aria-describedby") });
    choices(select, entries, field.about.default ?? "");
    select.addEventListener("input", () => this.changed(field.name));
    field.input.replaceWith(select);
    field.input = select;
  }

  /** What the model takes where nothing is said. */
  async #described() {
    const model = this.models.find((one) => one.name === $("model").value);
    $("model-fits").textContent = model ? [model.words, model.family].filter(Boolean).join(" · ") : "";
    this.about = await api.model($("model").value).catch(() => null);
    if (!this.about) return;
    for (const name of ["width", "height", "num_inference_steps", "guidance_scale", "scheduler"]) this.controls.fields.get(name)?.assume(this.about[name]);
    const editing = this.controls.fields.get("image_guidance_scale");
    if (editing) editing.row.hidden = !this.about.edits;
    for (const name of ["width", "height"]) {
      const { input, slider } = this.controls.fields.get(name);
      input.step = this.about.multiple;
      if (slider) slider.step = slider.min = this.about.multiple;
    }
    this.#sizes();
    this.#showLoras();
  }

  #sizes() {
    const { width, height, multiple } = this.about;
    const step = Math.max(multiple, 8);
    const area = width * height;
    const sized = RATIOS.map(([wide, tall]) => {
      const side = (part, other) => Math.max(step, Math.round(Math.sqrt((area * part) / other) / step) * step);
      return [`${side(wide, tall)}x${side(tall, wide)}`, `${wide}:${tall} · ${side(wide, tall)} × ${side(tall, wide)}`];
    });
    choices($("size"), [["", `the model's · ${width} × ${height}`], ...sized, ["free", "free, as below"]], "");
    this.#showSize();
  }

  #showSize() {
    const [width, height] = ["width", "height"].map((name) => this.controls.get(name));
    const text = width || height ? `${width ?? this.about?.width}x${height ?? this.about?.height}` : "";
    $("size").value = [...$("size").options].some((option) => option.value === text) ? text : "free";
  }

  #showSchedules() {
    const sampler = this.controls.get("scheduler") ?? this.about?.scheduler;
    const known = this.controls.schema.samplers.find((one) => one.name === sampler)?.schedules;
    for (const option of this.controls.fields.get("schedule").input.options) {
      option.disabled = Boolean(known) && option.value !== "" && !known.includes(option.value);
    }
  }

  #showLoras() {
    const family = this.about?.family;
    const kind = (one) => (!one?.family || !family || one.family === family ? "fits this model" : `is for ${one.family}`);
    const left = this.#of("LoRA").filter((one) => !this.loras.some((lora) => lora.name === one.name));
    const known = (name) => this.models.find((one) => one.name === name && one.kind === "LoRA");
    choices($("lora-add"), [["", "Add a LoRA …"], ...left.map((one) => [one.name, `${one.name} · ${kind(one)}`])], "");
    $("loras").replaceChildren(...this.loras.map((lora, place) => {
      const weight = el("input", { type: "number", step: "0.05", value: lora.weight, "aria-label": `Weight of ${lora.name}` });
      weight.addEventListener("input", () => { lora.weight = weight.value || "1"; this.changed("lora"); });
      const words = [kind(known(lora.name)), ...(known(lora.name)?.triggers ?? [])].join(", ");
      const remove = el("button", { type: "button", class: "plain", "aria-label": `Remove ${lora.name}`, onclick: () => { this.loras.splice(place, 1); this.#showLoras(); this.changed("lora"); $("lora-add").focus(); } }, icon("cross"));
      return el("li", {}, el("span", {}, lora.name, el("small", { class: "quiet" }, ` ${words}`)), weight, remove);
    }));
  }

  #states() {
    const { schema, fields } = this.controls;
    const isMasked = Boolean(this.image.data) && !this.image.mask.isEmpty;
    for (const [name, value] of Object.entries(schema.masked)) fields.get(name)?.assume(isMasked ? value : fields.get(name).about.default);
    const say = (name, words) => { document.querySelector(`[data-state="${name}"]`).textContent = words; };
    say("image", this.image.data ? (this.image.mask.isEmpty ? "on" : "on, with a mask") : "");
    say("control", this.control.data ? "on" : "");
    say("second", this.controls.get("hires") || this.controls.get("hires_size") ? "hires fix" : this.controls.get("refiner") ? "refiner" : "");
    say("machine", Object.values(this.controls.given((name) => this.controls.wished.has(name))).join(", "));
  }

  // ---------------------------------------------------------------- keys, drops, buttons

  #wire() {
    $("controls").addEventListener("submit", (event) => { event.preventDefault(); this.paint(); });
    $("prompt").addEventListener("input", () => this.changed("prompt"));
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.paint(); }
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.run.id) { event.preventDefault(); this.run.cancel(); }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target !== $("prompt")) this.paint();
    });
    $("model").addEventListener("input", async () => { this.wanted = {}; this.plan.wait(); await this.#described(); this.#showSchedules(); this.changed("model"); });
    for (const name of ["vae", "controlnet"]) $(name).addEventListener("input", () => this.changed(name));
    $("lora-add").addEventListener("input", () => {
      this.loras.push({ name: $("lora-add").value, weight: "1" });
      this.#showLoras();
      $("loras").lastElementChild?.querySelector("input").focus();
      this.changed("lora");
    });
    $("size").addEventListener("input", () => {
      if ($("size").value === "free") return this.controls.fields.get("width").input.focus();
      const [width, height] = $("size").value.split("x");
      this.#resize(width || undefined, height || undefined);
    });
    $("swap").addEventListener("click", () => {
      const side = (name) => this.controls.get(name) ?? this.about?.[name];
      this.#resize(side("height"), side("width"));
    });
    this.#seeds();
    for (const button of document.querySelectorAll("[data-send]")) button.addEventListener("click", () => this.send(button.dataset.send));
    $("restore").addEventListener("click", () => $("restore-file").click());
    $("restore-file").addEventListener("change", () => { this.restore($("restore-file").files[0]); $("restore-file").value = ""; });
    $("reset").addEventListener("click", async () => {
      for (const easel of [this.image, this.control]) easel.clear();
      await this.take($("model").value, {});
      this.#notices([]);
      this.changed();
    });
    this.#drops();
  }

  #resize(width, height) {
    this.controls.set("width", width);
    this.controls.set("height", height);
    this.changed("width");
  }

  #seeds() {
    const button = (words, name, act) => el("button", { type: "button", class: "plain", "aria-label": words, title: words, onclick: act }, icon(name));
    const input = $("seed");
    input.placeholder = "random";
    const row = el("div", { class: "with" });
    input.replaceWith(row);
    row.append(input, button("A random seed", "dice", () => { this.controls.set("seed", undefined); this.changed("seed"); }),
      button("The seed of the picture that is shown", "again", () => this.seen && this.send("seed")));
  }

  #drops() {
    const carries = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    let inside = 0;
    document.addEventListener("dragenter", (event) => { if (carries(event)) { inside += 1; $("drop-hint").hidden = false; } });
    document.addEventListener("dragleave", (event) => { if (carries(event) && --inside <= 0) $("drop-hint").hidden = true; });
    document.addEventListener("dragover", (event) => { if (carries(event)) event.preventDefault(); });
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      const [file] = event.dataTransfer?.files ?? [];
      if (file) this.restore(file);
    });
    document.addEventListener("drop", () => { inside = 0; $("drop-hint").hidden = true; }, true);
    document.addEventListener("paste", (event) => {
      const [file] = event.clipboardData?.files ?? [];
      const place = document.activeElement?.closest("#image-details, #control-details");
      if (!file || !(place || file.type.startsWith("image/"))) return;
      event.preventDefault();
      const isControl = place?.id === "control-details";
      $(isControl ? "control-details" : "image-details").open = true;
      (isControl ? this.control : this.image).take(file);
    });
  }
}

/** What a browser keeps, if it is let. */
function stored(key) {
  try { return localStorage.getItem(key); } catch { return null; }
}

function store(key, value) {
  try { localStorage.setItem(key, value); } catch { /* nothing is kept then */ }
}

function themed() {
  const root = document.documentElement;
  const kept = stored("tightfit.theme");
  if (kept) root.dataset.theme = kept;
  $("theme").addEventListener("click", () => {
    const isDark = getComputedStyle(root).colorScheme.split(" ").length > 1
      ? matchMedia("(prefers-color-scheme: dark)").matches
      : getComputedStyle(root).colorScheme === "dark";
    root.dataset.theme = isDark ? "light" : "dark";
    store("tightfit.theme", root.dataset.theme);
  });
}

themed();
new Page().open().catch((error) => { $("problem").textContent = `The page cannot be set up: ${error.message}`; });
