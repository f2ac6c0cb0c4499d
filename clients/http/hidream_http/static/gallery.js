// The gallery: the caller's jobs, newest first, live.

import { call, follow } from "./api.js";
import { Card } from "./card.js";
import { explain } from "./form.js";
import { noteStepTime, show } from "./strip.js";

const PAGE_SIZE = 12;
// A browser opens six connections to a host, for all of its windows: two with one job each leave two for the rest.
const MAX_FOLLOWED = 1;
const UNFINISHED = "states=JOB_STATE_QUEUED&states=JOB_STATE_RUNNING";
const list = document.getElementById("gallery");
const end = document.getElementById("more");

export const jobPath = (jobId) => `v1/jobs/${encodeURIComponent(jobId)}`;

export class Gallery {
  // `reactions` are those of every card; `onChange` is called when the work of the server has changed.
  constructor(reactions, onChange) {
    Object.assign(this, { reactions, onChange, cards: new Map(), followed: new Map(), nextPage: null });
    this.atEnd = new IntersectionObserver(([entry]) => entry.isIntersecting && this.loadMore(), { rootMargin: "50%" });
    document.addEventListener("visibilitychange", () => this.watch());
    this.watch();
    this.refresh().catch(() => show("reconnecting"));
  }

  // Reads no stream while nobody looks.
  watch() {
    if (document.hidden) this.stop = this.stop?.();
    else {
      this.stop ??= follow(`v1/jobs:watch?${UNFINISHED}`, {
        onOpen: () => this.refresh(),
        onLost: () => show("reconnecting"),
        onRefused: explain,
        onEvent: ({ job }) => this.put(job),
      });
    }
    this.followSome();
  }

  // Shows a job as it is now.
  put(job) {
    const known = this.cards.get(job.jobId);
    const before = known?.state;
    if (known) known.update(job);
    else this.insert(new Card(job, this.reactions));
    noteStepTime(job.progress);
    this.followSome();
    if (this.cards.get(job.jobId).state !== before) this.onChange();
  }

  insert(card) {
    this.cards.set(card.job.jobId, card);
    const older = [...list.children].find((element) => element.dataset.created < card.element.dataset.created);
    list.insertBefore(card.element, older ?? null);
    this.showEmptiness();
  }

  // Reads the events of the jobs that will end first.
  followSome() {
    const unfinished = [...this.cards.values()].filter((card) => this.stop && !card.hasEnded);
    unfinished.sort((one, other) => (other.state === "RUNNING") - (one.state === "RUNNING")
      || one.element.dataset.created - other.element.dataset.created);
    const wanted = unfinished.slice(0, MAX_FOLLOWED).map((card) => card.job.jobId);
    for (const jobId of this.followed.keys()) if (!wanted.includes(jobId)) this.leave(jobId);
    for (const jobId of wanted) if (!this.followed.has(jobId)) this.followed.set(jobId, this.followJob(jobId));
  }

  followJob(jobId) {
    return follow(`${jobPath(jobId)}/events?withoutImages=true`, {
      onEvent: ({ event }) => {
        noteStepTime(event.progress);
        const isLast = this.cards.get(jobId).take(event);
        if (isLast || event.started) this.followSome();
        return isLast;
      },
      onRefused: (problem) => (problem.status === 404 ? this.drop(jobId) : explain(problem)),
    });
  }

  leave(jobId) {
    this.followed.get(jobId)?.();
    this.followed.delete(jobId);
  }

  // At the start, and after a loss: what came, ended or went while nothing was heard.
  async refresh() {
    const known = new Set(this.cards.keys());
    const unfinished = [...this.cards.values()].filter((card) => !card.hasEnded);
    const { jobs, next } = await this.loadPage("");
    // Where none of them was known, there are more that are not between them and the older ones.
    if (this.nextPage === null || !jobs.some((job) => known.has(job.jobId))) this.nextPage = next;
    this.atEnd.observe(end);
    await Promise.all(unfinished.map(({ job: { jobId } }) => call("GET", jobPath(jobId)).then(
      (job) => this.put(job),
      (problem) => problem.status === 404 && this.drop(jobId),
    )));
    for (const card of this.cards.values()) card.look();
    this.onChange();
  }

  async loadPage(token) {
    const page = await call("GET", `v1/jobs?pageSize=${PAGE_SIZE}&pageToken=${encodeURIComponent(token)}`);
    const { jobs = [], nextPageToken: next = "" } = page;
    for (const job of jobs) this.put(job);
    this.showEmptiness();
    return { jobs, next };
  }

  async loadMore() {
    if (!this.nextPage || this.isLoading) return;
    this.isLoading = true;
    try {
      this.nextPage = (await this.loadPage(this.nextPage)).next;
    } finally {
      this.isLoading = false;
      // Observed anew, it tells again when the end is still in sight.
      this.atEnd.unobserve(end);
      this.atEnd.observe(end);
    }
  }

  // How far those jobs are whose events are not read.
  async refreshOthers() {
    const isUnread = (card) => !card.hasEnded && !this.followed.has(card.job.jobId);
    if (![...this.cards.values()].some(isUnread)) return;
    const { jobs = [] } = await call("GET", `v1/jobs?${UNFINISHED}`);
    for (const job of jobs) this.put(job);
  }

  drop(jobId) {
    this.leave(jobId);
    this.cards.get(jobId)?.forget();
    this.cards.delete(jobId);
    this.showEmptiness();
  }

  showEmptiness() {
    document.getElementById("empty").hidden = this.cards.size > 0;
  }
}
