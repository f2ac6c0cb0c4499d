// The token of this tab: kept in its session storage, and asked for where the server does.

import { say } from "./words.js";

const KEY = "hidream-token";
const dialog = document.getElementById("token");
const input = dialog.querySelector("input");
const note = document.getElementById("token-note");
const forget = document.getElementById("forget");
let answer = null;

export const token = () => sessionStorage.getItem(KEY);

// Resolves when there is another token than one that was refused; all who wait share one question.
export async function askForToken(refused) {
  if (token() === refused) await (answer ??= ask(refused !== null).finally(() => { answer = null; }));
}

async function ask(wasRefused) {
  note.textContent = say(wasRefused ? "tokenRefused" : "tokenKept");
  input.ariaInvalid = wasRefused;
  input.value = "";
  dialog.showModal();
  await new Promise((closed) => dialog.addEventListener("close", closed, { once: true }));
  sessionStorage.setItem(KEY, input.value.trim());
  forget.hidden = false;
  // Chromium gives the focus back to a field without its caret.
  document.activeElement.blur();
  document.querySelector("[name=prompt]").focus();
}

dialog.addEventListener("cancel", (event) => event.preventDefault());
forget.hidden = !token();
forget.addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});
