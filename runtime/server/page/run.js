// The job that is watched: its preview, progress and end.

import { api } from "./api.js";
import { $, seconds } from "./dom.js";

const MINE = "tightfit.mine", MOST = 100;

export class Run {
  /** `ended` is called with the id of a job that has, and its state. */
  constructor(ended) {
    this.ended = ended;
    this.id = null;
    this.mine = JSON.parse(sessionStorage.getItem(MINE) ?? "[]");
    $("cancel").addEventListener("click", () => this.cancel());
    $("stop").addEventListener("click", () => this.stop());
  }

  /** A job that this page has asked for: it alone is ended from here, also after a reload. */
  own(id) {
    this.mine = [...this.mine, id].slice(-MOST);
    sessionStorage.setItem(MINE, JSON.stringify(this.mine));
    this.#offer();
  }

  #offer() { $("cancel").hidden = $("stop").hidden = !this.mine.includes(this.id); }

  /** Follow a job to its end, whoever asked for it. */
  watch(id) {
    if (this.id === id) return;
    this.leave();
    this.id = id;
    this.#offer();
    $("running").hidden = false;
    $("progress").removeAttribute("value");
    $("status").textContent = "Waiting …";
    this.close = api.events(id, (news) => this.#tell(id, news), () => this.#lost(id));
  }

  leave() {
    this.close?.();
    this.id = this.close = null;
    $("running").hidden = true;
    document.title = "tightfit";
    $("frame").classList.remove("partial");
  }

  async cancel() {
    if (!this.mine.includes(this.id)) return;
    $("status").textContent = "Cancelling after this step …";
    await api.cancel(this.id).catch((error) => this.say(error.message));
  }

  async stop() {
    if (!this.mine.includes(this.id)) return;
    $("status").textContent = "Stopping after this step …";
    await api.stop(this.id).catch((error) => this.say(error.message));
  }

  say(words) { $("said").textContent = words; }

  #tell(id, news) {
    if (this.id !== id) return;
    if (news.preview) {
      $("shown").src = news.preview;
      $("shown").alt = "Preview of what is being painted";
      $("shown").hidden = false;
      $("nothing").hidden = true;
      $("caption").hidden = true;
      $("frame").classList.add("partial");
    }
    if (news.steps) {
      $("progress").value = news.done;
      document.title = `${Math.round(100 * news.done)} % · tightfit`;
      const left = (news.eta ?? 0) < 0.1 ? "" : `, ${seconds(news.eta)} left`;
      $("status").textContent = `${news.stage}: step ${news.step} of ${news.steps}${left}`;
    } else if (news.position) {
      $("status").textContent = `Waiting: ${news.position} before it`;
    } else if (news.state === "running") {
      $("status").textContent = "Preparing …";
    }
    if (news.isEnd) {
      this.leave();
      this.ended(id, news);
    }
  }

  /** The connection is gone: the browser tries again by itself; an end that was missed is asked for. */
  async #lost(id) {
    if (this.id !== id) return;
    const job = await api.job(id).catch(() => null);
    if (job && !job.isActive && this.id === id) {
      this.leave();
      this.ended(id, job);
    }
  }
}
