// The strip: how the server is, now.

import { Problem, call } from "./api.js";
import { duration, say } from "./words.js";

const ASK_MS = 5000;
const state = document.getElementById("state");
const facts = document.getElementById("facts");
let info = null;
let stepDuration = null;

// Asks for the server's state as long as somebody looks, and hands it on; returns what asks at once.
export function watchServer(onInfo) {
  let timer;
  let isAsking = false;
  const ask = async () => {
    clearTimeout(timer);
    if (document.hidden || isAsking) return;
    isAsking = true;
    try {
      info = await call("GET", "v1/server");
      show(info.state.replace("SERVER_STATE_", ""));
      await onInfo(info);
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      show("reconnecting");
    } finally {
      isAsking = false;
      timer = setTimeout(ask, ASK_MS);
    }
  };
  document.addEventListener("visibilitychange", ask);
  show("connecting");
  ask();
  return ask;
}

export function noteStepTime(progress) {
  stepDuration = progress?.stepDuration ?? stepDuration;
  showFacts();
}

export function show(word) {
  const text = say(word === "FAILED" ? "outOfOrder" : word);
  if (state.textContent !== text) state.textContent = text;
  state.dataset.state = word;
  showFacts();
}

function showFacts() {
  if (!info) return;
  const { model, layout, devices = [], jobs = {}, numRankRestarts = 0 } = info;
  const names = [...new Set(devices.map((device) => device.name || device.deviceType))].join(", ");
  const shown = {
    model: model.name, ranks: devices.length ? `${devices.length} × ${names}` : 0, layout,
    stepTime: stepDuration ? duration(stepDuration) : "–", queue: jobs.queued ?? 0, running: jobs.running ?? 0,
    restarts: numRankRestarts,
  };
  facts.replaceChildren(...Object.entries(shown).map(([word, value]) => {
    const pair = document.createElement("div");
    pair.appendChild(document.createElement("dt")).textContent = say(word);
    pair.appendChild(document.createElement("dd")).textContent = value;
    return pair;
  }));
}
