// The page: puts the form, the gallery and the strip together.

import { call, imageAddress } from "./api.js";
import { allow, explain, onDraw, submit, use } from "./form.js";
import { Gallery, jobPath } from "./gallery.js";
import { watchServer } from "./strip.js";
import { say, translate } from "./words.js";

const news = document.getElementById("news");
const viewer = document.getElementById("viewer");
const tell = (text) => { news.textContent = text; };

const actions = {
  again: ({ job }) => use(job.spec),
  vary: ({ job: { spec: { seed, ...others } } }) => submit(others).then((job) => gallery.put(job)),
  download: async ({ job, images }) => { for (const image of images) await save(job, image); },
  cancel: ({ job }) => call("POST", `${jobPath(job.jobId)}:cancel`, {}).then((now) => gallery.put(now)),
  remove: (card) => {
    if (!confirm(say("reallyRemove"))) return undefined;
    const neighbour = card.element.nextElementSibling ?? card.element.previousElementSibling;
    return call("DELETE", jobPath(card.job.jobId)).then(() => {
      gallery.drop(card.job.jobId);
      (neighbour?.querySelector("button") ?? document.querySelector("textarea")).focus();
      tell(say("removed"));
    });
  },
};

translate(document);
document.getElementById("settings").open = matchMedia("(min-width: 60rem)").matches;
viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
// Whatever was asked for, and failed, is said in one place.
addEventListener("unhandledrejection", (event) => {
  event.preventDefault();
  explain(event.reason);
});
const gallery = new Gallery({ actions, open, tell }, () => askServer());
const askServer = watchServer((info) => {
  allow(info);
  return gallery.refreshOthers();
});
onDraw((job) => gallery.put(job));

// Makes a link one that saves an image.
async function aim(link, job, image) {
  link.href = await imageAddress(job, image);
  link.download = `hidream-${image.seed ?? 0}.${image.mimeType.split("/")[1]}`;
}

async function save(job, image) {
  const link = document.createElement("a");
  await aim(link, job, image);
  link.click();
}

async function open(job, image) {
  const element = viewer.querySelector("img");
  const link = viewer.querySelector("a");
  await aim(link, job, image);
  element.src = link.href;
  element.alt = viewer.querySelector("#viewer-prompt").textContent = job.spec.prompt;
  viewer.querySelector(".facts").textContent = `${say("seed")} ${image.seed ?? 0} · ${image.width} × ${image.height}`;
  viewer.showModal();
}
