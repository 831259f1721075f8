// What the page keeps: settings on this machine, the key and the conversation only until the tab closes.
// A browser may refuse to store anything; then it lasts as long as the page.

const fallback = new Map();

function area(kind) {
  try {
    return kind === "tab" ? window.sessionStorage : window.localStorage;
  } catch {
    return null;
  }
}

/** The value stored under a name, or null. `kind`: "tab" or "machine". */
export function load(kind, name) {
  let text = fallback.get(name) ?? null;
  try {
    text = area(kind)?.getItem(`spq.${name}`) ?? text;
    return text === null ? null : JSON.parse(text);
  } catch {
    return null;
  }
}

/** Store a value; null forgets it. */
export function save(kind, name, value) {
  const text = JSON.stringify(value);
  if (value === null) fallback.delete(name);
  else fallback.set(name, text);
  try {
    if (value === null) area(kind)?.removeItem(`spq.${name}`);
    else area(kind)?.setItem(`spq.${name}`, text);
  } catch {
    console.info(`the browser does not store ${name}; it lasts until the page closes`);
  }
}
