// One job in the gallery: how far it is, its images, and what can be done with it.

import { forgetImage, imageAddress } from "./api.js";
import { duration, moment, say, translate } from "./words.js";

const template = document.getElementById("card");
const ENDINGS = ["SUCCEEDED", "FAILED", "CANCELLED"];
const sight = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) target.dispatchEvent(new Event("seen"));
}, { rootMargin: "50%" });

export class Card {
  // `actions` are functions of a card, by the word of their button; `tell` speaks to who cannot see.
  constructor(job, { actions, open, tell }) {
    Object.assign(this, { job, open, tell, interruption: "" });
    this.element = template.content.firstElementChild.cloneNode(true);
    this.element.dataset.created = Date.parse(job.createTime);
    translate(this.element);
    this.part = (selector) => this.element.querySelector(selector);
    this.button = (word) => this.part(`[data-word=${word}]`);
    for (const [word, act] of Object.entries(actions)) {
      this.button(word).addEventListener("click", () => act(this));
    }
    this.part(".prompt").textContent = this.part(".prompt").title = this.part("progress").ariaLabel = job.spec.prompt;
    this.show();
  }

  get state() { return this.job.state.replace("JOB_STATE_", ""); }
  get hasEnded() { return ENDINGS.includes(this.state); }
  get images() { return this.job.images ?? []; }

  update(job) {
    const before = this.state;
    // Answers overtake each other: an end stays, and so does the newer step.
    if (this.hasEnded && !ENDINGS.some((ending) => job.state.endsWith(ending))) return;
    const progress = (job.progress?.step ?? 0) < (this.job.progress?.step ?? 0) ? this.job.progress : job.progress;
    this.job = { ...job, progress };
    this.show();
    if (this.state !== before) this.tell(`${say(this.state)}: ${job.spec.prompt}`);
  }

  // Takes an event of the job's stream; true after the last.
  take({ queued, started, progress, preview, restarted, succeeded, failed, cancelled }) {
    const become = (state, others) => this.update({ ...this.job, state: `JOB_STATE_${state}`, ...others });
    if (queued) become("QUEUED", queued);
    if (started) become("RUNNING", { spec: started.spec });
    if (restarted) {
      this.interruption = say("restarted", { step: restarted.resumedFromStep ?? 0 });
      this.job.progress = undefined;
      this.show();
    }
    if (progress) {
      this.interruption = "";
      become("RUNNING", { progress });
    }
    if (preview) this.sharpen(preview);
    if (succeeded) this.update(succeeded.job);
    if (failed) become("FAILED", { error: failed.status });
    if (cancelled) become("CANCELLED");
    return Boolean(succeeded || failed || cancelled);
  }

  sharpen({ mimeType, data }) {
    const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
    const image = this.part(".preview") ?? Object.assign(new Image(), { className: "preview" });
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(new Blob([bytes], { type: mimeType }));
    image.alt = say("previewAlt", this.job.spec);
    if (!this.hasEnded) this.part(".images").replaceChildren(image);
  }

  show() {
    const { spec, progress, createTime, timings } = this.job;
    this.element.dataset.state = this.state;
    this.part(".status").textContent = this.statusText();
    this.part(".facts").textContent = [
      `${say("seed")} ${spec.seed ?? 0}`, `${spec.width} × ${spec.height}`, say("stepsTaken", { steps: spec.numInferenceSteps }),
      ...(this.state === "SUCCEEDED" ? [duration(timings.total)] : []), moment(createTime),
    ].join(" · ");
    const bar = this.part("progress");
    bar.hidden = this.state !== "RUNNING";
    bar.max = progress?.totalSteps ?? 1;
    bar.value = progress?.step ?? 0;
    this.button("cancel").hidden = this.hasEnded;
    this.button("remove").hidden = !this.hasEnded;
    this.button("download").hidden = this.state !== "SUCCEEDED";
    if (this.state === "SUCCEEDED" && !this.part(".images button")) this.fill();
  }

  statusText() {
    const { progress, queuePosition, estimatedWait, error } = this.job;
    const about = (word, time) => (time ? ` · ${say(word, { time: duration(time) })}` : "");
    if (this.state === "QUEUED" && queuePosition) return say("place", { queuePosition }) + about("starts", estimatedWait);
    if (this.state === "FAILED") return `${say("FAILED")}: ${error?.message ?? ""}`;
    if (this.state !== "RUNNING") return say(this.state);
    if (this.interruption) return this.interruption;
    if (!progress?.step) return say("encoding");
    return progress.step === progress.totalSteps ? say("decoding") : say("step", progress) + about("left", progress.estimatedRemaining);
  }

  fill() {
    URL.revokeObjectURL(this.part(".preview")?.src);
    this.part(".images").dataset.many = this.images.length > 1;
    this.part(".images").replaceChildren(...this.images.map((image) => {
      const button = Object.assign(document.createElement("button"), { type: "button" });
      const alt = say("imageAlt", { number: (image.index ?? 0) + 1, prompt: this.job.spec.prompt });
      const element = button.appendChild(Object.assign(new Image(), { alt }));
      button.addEventListener("click", () => this.open(this.job, image));
      const load = async () => { element.src = await imageAddress(this.job, image); };
      button.addEventListener("seen", () => element.naturalWidth || load());
      return button;
    }));
    this.look();
  }

  // Loads the images in sight, also those that could not be loaded before.
  look() {
    for (const button of this.element.querySelectorAll(".images button")) {
      sight.unobserve(button);
      sight.observe(button);
    }
  }

  forget() {
    for (const image of this.images) forgetImage(this.job, image);
    this.element.remove();
  }
}
