// A place for a picture that is given: chosen, dropped or pasted; with a mask painted over it if asked for.

import { el, icon } from "./dom.js";

/** A data URL of a file's bytes, as they are. */
export function encoded(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

export class Easel {
  /** In `place`, for a picture called `name`; `changed` is called when picture or mask have. */
  constructor(place, name, words, changed, masked = false) {
    this.changed = changed;
    this.data = null; // a data URL
    this.taking = null; // a promise, while a file is read
    this.image = el("img", { alt: words, ".draggable": false });
    this.file = el("input", { type: "file", accept: "image/*", id: name, "aria-describedby": `${name}-error` });
    this.file.addEventListener("change", () => this.file.files[0] && this.take(this.file.files[0]));
    this.error = el("p", { class: "error", id: `${name}-error` });
    this.view = el("div", { class: "view", hidden: true }, this.image);
    this.remove = el("button", { type: "button", class: "plain", hidden: true, onclick: () => this.clear() });
    const choose = el("label", { class: "choose", for: name }, `Choose, drop or paste ${words.toLowerCase()}`);
    this.box = el("div", { class: "drop" }, choose, this.file, this.view);
    place.classList.add("field");
    place.append(this.box, this.error);
    this.mask = masked ? new Mask(this.view, place, changed) : null;
    place.append(this.remove);
    this.box.addEventListener("dragover", (event) => { event.preventDefault(); this.box.classList.add("over"); });
    this.box.addEventListener("dragleave", () => this.box.classList.remove("over"));
    this.box.addEventListener("drop", (event) => {
      this.box.classList.remove("over");
      const [file] = event.dataTransfer.files;
      if (file) { event.preventDefault(); event.stopPropagation(); this.take(file); }
    });
  }

  get width() { return this.data ? this.image.naturalWidth : 0; }
  get height() { return this.data ? this.image.naturalHeight : 0; }

  /** Why the file that was given last is not used; "" where it is, or none was given. */
  get problem() { return this.error.textContent; }

  /** Show a picture's file, or say that it is none. */
  take(blob) {
    this.taking = this.#taken(blob);
    return this.taking;
  }

  async #taken(blob) {
    let data;
    try {
      data = await encoded(blob);
      this.image.src = data;
      await this.image.decode();
    } catch {
      this.clear();
      this.error.textContent = `${blob.name ?? "This"} is no picture that your browser can show: choose a PNG, JPEG or WebP.`;
      this.remove.textContent = "Go on without it";
      this.remove.hidden = false;
      return;
    }
    this.error.textContent = "";
    this.data = data;
    this.remove.textContent = "Remove the picture";
    this.view.hidden = this.remove.hidden = false;
    this.box.classList.add("full");
    this.mask?.begin(this.image.naturalWidth, this.image.naturalHeight);
    this.changed();
  }

  clear() {
    this.error.textContent = "";
    this.data = null;
    this.file.value = "";
    this.image.removeAttribute("src");
    this.view.hidden = this.remove.hidden = true;
    this.box.classList.remove("full");
    this.mask?.end();
    this.changed();
  }
}

class Mask {
  /** Strokes over a picture, in its pixels. White is painted anew. */
  constructor(view, place, changed) {
    this.changed = changed;
    this.strokes = [];
    this.canvas = el("canvas", { tabindex: 0, role: "application", id: "mask",
      "aria-label": "Mask. Arrows move the brush, Space paints, Shift with arrows draws, Control+Z undoes" });
    this.brush = el("div", { class: "brush", "aria-hidden": "true" });
    view.append(this.canvas, this.brush);
    this.size = el("input", { type: "range", id: "brush-size", min: 1, max: 100, value: 30 });
    this.erases = el("button", { type: "button", class: "plain", "aria-pressed": "false" }, icon("eraser"), " Erase");
    this.erases.addEventListener("click", () => {
      this.erases.setAttribute("aria-pressed", String(!this.isErasing));
    });
    const button = (name, words, act) => el("button", { type: "button", class: "plain", onclick: act }, name && icon(name), ` ${words}`);
    this.tools = el("div", { class: "tools", hidden: true },
      el("p", { class: "hint" }, "Paint over what is to change."),
      el("div", { class: "with" }, el("label", { for: "brush-size" }, "Brush"), this.size),
      el("div", { class: "row" }, this.erases, button("undo", "Undo", () => this.undo()), button("cross", "Clear", () => this.empty())));
    place.append(this.tools);
    this.#listen();
  }

  get isErasing() { return this.erases.getAttribute("aria-pressed") === "true"; }
  get isEmpty() { return !this.strokes.some((stroke) => !stroke.erases); }
  get radius() { return Math.max(0.5, (this.size.value / 200) * Math.min(this.canvas.width, this.canvas.height) / 1.5); }

  begin(width, height) {
    [this.canvas.width, this.canvas.height] = [width, height];
    this.at = [width / 2, height / 2];
    this.strokes = [];
    this.tools.hidden = false;
  }

  end() { this.strokes = []; this.tools.hidden = true; }

  undo() { this.strokes.pop(); this.#redraw(); this.changed(); }
  empty() { this.strokes = []; this.#redraw(); this.changed(); }

  /** A PNG as a data URL, white where it is painted. */
  get data() {
    const { width, height } = this.canvas;
    const white = Object.assign(document.createElement("canvas"), { width, height });
    let pen = white.getContext("2d");
    pen.drawImage(this.canvas, 0, 0);
    pen.globalCompositeOperation = "source-in";
    pen.fillStyle = "white";
    pen.fillRect(0, 0, width, height);
    pen.globalCompositeOperation = "destination-over";
    pen.fillStyle = "black";
    pen.fillRect(0, 0, width, height);
    return white.toDataURL("image/png");
  }

  #listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button > 0) return;
      event.preventDefault();
      canvas.focus({ preventScroll: true });
      canvas.setPointerCapture(event.pointerId);
      this.#start(this.#place(event));
    });
    canvas.addEventListener("pointermove", (event) => {
      this.#follow(event);
      if (!canvas.hasPointerCapture(event.pointerId)) return;
      const events = event.getCoalescedEvents?.() ?? [];
      for (const each of events.length ? events : [event]) this.#draw(this.#place(each));
    });
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, (event) => {
        if (canvas.hasPointerCapture(event.pointerId)) canvas.releasePointerCapture(event.pointerId);
        this.changed();
      });
    }
    canvas.addEventListener("pointerleave", () => { this.brush.hidden = true; });
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("focus", () => this.#show());
    canvas.addEventListener("blur", () => { this.brush.hidden = true; });
    this.size.addEventListener("input", () => this.#show());
  }

  #key(event) {
    const step = Math.max(1, this.radius / 2);
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (event.key in moves) {
      const [x, y] = moves[event.key];
      const within = (value, most) => Math.min(Math.max(value, 0), most);
      if (event.shiftKey && !this.drawing) this.#start(this.at);
      this.at = [within(this.at[0] + x, this.canvas.width), within(this.at[1] + y, this.canvas.height)];
      if (event.shiftKey) { this.#draw(this.at); this.changed(); }
      this.drawing = event.shiftKey;
      this.#show();
    } else if (event.key === " ") {
      this.#start(this.at);
      this.changed();
    } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
      this.undo();
    } else if (event.key === "[" || event.key === "]") {
      this.size.value = Number(this.size.value) + (event.key === "]" ? 5 : -5);
      this.#show();
    } else {
      return;
    }
    event.preventDefault();
  }

  /** In pixels of the picture, of which the element may show fewer. */
  #place(event) {
    const shown = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / shown.width;
    return [(event.clientX - shown.left) * scale, (event.clientY - shown.top) * scale];
  }

  #start(place) {
    this.strokes.push({ erases: this.isErasing, radius: this.radius, places: [place] });
    this.#draw(place);
  }

  #draw(place) {
    const stroke = this.strokes.at(-1);
    const from = stroke.places.at(-1);
    stroke.places.push(place);
    this.at = place;
    this.#line(stroke, [from, place]);
  }

  #line(stroke, places) {
    const pen = this.canvas.getContext("2d");
    pen.globalCompositeOperation = stroke.erases ? "destination-out" : "source-over";
    pen.strokeStyle = "#e0457b";
    pen.lineWidth = stroke.radius * 2;
    pen.lineCap = pen.lineJoin = "round";
    pen.beginPath();
    pen.moveTo(places[0][0], places[0][1] + 0.01); // a line without a length is not drawn
    for (const place of places) pen.lineTo(...place);
    pen.stroke();
  }

  #redraw() {
    this.canvas.getContext("2d").clearRect(0, 0, this.canvas.width, this.canvas.height);
    for (const stroke of this.strokes) this.#line(stroke, stroke.places);
  }

  #follow(event) {
    this.brush.hidden = event.pointerType === "touch";
    this.#show(this.#place(event));
  }

  /** The brush, where it is or would be. */
  #show(place = this.at) {
    if (!place) return;
    const scale = this.canvas.getBoundingClientRect().width / this.canvas.width;
    const { style } = this.brush;
    this.brush.hidden = false;
    style.width = style.height = `${2 * this.radius * scale}px`;
    style.left = `${place[0] * scale}px`;
    style.top = `${place[1] * scale}px`;
  }
}
