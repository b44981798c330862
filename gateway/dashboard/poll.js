// Asking the gateway again and again: while the page is visible, ever more seldom while nobody answers, and never twice at once.

const EVERY_MS = 500;
const AWAY_MS_MAX = 5000;
const TIMEOUT_MS = 4000;

/**
 * Runs `ask(signal)` every `every` milliseconds while the page is visible and it is not stopped. Where it throws, `onError` is told
 * and the pause doubles up to five seconds.
 */
export function poll(ask, {every = EVERY_MS, onError} = {}) {
  let timer = null;
  let stop = new AbortController();
  let running = false;
  let failures = 0;
  let busy = false;

  async function turn() {
    timer = null;
    if (!running || busy || document.hidden) return;
    busy = true;
    const started = performance.now();
    try {
      await ask(AbortSignal.any([stop.signal, AbortSignal.timeout(TIMEOUT_MS)]));
      failures = 0;
    } catch (error) {
      if (!stop.signal.aborted) {
        failures += 1;
        onError?.(error);
      }
    }
    busy = false;
    const pause = failures ? Math.min(AWAY_MS_MAX, every * 2 ** (failures - 1)) : every;
    if (running && timer === null) timer = setTimeout(turn, Math.max(0, pause - (performance.now() - started)));
  }

  function now() {
    if (timer !== null) clearTimeout(timer);
    timer = null;
    turn();
  }

  const onVisible = () => { if (!document.hidden) now(); };

  return {
    start() {
      if (running) return;
      running = true;
      stop = new AbortController();
      document.addEventListener('visibilitychange', onVisible);
      now();
    },
    stop() {
      running = false;
      stop.abort();
      if (timer !== null) clearTimeout(timer);
      timer = null;
      document.removeEventListener('visibilitychange', onVisible);
    },
    /** Asks at once, for example after something was changed. */
    now() {
      if (running) now();
    },
  };
}
