// The one stream of news that all pages share: the cluster and this gateway's live figures, asked for twice a second, or as often as
// `ashlar.every_ms` in this browser's storage says, up to ten times.

import {ApiError, get} from './api.js';
import {poll} from './poll.js';
import {recall} from './settings.js';
import {ClusterView} from './view.js';

const LATENCIES_MAX = 120;
/** A gateway that has no such endpoint is asked again after so long: it may have been replaced by a newer one. */
const MISSING_MS = 60_000;

/** Polls and tells its listeners after each answer, and after each failure. */
export function feed() {
  const view = new ClusterView();
  const listeners = new Set();
  const state = {view, live: null, latencies: [], error: null};
  let liveMissingUntil = 0;

  async function live(signal) {
    if (performance.now() < liveMissingUntil) return null;
    try {
      return await get('/admin/live', {signal});
    } catch (error) {
      if (!(error instanceof ApiError) || error.status === 0) throw error;
      if (error.status === 404 || error.status === 405) liveMissingUntil = performance.now() + MISSING_MS;
      return null;
    }
  }

  const poller = poll(async (signal) => {
    const [cluster, figures] = await Promise.all([get('/admin/cluster', {signal}), live(signal)]);
    view.take(cluster, performance.now());
    state.live = figures;
    state.error = null;
    if (figures) keepLatencies(figures);
    tell();
  }, {every: Math.max(100, Number(recall('every_ms', 500)) || 500), onError(error) {
    const reason = error instanceof ApiError ? error : new ApiError(0, null);
    view.lose(reason);
    state.error = reason;
    tell();
  }});

  function keepLatencies(figures) {
    const last = state.latencies[state.latencies.length - 1];
    if (last && figures.now - last.now < 0.95) return;
    state.latencies.push({now: figures.now, ttft: figures.ttft_ms, itl: figures.itl_ms});
    if (state.latencies.length > LATENCIES_MAX) state.latencies.shift();
  }

  function tell() {
    for (const listener of listeners) listener(state);
  }

  return {
    state,
    start: () => poller.start(),
    now: () => poller.now(),
    listen(listener) { listeners.add(listener); },
  };
}
