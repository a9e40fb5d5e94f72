// The settings that the user changed, which are the only ones that are sent.

const KEY = `litgpt:${location.pathname}:settings`;
const dialog = document.getElementById("settings");
const form = dialog.querySelector("form");
const fields = [...form.elements].filter((field) => field.name);

/** Show the server's defaults, and what the user changed earlier. */
export function initialize(defaults) {
  for (const field of fields) {
    if (field.name in defaults) field.placeholder = defaults[field.name] ?? "no limit";
  }
  let saved = {};
  try {
    saved = JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {} // not ours
  for (const field of fields) field.value = saved[field.name] ?? "";
}

export function open() {
  dialog.showModal();
}

/** The system prompt, and the fields of a request. */
export function read() {
  const fields_of_request = {};
  for (const { name, type, value, valueAsNumber, validity } of fields) {
    if (value === "" || name === "system" || !validity.valid) continue;
    fields_of_request[name] = type === "number" ? valueAsNumber : value.split("\n").filter(Boolean);
  }
  return { system: form.elements.system.value.trim(), fields: fields_of_request };
}

function save() {
  const changed = fields.filter(({ value, validity }) => value !== "" && validity.valid);
  try {
    localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(changed.map(({ name, value }) => [name, value]))));
  } catch {} // they hold until the page is closed
}

export function reset() {
  for (const field of fields) field.value = "";
  save();
}

form.addEventListener("input", save);
form.addEventListener("submit", (event) => {
  event.preventDefault(); // reached only if all fields are valid
  dialog.close();
});
