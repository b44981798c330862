// The home page: the cluster as a picture, its figures, its nodes, and what has happened.

import {bar, legend} from './charts.js';
import {attr, button, h, keyed, setText, show} from './dom.js';
import * as format from './format.js';
import {healthLabel} from './health.js';
import {openDrain, openReplan, undrain} from './drain.js';
import {TIME_LEGEND, ledgerParts, timeParts} from './node-parts.js';
import {openNode} from './node-sheet.js';
import {picture} from './picture.js';
import {tiles} from './tiles.js';

/** Makes the page. */
export function clusterPage({feed}) {
  const {view} = feed.state;
  const watchers = new Set();
  const summary = h('p', {class: 'summary'});
  const banner = h('p', {class: 'banner', role: 'alert', hidden: true});
  const figures = tiles();
  const image = picture((name) => openNode(name, view, listen, feed.now));
  const rows = h('tbody');
  const replicas = h('ul', {class: 'replicas'});
  const log = h('ol', {class: 'log', 'aria-live': 'polite', 'aria-relevant': 'additions'});
  const quiet = h('p', {class: 'muted'}, 'Nothing has changed since this page was opened.');
  const element = h('div', {class: 'page page-cluster'},
    h('div', {class: 'page-head'}, h('h1', null, 'Cluster'), summary, h('div', {class: 'head-actions'}, button('Re-plan…', () => openReplan(feed.now), {class: 'button'}))), banner, figures.element,
    h('section', {class: 'card picture-card', 'aria-label': 'Picture'}, image.element, replicas),
    h('div', {class: 'columns'},
      h('section', {class: 'card grow', 'aria-labelledby': 'nodes-title'},
        h('div', {class: 'card-head'}, h('h2', {id: 'nodes-title'}, 'Nodes'), legend(TIME_LEGEND)),
        h('table', {class: 'list nodes'},
          h('thead', null, h('tr', null, ['Node', 'State', 'Time, last seconds', 'Memory'].map((title) => h('th', {scope: 'col'}, title)), h('th', {scope: 'col'}, h('span', {class: 'offscreen'}, 'Actions')))), rows)),
      h('section', {class: 'card side', 'aria-labelledby': 'log-title'}, h('div', {class: 'card-head'}, h('h2', {id: 'log-title'}, 'What has changed')), quiet, log)));

  function listen(watcher) {
    watchers.add(watcher);
    return () => watchers.delete(watcher);
  }

  function summarise() {
    const {cluster} = view;
    if (!cluster) return view.connected === false ? '' : 'waiting for the scheduler';
    const nodes = [...view.nodes.values()].filter((node) => node.lostAt === null);
    const hosts = new Set(nodes.map((node) => node.host)).size;
    const serving = view.replicas.filter((replica) => replica.ready).length;
    const model = cluster.model.split('/').filter(Boolean).pop();
    const others = view.models.length ? ` and ${format.counted(view.models.length, 'other model')}` : '';
    return `${model}${others} · ${format.counted(nodes.length, 'node')}${nodes.some((node) => node.host) ? ` on ${format.counted(hosts, 'host')}` : ''} · ${serving} of ${format.counted(view.replicas.length, 'replica')} ${serving === 1 ? 'serves' : 'serve'}`;
  }

  return {element, update(state) {
    setText(summary, summarise());
    const problem = view.connected === false ? `${state.error?.status ? 'The gateway does not tell of the cluster' : 'Not connected'}: ${state.error?.message ?? ''}. What is shown is as it was last seen; this page tries again by itself.` : view.problem;
    setText(banner, problem);
    show(banner, problem);
    attr(element, 'data-stale', view.connected === false ? 'true' : null);
    figures.update(state);
    image.update(view);
    keyed(replicas, view.replicas, (replica) => replica.key, replicaLine);
    keyed(rows, view.sortedNodes(), (node) => node.name, () => nodeRow((name) => openNode(name, view, listen, feed.now), feed.now));
    show(quiet, view.log.length === 0);
    keyed(log, view.log, (entry) => entry.id, logLine);
    for (const watcher of watchers) watcher(view);
  }};
}

function replicaLine() {
  const name = h('b');
  const text = h('span', {class: 'muted'});
  const element = h('li', null, name, ' ', text);
  return {element, update: (replica) => {
    const [all, used] = replica.kv_blocks;
    setText(name, `${replica.model ? `${replica.model}, ` : ''}replica ${replica.replica}`);
    const steps = replica.stepsRate ? `${format.number(replica.stepsRate)} steps/s` : 'no steps now';
    setText(text, `${replica.ready ? '✓ serves' : '✕ does not serve'} · ${steps} · KV ${format.percent(all ? used / all : null)} · revision ${replica.revision}`);
    attr(element, 'class', replica.ready ? '' : 'not-ready');
  }};
}

function nodeRow(onOpen, done) {
  let name = '';
  const open = h('button', {type: 'button', class: 'link-button', onclick: () => onOpen(name)});
  const where = h('span', {class: 'sub'});
  const speed = h('span', {class: 'sub'});
  const state = healthLabel();
  const place = h('span', {class: 'sub'});
  const layers = h('span', {class: 'sub'});
  const time = bar('wide');
  const timeText = h('span', {class: 'sub'});
  const reserved = bar('wide');
  const resident = bar('wide slim');
  const memoryText = h('span', {class: 'sub'});
  const drainButton = button('Drain…', () => openDrain(name, done), {class: 'button small'});
  const undrainButton = button('Use again', () => undrain(name, done), {class: 'button small'});
  const element = h('tr', null,
    h('td', {class: 'cell-name'}, open, where, speed), h('td', {class: 'cell-state'}, state.element, place, layers),
    h('td', {class: 'cell-time'}, time.element, timeText),
    h('td', {class: 'cell-memory'}, reserved.element, resident.element, memoryText),
    h('td', {class: 'cell-action'}, drainButton, undrainButton));
  return {element, update: (node) => {
    name = node.name;
    attr(element, 'data-row', name);
    const gone = node.lostAt !== null;
    attr(element, 'class', gone ? 'gone' : '');
    setText(open, name);
    const {threads, isa} = node.raw;
    setText(where, node.address);
    setText(speed, [threads === undefined ? null : format.counted(threads, 'thread'), isa].filter(Boolean).join(' · ') || `${format.number(node.raw.flops_per_s / 1e9)} GFLOP/s`);
    state.update(node);
    setText(place, node.health.kind === 'quarantined' ? node.health.detail : node.place ? format.place(node.place) : '');
    setText(layers, node.place ? `${node.model ? `${node.model}, ` : ''}${format.layers(node.layers)}` : '');
    const times = timeParts(node);
    time.update(times.parts, 1, times.label);
    setText(timeText, gone ? '' : times.busy === null ? 'no figures yet' : times.parts.filter((part) => part.value >= 0.005).map((part) => part.text).join(' · ') || 'idle');
    const memory = ledgerParts(node);
    reserved.update(memory.parts, memory.whole, memory.parts.map((part) => part.text).join(', '));
    resident.update(memory.compact, memory.whole);
    setText(memoryText, gone ? '' : memory.total ? `reserved ${format.bytes(memory.total)} · resident ${format.bytes(memory.resident)}` : `${format.bytes(memory.memory)} offered`);
    const leaving = node.raw.leaving || node.health.kind === 'quarantined';
    show(drainButton, !leaving && !gone);
    show(undrainButton, leaving && !gone);
    attr(drainButton, 'aria-label', `Drain ${name}…`);
    attr(undrainButton, 'aria-label', `Use ${name} again`);
  }};
}

const TONES = {good: '✓', bad: '✕', info: '·'};

function logLine(entry) {
  return {element: h('li', {class: `log-${entry.tone}`}, h('time', null, format.clock(entry.time)), h('span', {class: 'log-mark', 'aria-hidden': 'true'}, TONES[entry.tone]), h('span', null, entry.text))};
}
