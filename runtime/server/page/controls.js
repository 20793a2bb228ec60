// Controls, made of what the server says of each option: its kind, bounds, choices, default and help.

import { choices, el } from "./dom.js";

// What the page calls an option, where its name is no word for it.
const LABELS = {
  num_inference_steps: "Steps", guidance_scale: "CFG", scheduler: "Sampler", num_images: "Pictures",
  negative_prompt: "Negative prompt", strength: "Strength", resize: "Fit", image_guidance_scale: "Picture's guidance",
  mask_padding: "Only around the mask", invert_mask: "Paint what is not masked", outpaint: "Paint around it",
  controlnet_conditioning_scale: "Weight", control_guidance_start: "Start", control_guidance_end: "End",
  control_preprocess: "Preprocess", control_mode: "Mode", control_resize: "Fit", hires: "Enlarge by",
  hires_size: "Or to", hires_strength: "Strength", hires_steps: "Steps", hires_upscaler: "Upscaler",
  hires_prompt: "Prompt", hires_scheduler: "Sampler", refiner: "Refiner", refiner_start: "Refiner's start",
  zero_snr: "Zero SNR", ensd: "ENSD", cfg: "CFG", min_psnr: "Least dB", tiling: "VAE's tiling", eta: "Eta",
};
const WORDS = { pixels: "width", prompt_syntax: "prompt_syntax", images: "num_images", steps: "num_inference_steps",
  "strength of a control": "controlnet_conditioning_scale", weight: "controlnet_conditioning_scale", mask: "mask_blur" };
const MOST_DEFAULT = 4; // a slider goes to so many times the default, where the bound is further away

const label = (name) => {
  const words = LABELS[name] ?? name.replaceAll("_", " ");
  return words[0].toUpperCase() + words.slice(1);
};

/** A name as sentences have it: of a field, or of an option of the command line. */
const spelled = (name) => new RegExp(`(?<![\\w-])(--)?${name.replace(/[_ ]/g, "[-_ ]")}(?![\\w-])`, "i");

class Field {
  /** One option: its label, input, slider if it has bounds, help and error. */
  constructor(about, changed) {
    this.name = about.name;
    this.about = about;
    const id = about.name;
    this.error = el("p", { class: "error", id: `${id}-error` });
    this.input = this.#input(id);
    this.input.addEventListener("input", () => { this.#follow(); changed(this.name); });
    const help = about.help ? el("p", { class: "hint", id: `${id}-help` }, about.help) : null;
    this.input.setAttribute("aria-describedby", [help && help.id, this.error.id].filter(Boolean).join(" "));
    this.slider = about.kind === "integer" || about.kind === "number" ? this.#slid(changed) : null;
    const name = el("label", { for: id }, label(about.name));
    this.row = about.kind === "boolean"
      ? el("div", { class: "field check" }, this.input, name, help, this.error)
      : el("div", { class: `field ${this.slider ? "slid" : ""}`, title: about.help }, name, this.slider, this.input, help, this.error);
    this.assume(about.default);
  }

  #input(id) {
    const { kind, choices: words, least, most, default: given } = this.about;
    if (words.length) {
      const select = el("select", { id });
      const auto = given === "auto" || given === null ? [["", "auto"]] : [];
      choices(select, [...auto, ...words.map((word) => [word, word])], auto.length ? "" : given);
      return select;
    }
    if (kind === "boolean") return el("input", { id, type: "checkbox" });
    if (kind === "text") {
      return /prompt$/.test(id) ? el("textarea", { id, rows: 2 }) : el("input", { id, type: "text", autocomplete: "off" });
    }
    const step = kind === "integer" ? 1 : "any";
    return el("input", { id, type: "number", step, min: least, max: most, inputmode: kind === "integer" ? "numeric" : "decimal" });
  }

  #slid(changed) {
    const { least, most, kind } = this.about;
    if (least === null || least < 0 || (most > 10000 && this.name === "seed")) return null;
    const slider = el("input", { type: "range", tabindex: -1, "aria-hidden": "true", min: least, max: most, step: kind === "integer" ? 1 : 0.01 });
    slider.addEventListener("input", () => { this.input.value = slider.value; changed(this.name); });
    return slider;
  }

  /** What stands for a value that is not given. */
  assume(value) {
    this.assumed = value;
    if (this.input.tagName === "SELECT") {
      const [auto] = this.input.options;
      if (auto?.value === "") auto.textContent = value && value !== "auto" ? `auto: ${this.called(value)}` : "auto";
      return;
    }
    if ("placeholder" in this.input) this.input.placeholder = value ?? (this.about.kind === "text" ? "" : "auto");
    if (this.slider) {
      const { least, most } = this.about;
      const usual = typeof value === "number" && value > 1 ? Math.max(MOST_DEFAULT * value, least) : most;
      this.slider.max = Math.min(most, usual);
      this.slider.hidden = most > 100 && !(typeof value === "number" && value > 1);
    }
    this.#follow();
  }

  called(value) {
    return [...this.input.options].find((option) => option.value === value)?.textContent ?? value;
  }

  #follow() {
    if (this.slider) this.slider.value = this.input.value === "" ? this.assumed ?? this.slider.min : this.input.value;
  }

  /** What is given, undefined where that is nothing. */
  get value() {
    const { kind } = this.about;
    if (this.input.type === "checkbox") return this.input.checked || undefined;
    const text = this.input.value;
    if (text === "" || (this.input.tagName === "SELECT" && text === this.about.default)) return undefined;
    return kind === "integer" || kind === "number" ? Number(text) : text;
  }

  set value(value) {
    if (this.input.tagName === "SELECT" && value !== undefined && ![...this.input.options].some((option) => option.value === value)) {
      this.input.append(el("option", { value }, value)); // a name that is known in more spellings than are listed
    }
    if (this.input.type === "checkbox") this.input.checked = Boolean(value);
    else this.input.value = value ?? (this.input.tagName === "SELECT" ? this.about.default ?? "" : "");
    if (this.input.tagName === "SELECT" && this.input.selectedIndex < 0) this.input.selectedIndex = 0;
    this.#follow();
  }
}

export class Controls {
  /** All options, by their names. `changed` is called with the name of one that has. */
  constructor(schema, changed) {
    this.schema = schema;
    this.changed = changed;
    this.fields = new Map();
    this.wished = new Set(schema.wishes.map((about) => about.name));
    const abouts = new Map([...schema.options, ...schema.wishes].map((about) => [about.name, about]));
    for (const place of document.querySelectorAll("[data-options], [data-wishes]")) {
      this.#fill(place, (place.dataset.options ?? place.dataset.wishes).split(" ").map((name) => abouts.get(name)));
    }
    for (const place of document.querySelectorAll("[data-panel]")) {
      const without = (place.dataset.without ?? "").split(" ");
      const fits = (about) => about.panel === place.dataset.panel && !without.includes(about.name);
      this.#fill(place, schema.options.filter((about) => fits(about) && !this.fields.has(about.name)));
    }
    for (const { name, label: words } of [...schema.samplers, ...schema.schedules]) {
      for (const field of ["scheduler", "hires_scheduler", "schedule"].map((key) => this.fields.get(key))) {
        const option = [...(field?.input.options ?? [])].find((one) => one.value === name);
        if (option) option.textContent = words;
      }
    }
  }

  #fill(place, abouts) {
    for (const about of abouts.filter(Boolean)) {
      const field = new Field(about, this.changed);
      this.fields.set(about.name, field);
      place.append(field.row);
    }
  }

  get(name) { return this.fields.get(name)?.value; }

  set(name, value) {
    const field = this.fields.get(name);
    if (field) field.value = value;
  }

  /** What is given of the fields that `wanted` says. */
  given(wanted) {
    const values = {};
    for (const [name, field] of this.fields) {
      if (wanted(name, field.about) && field.value !== undefined) values[name] = field.value;
    }
    return values;
  }

  clear() {
    for (const field of this.fields.values()) field.value = undefined;
  }

  /** Say what is wrong beside the control that it is of. Answers whether there is one. */
  complain(sentence) {
    this.content();
    const name = this.#meant(sentence);
    const place = document.getElementById(`${name}-error`);
    if (!place) return false;
    place.textContent = this.worded(sentence);
    document.getElementById(name)?.setAttribute("aria-invalid", "true");
    return true;
  }

  /** The sentence with an option's name as the page has it. */
  worded(sentence) {
    const name = this.#meant(sentence);
    const words = this.fields.has(name) ? sentence.replace(spelled(name), label(name)) : sentence;
    return words[0].toUpperCase() + words.slice(1) + (/[.!?]$/.test(words) ? "" : ".");
  }

  content() {
    const ours = "#controls .field:not(.easel) .error"; // an easel's is of its file, and stays with that
    for (const place of document.querySelectorAll(ours)) place.textContent = "";
    for (const input of document.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  }

  /** The control that a sentence names first, the longest of those that begin there. */
  #meant(sentence) {
    const known = ["prompt", "model", "lora", "vae", "controlnet", ...this.fields.keys()];
    let best = [Infinity, 0, ""];
    for (const [words, name] of [...known.map((name) => [name, name]), ...Object.entries(WORDS)]) {
      const at = sentence.search(spelled(words));
      if (at >= 0 && (at < best[0] || (at === best[0] && words.length > best[1]))) best = [at, words.length, name];
    }
    return best[2];
  }
}
