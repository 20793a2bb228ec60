// What the page asks of the server: tightfit's own API, and a few answers made for the page alone.

import { bytes, peak, seconds } from "./dom.js";

const OURS = "v1/tightfit";
const PREVIEWS = { preview_every: 2 }; // steps: which decodes them, and how often, is in the plan

async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer: see whether tightfit serve still runs.");
  }
  const text = await answer.text();
  let body = null;
  try { body = JSON.parse(text); } catch { /* no JSON of ours */ }
  if (answer.ok) return body;
  const words = body?.error?.message ?? body?.detail;
  throw new Error(typeof words === "string" ? words : `The server answers ${answer.status} ${answer.statusText}.`);
}

const post = (path, body, signal) =>
  call(path, { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" }, signal });

/** A job as the page has it. */
function job(told) {
  const { summary } = told;
  return {
    id: told.id,
    state: told.state,
    isActive: told.state === "waiting" || told.state === "running",
    model: told.model,
    prompt: told.options.prompt ?? "",
    created: told.created,
    error: told.error,
    pictures: told.pictures,
    notices: told.notices,
    request: { ...told.options, ...(summary.request ?? {}) },
    plan: summary.plan?.join(", then ") ?? told.plan?.summary,
    seconds: summary.seconds,
    peakBytes: summary.peak_bytes,
    predictedBytes: summary.predicted_bytes,
  };
}

const KINDS = { checkpoint: "model", "diffusers folder": "model" };

function model(row) {
  const plan = row.plan;
  const main = plan?.placements.unet ?? Object.values(plan?.placements ?? {}).at(-1);
  const words = plan
    ? `fits: ${main.precision}, ${main.residency}, ${seconds(plan.predicted.seconds)}, ${bytes(peak(plan.predicted))}`
    : row.problem ?? "";
  const kind = KINDS[row.kind] ?? row.kind;
  return { name: row.name, kind, family: row.family, triggers: row.triggers ?? [], fits: Boolean(row.fits), words,
    state: row.fits ? "fits" : row.problem ?? "does not fit",
    broken: kind !== "model" && Boolean(row.problem) };
}

export const api = {
  controls: () => call("page/api/controls"),
  model: (name) => call(`page/api/model?name=${encodeURIComponent(name)}`),
  settings: (blob) => call("page/api/settings", { method: "POST", body: blob, headers: { "content-type": "application/octet-stream" } }),

  async info() {
    const info = await call(`${OURS}/info`);
    return { model: info.model, machine: `${info.machine.name} · ${bytes(info.budget_bytes)} to fit in` };
  },

  models: async () => (await call(`${OURS}/models`)).models.map(model),

  /** Each pass with its plans, the one that will be taken first. */
  async plan(asked, signal) {
    const answer = await post(`${OURS}/plan`, { ...asked, ...PREVIEWS }, signal);
    // A later pass without plans, or none at all, is refused whatever the first would take.
    if (!answer.passes.length || answer.passes.some((pass) => !pass.plans.length)) throw new Error(answer.error);
    const flat = (plan) => ({ ...plan, ...plan.predicted, ...plan.wishes });
    return answer.passes.map((pass) => ({ notes: pass.notes, plans: pass.plans.map(flat) }));
  },

  paint: async (asked) => job(await post(`${OURS}/jobs`, { ...asked, ...PREVIEWS })),
  jobs: async (limit, before = "") => (await call(`${OURS}/jobs?limit=${limit}&before=${before}`)).jobs.map(job),
  job: async (id) => job(await call(`${OURS}/jobs/${id}`)),
  cancel: (id) => call(`${OURS}/jobs/${id}`, { method: "DELETE" }),
  stop: (id) => call(`${OURS}/jobs/${id}/stop`, { method: "POST" }),

  /** Tell `news` of a job until it has ended, and `lost` where the connection is. Answers what ends that. */
  events(id, news, lost) {
    const source = new EventSource(`${OURS}/jobs/${id}/events?previews=true`);
    source.addEventListener("job", (event) => {
      const told = JSON.parse(event.data);
      const isEnd = !["waiting", "running"].includes(told.state);
      if (isEnd) source.close();
      news({ state: told.state, stage: told.stage, step: told.step, steps: told.steps, done: told.done, eta: told.eta_seconds,
        position: told.position, preview: told.preview, isEnd });
    });
    source.addEventListener("error", () => lost());
    return () => source.close();
  },
};
