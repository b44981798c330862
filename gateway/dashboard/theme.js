// Runs before anything is painted, so that a chosen theme does not flash in the other one. No module, for these wait.
(() => {
  try {
    const chosen = localStorage.getItem('ashlar.theme');
    if (chosen === 'light' || chosen === 'dark') document.documentElement.dataset.theme = chosen;
  } catch {
    // Without storage the system's theme holds.
  }
})();
