// What was painted before, what waits, and the picture that is looked at.

import { api } from "./api.js";
import { $, bytes, el, icon, seconds } from "./dom.js";

const PAGE = 24; // jobs that are asked for at once

export class Gallery {
  /** `look` is called with a job and the number of one of its pictures. */
  constructor(look) {
    this.look = look;
    this.jobs = new Map();
    $("older").addEventListener("click", () => this.#more());
  }

  /** The newest jobs; answers them. */
  async refresh() {
    const jobs = await api.jobs(PAGE);
    const known = [...this.jobs.values()];
    const fresh = new Set(jobs.map((job) => job.id));
    const last = jobs.at(-1)?.created ?? 0;
    const older = known.filter((job) => !fresh.has(job.id) && job.created < last);
    this.jobs = new Map([...jobs, ...older].map((job) => [job.id, job]));
    if (!older.length) $("older").hidden = jobs.length < PAGE;
    this.#show();
    return jobs;
  }

  async #more() {
    const last = [...this.jobs.keys()].at(-1);
    const jobs = await api.jobs(PAGE, last);
    for (const job of jobs) this.jobs.set(job.id, job);
    $("older").hidden = jobs.length < PAGE;
    this.#show();
  }

  #show() {
    const items = [...this.jobs.values()].flatMap((job) => {
      if (job.isActive) return [this.#waiting(job)];
      if (job.pictures.length) return job.pictures.map((address, number) => this.#picture(job, address, number));
      return job.state === "failed" ? [this.#failed(job)] : [];
    });
    const focused = document.activeElement?.dataset?.key;
    $("gallery").replaceChildren(...items);
    if (focused) $("gallery").querySelector(`[data-key="${focused}"]`)?.focus();
    $("gallery-title").hidden = items.length === 0;
  }

  #picture(job, address, number) {
    const words = job.prompt || "no prompt";
    return el("li", {}, el("button", { type: "button", class: "picture", title: words, "data-key": `${job.id}-${number}`, onclick: () => this.look(job, number) },
      el("img", { src: address, alt: words, loading: "lazy" })));
  }

  #waiting(job) {
    return el("li", { class: "waits" }, el("div", {}, icon("wait"), el("span", {}, job.state), el("span", { class: "quiet" }, job.prompt)),
      el("button", { type: "button", class: "plain", "data-key": job.id, "aria-label": `Cancel ${job.prompt}`, onclick: () => api.cancel(job.id).then(() => this.refresh()) }, "Cancel"));
  }

  #failed(job) {
    return el("li", { class: "failed", title: job.error }, icon("cross"), el("span", {}, job.error));
  }
}

/** Seed, size, plan and what was measured, in one line. */
export function facts(job, number) {
  const { request, plan } = job;
  const words = [job.model];
  if (request.seed !== undefined) words.push(`seed ${request.seed + number}`);
  if (request.width) words.push(`${request.width}×${request.height}`);
  if (request.num_inference_steps) words.push(`${request.num_inference_steps} steps`);
  if (request.scheduler) words.push(request.scheduler);
  if (plan) words.push(plan);
  if (job.seconds) words.push(seconds(job.seconds));
  if (job.peakBytes) words.push(`peak ${bytes(job.peakBytes)} of ${bytes(job.predictedBytes)} predicted`);
  return words.join(" · ");
}
