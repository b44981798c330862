// What this browser remembers of its operator: the theme, and what forms were last set to. Nothing leaves the browser.

const PREFIX = 'ashlar.';

/** A remembered value, or `otherwise`. */
export function recall(name, otherwise) {
  try {
    const text = localStorage.getItem(PREFIX + name);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

/** Remembers a value; where there is no storage, until the page is closed it is simply not remembered. */
export function remember(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // Private windows refuse storage.
  }
}

/** `light`, `dark`, or `auto` for what the system says. */
export function theme() {
  return document.documentElement.dataset.theme ?? 'auto';
}

/** Takes the next of auto, light, dark, and returns it. */
export function nextTheme() {
  const order = ['auto', 'light', 'dark'];
  const next = order[(order.indexOf(theme()) + 1) % order.length];
  try {
    if (next === 'auto') {
      delete document.documentElement.dataset.theme;
      localStorage.removeItem(`${PREFIX}theme`);
    } else {
      document.documentElement.dataset.theme = next;
      localStorage.setItem(`${PREFIX}theme`, next);
    }
  } catch {
    // As above.
  }
  return next;
}
