// The form: what to generate, within what the server allows.

import { Problem, call } from "./api.js";
import { say } from "./words.js";

const INTEGERS = ["numInferenceSteps", "numImages", "quality"];
const form = document.getElementById("form");
const { prompt, size, guidanceScale, seed, outputFormat, quality, negativePrompt } = form.elements;
const draw = document.getElementById("draw");
const note = document.getElementById("note");
const problemLine = document.getElementById("problem");
let poorGuidance;
let known;

// Takes the limits and defaults of the server when they change; what the person has set stays.
export function allow({ model, limits, defaults, recommendedSizes = [], supportedSizes = [] }) {
  const said = JSON.stringify([model, limits, defaults, recommendedSizes, supportedSizes]);
  if (said === known) return;
  known = said;
  bound("numInferenceSteps", 1, limits.maxNumInferenceSteps, defaults.numInferenceSteps);
  bound("guidanceScale", 0, limits.maxGuidanceScale, defaults.guidanceScale);
  bound("numImages", 1, limits.maxNumImages, defaults.numImages);
  bound("quality", limits.minQuality, limits.maxQuality, defaults.quality);
  seed.title = `0 – ${limits.maxSeed}`;
  const others = Object.assign(document.createElement("optgroup"), { label: say("otherSizes") });
  others.append(...supportedSizes.map(sizeOption));
  const chosen = size.value || sizeOption(defaults).value;
  size.replaceChildren(...recommendedSizes.map(sizeOption), ...(supportedSizes.length ? [others] : []));
  choose(chosen);
  poorGuidance = model.maxPoorGuidanceScale;
  react();
  draw.disabled = false;
}

function bound(name, min, max, value) {
  const input = form.elements[name];
  Object.assign(input, { min, max, title: `${min} – ${max}` });
  // This changes the value too, as long as the person has not.
  input.defaultValue = value;
}

function sizeOption({ width, height }) {
  return new Option(`${width} × ${height}`, `${width}x${height}`);
}

// The default, and what an earlier job had, may be another size than those that are offered.
function choose(value) {
  const [width, height] = value.split("x");
  if (![...size.options].some((option) => option.value === value)) size.prepend(sizeOption({ width, height }));
  size.value = value;
}

// What one field means for others.
function react() {
  quality.closest("label").hidden = outputFormat.value === "OUTPUT_FORMAT_PNG";
  negativePrompt.disabled = Number(guidanceScale.value) <= 1;
  note.hidden = !(Number(guidanceScale.value) <= poorGuidance);
  note.textContent = note.hidden ? "" : say("poorGuidance", { guidance: poorGuidance });
}

function readSpec() {
  const [width, height] = size.value.split("x").map(Number);
  const spec = { prompt: prompt.value.trim(), width, height, outputFormat: outputFormat.value };
  for (const name of [...INTEGERS, "guidanceScale"]) {
    const input = form.elements[name];
    if (input.value && !input.closest("label").hidden) spec[name] = Number(input.value);
  }
  if (seed.value.trim()) spec.seed = seed.value.trim();
  if (!negativePrompt.disabled && negativePrompt.value.trim()) spec.negativePrompt = negativePrompt.value.trim();
  return spec;
}

// Puts the settings of a job into the form.
export function use(spec) {
  clear();
  choose(sizeOption(spec).value);
  for (const name of [...INTEGERS, "prompt", "negativePrompt", "guidanceScale", "seed", "outputFormat"]) {
    form.elements[name].value = spec[name] ?? form.elements[name].defaultValue;
  }
  react();
  prompt.focus();
}

// Queues a request. Its id lets it be sent until there is an answer, without being generated twice.
export async function submit(spec) {
  clear();
  const requestId = Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(36)).join("-");
  const wait = () => complain(say("waiting"));
  return call("POST", "v1/jobs", { spec, requestId, preview: true }, wait).finally(clear);
}

// Says what went wrong, and with which field.
export function explain(problem) {
  if (!(problem instanceof Problem)) throw problem;
  complain(problem.status ? problem.message : say("reconnecting"));
  const camelCase = (field) => field.replace(/^.*\./, "").replace(/_(\w)/g, (_, letter) => letter.toUpperCase());
  const names = problem.violations.map(({ field }) => camelCase(field).replace(/^(width|height)$/, "size"));
  const wrong = names.map((name) => form.elements[name]).filter(Boolean);
  for (const input of wrong) input.ariaInvalid = "true";
  if (wrong[0]?.closest("details")) wrong[0].closest("details").open = true;
  wrong[0]?.focus();
}

function complain(text) {
  problemLine.textContent = text;
  problemLine.hidden = false;
}

function clear() {
  problemLine.hidden = true;
  for (const input of form.elements) input.ariaInvalid = null;
}

export function onDraw(show) {
  form.addEventListener("input", react);
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (draw.disabled || draw.ariaBusy === "true") return;
    draw.ariaBusy = "true";
    await submit(readSpec()).then(show).finally(() => { draw.ariaBusy = "false"; });
  });
}
