// What the dashboard knows of the cluster: answers of `/admin/cluster`, one after the other, made into nodes with rates and a
// health, links, and a log of what has changed. No element and no request: plain values in, plain values out.

/** Rates are taken over this long, in milliseconds. */
const WINDOW_MS = 3000;
/** A node that is gone stays in the picture for so long. */
const LOST_MS = 120_000;
/** A node that fell out of its place, or began anew, is marked in the picture for so long. */
const MARKED_MS = 20_000;
const LOG_MAX = 60;
/** One sample per second is kept for five minutes. */
const SAMPLES_MAX = 300;

/** Words for each health; the picture has a shape for each, too. */
export const HEALTH = {
  ready: 'ready', loading: 'loading', standby: 'standby', draining: 'draining', drained: 'drained',
  quarantined: 'quarantined', waiting: 'waiting', lost: 'lost',
};

/** The difference of two cumulated timings as shares of the time between them. */
function shares(from, to) {
  const us = (to.at - from.at) * 1000;
  const share = (name) => Math.max(0, (to.busy[name] ?? 0) - (from.busy[name] ?? 0)) / us;
  return {compute: share('compute_us'), exchange: share('collective_us'), send: share('send_us'), wait: share('wait_us')};
}

/** Values over time, of which the last [`WINDOW_MS`] are kept. */
class Window {
  constructor() {
    this.entries = [];
  }

  add(entry) {
    this.entries.push(entry);
    while (this.entries.length > 2 && this.entries[1].at <= entry.at - WINDOW_MS) this.entries.shift();
  }

  clear() {
    this.entries.length = 0;
  }

  get first() {
    return this.entries[0];
  }

  get last() {
    return this.entries[this.entries.length - 1];
  }

  /** Whether it says something of a rate. */
  get spans() {
    return this.entries.length > 1 && this.last.at - this.first.at > 200;
  }

  /** The rise of a number per second. */
  rate(of) {
    if (!this.spans) return null;
    const rise = of(this.last) - of(this.first);
    return Number.isFinite(rise) ? Math.max(0, rise) / ((this.last.at - this.first.at) / 1000) : null;
  }
}

function hostOf(address) {
  if (!address) return '';
  const end = address.lastIndexOf(':');
  return end > 0 ? address.slice(0, end).replace(/^\[|\]$/g, '') : address;
}

function health(node, replica) {
  if (node.quarantined) return {kind: 'quarantined', detail: node.quarantined};
  if (node.leaving) return {kind: node.place ? 'draining' : 'drained', detail: null};
  if (!node.place) return {kind: 'standby', detail: null};
  if (node.loaded < 1) return {kind: 'loading', detail: `${Math.floor(node.loaded * 100)} %`, share: node.loaded};
  if (replica && !replica.ready) return {kind: 'waiting', detail: 'for the rest of its replica'};
  return {kind: 'ready', detail: null};
}

/** The cluster as it was seen so far. */
export class ClusterView {
  constructor() {
    this.connected = null;
    this.ready = false;
    this.problem = null;
    this.cluster = null;
    this.models = [];
    /** By name, those that are lost included. */
    this.nodes = new Map();
    this.replicas = [];
    this.log = [];
    this.samples = [];
    this.counters = new Window();
    this.windows = new Map();
    this.entries = 0;
    /** Whether any node was ever without a place: then the picture keeps room for it. */
    this.standbys = false;
  }

  /** Takes an answer that came at `at` (milliseconds of a steady clock). */
  take(answer, at) {
    const first = this.cluster === null;
    if (this.connected === false) this.note('good', 'news of the cluster again');
    this.connected = true;
    const before = {problem: this.problem, ready: this.ready, cluster: this.cluster, replicas: this.replicas};
    this.ready = answer.ready === true;
    this.problem = answer.problem ?? answer.cluster?.problem ?? null;
    this.models = answer.models ?? [];
    // A gateway without a scheduler tells nothing of the cluster; what was last seen stays on the screen.
    if (answer.cluster) {
      this.cluster = answer.cluster;
      this.takeParts(at, first);
      this.sample(at);
    }
    this.tellChanges(before, first);
    return this;
  }

  /** The gateway did not answer. */
  lose(error) {
    if (this.connected !== false) this.note('bad', `no news of the cluster: ${error.message}`);
    this.connected = false;
  }

  takeParts(at, first) {
    const parts = [{model: null, cluster: this.cluster}]
      .concat(this.models.map((model) => ({model: model.request.name, cluster: model.cluster})));
    this.replicas = parts.flatMap(({model, cluster}) => (cluster.replicas ?? []).map((replica) => this.takeReplica(replica, model, at)));
    const present = new Set();
    for (const {model, cluster} of parts) {
      for (const node of cluster.nodes ?? []) {
        // A standby may be told of by every model; who has given it a place knows more.
        if (present.has(node.node) && !node.place) continue;
        present.add(node.node);
        this.takeNode(node, model, at, first);
      }
    }
    for (const [name, node] of this.nodes) {
      if (present.has(name)) continue;
      if (node.lostAt === null) {
        node.lostAt = at;
        const meant = node.health.kind === 'drained' || node.health.kind === 'draining';
        this.note(meant ? 'info' : 'bad', `${name} ${meant ? 'has left' : 'is lost'}${node.place ? ` (${placeText(node)})` : ''}`);
        node.health = {kind: 'lost', detail: null};
        node.shares = null;
        node.sentRate = null;
        this.windows.get(name)?.clear();
      } else if (at - node.lostAt > LOST_MS) {
        this.nodes.delete(name);
        this.windows.delete(name);
      }
    }
    const seen = new Set(this.replicas.map((replica) => replica.key));
    for (const key of this.windows.keys()) if (key.startsWith('replica ') && !seen.has(key)) this.windows.delete(key);
  }

  takeReplica(replica, model, at) {
    const key = `replica ${model ?? ''}/${replica.replica}`;
    const window = this.window(key);
    if (window.last && (window.last.steps > replica.steps || window.last.revision !== replica.revision)) window.clear();
    window.add({at, steps: replica.steps, revision: replica.revision});
    return {...replica, key, model, stepsRate: window.rate((entry) => entry.steps)};
  }

  takeNode(raw, model, at, first) {
    const place = raw.place ? {replica: raw.place[0], stage: raw.place[1], rank: raw.place[2]} : null;
    const replica = place && this.replicas.find((one) => one.model === model && one.replica === place.replica);
    const before = this.nodes.get(raw.node);
    const node = before ?? {name: raw.node, lostAt: null, markedAt: null};
    const wasLost = before && before.lostAt !== null;
    const old = before ? before.health : null;
    const fell = before && !wasLost && before.place && !place && !before.raw.leaving && !before.raw.quarantined && !raw.leaving && !raw.quarantined;
    // Its port is another one after a restart, however short that was.
    const anew = before && !wasLost && before.address && raw.address && before.address !== raw.address;
    const placeBefore = before?.place ? placeText(before) : '';
    Object.assign(node, {
      raw, model, place, replica, lostAt: null,
      address: raw.address ?? null, host: hostOf(raw.address), layers: raw.layers,
      health: health({...raw, place}, replica),
    });
    const window = this.window(raw.node);
    const restarted = window.last && window.last.busy.compute_us > (raw.busy?.compute_us ?? 0);
    if (restarted || wasLost) window.clear();
    window.add({at, busy: raw.busy ?? {}, steps: replica?.steps ?? 0});
    node.shares = window.spans ? shares(window.first, window.last) : null;
    node.sentRate = raw.busy?.sent_bytes === undefined ? null : window.rate((entry) => entry.busy.sent_bytes);
    const steps = window.spans ? window.last.steps - window.first.steps : 0;
    const perStep = (name) => (steps > 0 ? (window.last.busy[name] - window.first.busy[name]) / 1000 / steps : null);
    node.sendMsPerStep = perStep('send_us');
    node.computeMsPerStep = perStep('compute_us');
    this.nodes.set(raw.node, node);
    if (fell || anew || wasLost) node.markedAt = at;
    if (node.markedAt !== null && at - node.markedAt > MARKED_MS) node.markedAt = null;
    this.standbys ||= !place;
    if (first) return;
    if (fell) this.note('bad', `${raw.node} was away for a moment and has lost its place (${placeBefore})`);
    else if (anew) this.note('bad', `${raw.node} was away for a moment: its process began anew`);
    if (!before) this.note('info', `${raw.node} has joined`);
    else if (wasLost) this.note('good', `${raw.node} is back`);
    if (!old || old.kind !== node.health.kind) this.noteHealth(node, old, wasLost, fell);
  }

  noteHealth(node, old, wasLost, fell) {
    const {kind, detail} = node.health;
    const at = node.place ? ` (${placeText(node)})` : '';
    if (kind === 'quarantined') this.note('bad', `${node.name} is quarantined: ${detail}`);
    else if (kind === 'draining') this.note('info', `${node.name} is being drained${at}`);
    else if (kind === 'drained') this.note('info', `${node.name} is drained and holds nothing`);
    else if (kind === 'loading') this.note('info', `${node.name} is loading ${rangeText(node.layers)}${at}`);
    else if (kind === 'ready' && old && (old.kind !== 'waiting' || wasLost)) this.note('good', `${node.name} is ready${at}`);
    else if (kind === 'standby' && old && !wasLost && !fell) this.note('info', `${node.name} stands by`);
  }

  tellChanges(before, first) {
    if (first || !before.cluster) return;
    if (before.problem !== this.problem) {
      if (this.problem) this.note('bad', this.problem);
      else this.note('good', 'nothing is missing any more');
    }
    const {term, holder} = this.cluster;
    if (before.cluster.term !== term) {
      this.note('info', `another term began: ${term}${holder ? `, led from ${String(holder).split('/')[0]}` : ''}`);
    }
    for (const replica of this.replicas) {
      const old = before.replicas.find((one) => one.key === replica.key);
      const name = `replica ${replica.replica}${replica.model ? ` of ${replica.model}` : ''}`;
      if (replica.ready && (!old || !old.ready)) this.note('good', `${name} serves`);
      else if (!replica.ready && old?.ready) this.note('bad', `${name} does not serve`);
      else if (old && replica.ready && old.revision !== replica.revision) this.note('info', `${name} was put together anew`);
    }
  }

  /** Gauges and rates of the whole cluster, once a second. */
  sample(at) {
    const {counters, replicas} = this.cluster;
    const last = this.counters.last;
    if (last && last.generated > counters.generated_tokens) this.counters.clear();
    this.counters.add({
      at, generated: counters.generated_tokens, computed: counters.scheduled_tokens,
      queries: counters.prefix_cache_queries, hits: counters.prefix_cache_hits, trained: counters.trained_tokens,
    });
    if (this.samples.length && at - this.samples[this.samples.length - 1].at < 950) return;
    const blocks = replicas.reduce((sum, one) => [sum[0] + one.kv_blocks[0], sum[1] + one.kv_blocks[1]], [0, 0]);
    const rise = (of) => (this.counters.spans ? of(this.counters.last) - of(this.counters.first) : null);
    const queries = rise((entry) => entry.queries);
    this.samples.push({
      at,
      running: counters.running,
      waiting: counters.waiting,
      kv: blocks[0] ? blocks[1] / blocks[0] : null,
      kvBlocks: blocks,
      generated: this.counters.rate((entry) => entry.generated),
      // Every token that is computed and was not generated in the step before is one of a prompt, or one taken up again.
      prompt: this.counters.rate((entry) => entry.computed - entry.generated),
      trained: this.counters.rate((entry) => entry.trained),
      hits: queries > 0 ? rise((entry) => entry.hits) / queries : null,
      hitsEver: counters.prefix_cache_queries ? counters.prefix_cache_hits / counters.prefix_cache_queries : null,
    });
    if (this.samples.length > SAMPLES_MAX) this.samples.shift();
  }

  window(key) {
    let window = this.windows.get(key);
    if (!window) this.windows.set(key, window = new Window());
    return window;
  }

  note(tone, text) {
    this.entries += 1;
    this.log.unshift({id: this.entries, time: Date.now() / 1000, tone, text});
    if (this.log.length > LOG_MAX) this.log.pop();
  }

  /** All nodes, in the order of their places, then of their names. */
  sortedNodes() {
    const rank = (node) => (node.place ? [node.model === null ? 0 : 1, node.place.replica, node.place.stage, node.place.rank] : [2, 0, 0, 0]);
    return [...this.nodes.values()].sort((a, b) => {
      const [left, right] = [rank(a), rank(b)];
      const differs = left.findIndex((value, at) => value !== right[at]);
      return differs >= 0 ? left[differs] - right[differs] : a.name.localeCompare(b.name, 'en', {numeric: true});
    });
  }

  /** Layers of the model that a node serves, as far as its nodes tell. */
  layersOf(model) {
    return [...this.nodes.values()].reduce((most, node) => (node.model === model ? Math.max(most, node.layers?.end ?? 0) : most), 0);
  }
}

function placeText(node) {
  const {replica, stage, rank} = node.place;
  return `replica ${replica}, stage ${stage}, rank ${rank}`;
}

function rangeText(range) {
  return range && range.end > range.start ? `layers ${range.start} to ${range.end - 1}` : 'nothing';
}
