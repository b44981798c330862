// The cluster as a picture: hosts as bands, stages as columns, nodes as cut stones in them, and what flows between. Lines are SVG; cards lie over
// them as buttons, so that their texts wrap and clip as texts do and the keyboard reaches them.

import {attr, h, keyed, setText, show, svg} from './dom.js';
import * as format from './format.js';
import {bar} from './charts.js';
import {healthIcon, healthText} from './health.js';
import {layout} from './layout.js';
import {ledgerParts, timeParts} from './node-parts.js';

/** The picture; `update(view)` draws it anew where something has changed, `onNode(name)` is told which node was chosen. */
export function picture(onNode) {
  const hosts = svg('g');
  const control = svg('path', {class: 'control-line'});
  const links = svg('g');
  const lines = svg('svg', {class: 'picture-lines', 'aria-hidden': 'true'}, hosts, control, links);
  const heads = h('div');
  const roles = h('div');
  const labels = h('div');
  const cards = h('div', {role: 'list', 'aria-label': 'Nodes'});
  const sheet = h('div', {class: 'picture-sheet'}, lines, heads, roles, labels, cards);
  const element = h('div', {class: 'picture', role: 'group', 'aria-label': 'The cluster as a picture'}, sheet);
  let width = 0;
  let last = null;
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return;
    width = entry.contentRect.width;
    if (last) update(last);
  }).observe(element);

  function update(view) {
    last = view;
    if (!width) return;
    const plan = layout(view, width);
    setBox(sheet, {width: plan.width, height: plan.height});
    attr(lines, 'width', plan.width);
    attr(lines, 'height', plan.height);
    attr(element, 'tabindex', plan.width > width + 1 ? '0' : null);
    attr(element, 'class', plan.narrow ? 'picture narrow' : 'picture');
    keyed(hosts, plan.bands, (band) => band.host, () => {
      const rect = svg('rect', {class: 'host', rx: 10});
      return {element: rect, update: ({box}) => {
        for (const [name, value] of [['x', box.x], ['y', box.y], ['width', box.width], ['height', box.height]]) attr(rect, name, value);
      }};
    });
    keyed(heads, plan.heads, (head) => head.key, () => {
      const text = h('span', {class: 'picture-head'});
      return {element: text, update: (head) => {
        setText(text, head.text);
        attr(text, 'class', `picture-head ${head.kind}`);
        setBox(text, head.box);
      }};
    });
    keyed(roles, roleList(view, plan), (role) => role.key, roleCard);
    keyed(cards, plan.cards, (card) => card.node.name, () => nodeCard(onNode));
    attr(control, 'd', plan.control);
    keyed(links, plan.links, (link) => link.key, linkLine);
    keyed(labels, plan.links, (link) => link.key, linkLabel);
  }
  return {element, update};
}

/** Places an absolutely placed element, where that has changed. */
function setBox(element, box) {
  const {x = 0, y = 0, width, height} = box;
  const place = {left: `${x}px`, top: `${y}px`};
  if (width !== undefined) place.width = `${width}px`;
  if (height !== undefined) place.height = `${height}px`;
  for (const [name, value] of Object.entries(place)) if (element.style[name] !== value) element.style[name] = value;
}

function roleList(view, plan) {
  const {cluster, connected} = view;
  const gateways = cluster?.gateways;
  const leads = cluster && view.problem !== null && !cluster.nodes ? 'away' : null;
  return [
    {
      key: 'gateway', box: plan.gateway, name: 'gateway',
      detail: gateways === undefined ? 'serves this page' : gateways === 1 ? '1 connected' : `${gateways} connected`,
      more: connected === false ? 'not connected' : null,
    },
    {
      key: 'scheduler', box: plan.scheduler, name: 'scheduler',
      detail: cluster ? `leads, term ${cluster.term}` : 'not found yet',
      more: leads ?? (cluster?.holder ? holderText(cluster.holder) : null), title: cluster?.holder,
    },
  ];
}

/** Where the leading scheduler is: of what names its process, the address. */
export function holderText(holder) {
  return String(holder).split('/')[0];
}

function roleCard() {
  const title = h('b');
  const detail = h('span');
  const more = h('span', {class: 'muted'});
  const element = h('div', {class: 'role'}, title, detail, more);
  return {element, update: (role) => {
    setBox(element, role.box);
    setText(title, role.name);
    setText(detail, role.detail);
    setText(more, role.more);
    show(more, role.more);
    attr(more, 'title', role.title ?? role.more);
  }};
}

function nodeCard(onNode) {
  let node = null;
  const icon = healthIcon();
  const name = h('b', {class: 'clip'});
  const state = h('span', {class: 'node-state'});
  const place = h('span', {class: 'node-place clip'});
  const strip = layerStrip();
  const layers = h('span', {class: 'node-layers'});
  const time = bar('thin');
  const busy = h('span', {class: 'node-figure'});
  const memory = bar('thin');
  const resident = h('span', {class: 'node-figure'});
  const button = h('button', {type: 'button', class: 'node', onclick: () => onNode(node.name)},
    h('span', {class: 'node-head'}, icon.element, name, state), place,
    h('span', {class: 'node-row'}, strip.element, layers),
    h('span', {class: 'node-row'}, time.element, busy),
    h('span', {class: 'node-row'}, memory.element, resident));
  const element = h('div', {class: 'node-slot', role: 'listitem'}, button);
  return {element, update: (card) => {
    node = card.node;
    setBox(element, card.box);
    attr(button, 'class', `node node-${node.health.kind}${card.markedSeconds === null ? '' : ' node-marked'}`);
    attr(element, 'data-node', node.name);
    attr(element, 'data-health', node.health.kind);
    icon.update(node.health);
    setText(name, node.name);
    const gone = node.health.kind === 'lost';
    setText(state, gone ? `lost ${format.duration(card.lostSeconds)} ago` : card.markedSeconds === null ? healthText(node) : `${healthText(node)}, away ${format.duration(card.markedSeconds)} ago`);
    const model = node.model ? `${node.model} · ` : '';
    setText(place, node.health.kind === 'quarantined' ? node.health.detail : node.place ? model + format.place(node.place) : placeless(node));
    attr(place, 'title', place.textContent);
    strip.update(node.layers, card.layersAll);
    setText(layers, format.layers(node.layers));
    const times = timeParts(node);
    time.update(times.parts, 1, times.label);
    setText(busy, node.shares && node.place && !gone ? `busy ${format.percent(times.busy)}` : '');
    const ledger = ledgerParts(node);
    memory.update(ledger.compact, ledger.whole, ledger.label);
    setText(resident, gone || !node.raw.resident ? '' : format.bytes(node.raw.resident));
    attr(button, 'aria-label', `${node.name}, ${healthText(node)}, ${place.textContent}, ${format.layers(node.layers)}. Details`);
  }};
}

function placeless(node) {
  return {standby: 'takes the next vacant place', drained: 'holds nothing, may be stopped'}[node.health.kind] ?? 'no place';
}

/** All layers of the model as a course of stones, with those that a node holds set. */
function layerStrip() {
  const path = svg('path', {class: 'strip-own'});
  const rest = svg('path', {class: 'strip-all'});
  const element = svg('svg', {class: 'strip', viewBox: '0 0 100 8', preserveAspectRatio: 'none', 'aria-hidden': 'true'}, rest, path);
  let drawn = '';
  return {element, update(range, all) {
    const key = `${range?.start}-${range?.end}/${all}`;
    if (key === drawn) return;
    drawn = key;
    const [start, end] = [range?.start ?? 0, range?.end ?? 0];
    const stone = 100 / Math.max(1, all);
    const gap = all > 40 ? 0 : Math.min(1.6, stone * 0.12);
    const stones = (from, to) => Array.from({length: Math.max(0, to - from)}, (_, at) => `M${((from + at) * stone).toFixed(2)} 0h${(stone - gap).toFixed(2)}v8h-${(stone - gap).toFixed(2)}z`).join('');
    attr(path, 'd', stones(start, end));
    attr(rest, 'd', stones(0, start) + stones(end, all));
  }};
}

function linkLine() {
  const line = svg('path', {class: 'link'});
  const flow = svg('path', {class: 'flow'});
  const element = svg('g', null, line, flow);
  return {element, update: (link) => {
    attr(line, 'd', link.path);
    attr(flow, 'd', link.path);
    attr(element, 'class', `link-${link.state}`);
    // Thicker with each power of ten above a kilobyte per second, within reason.
    const weight = link.state === 'flow' ? Math.min(5, 1.5 + Math.max(0, Math.log10((link.rate ?? 1000) / 1000)) * 0.7) : 1.5;
    if (line.style.strokeWidth !== `${weight.toFixed(1)}px`) line.style.strokeWidth = `${weight.toFixed(1)}px`;
  }};
}

function linkLabel() {
  const rate = h('span');
  const latency = h('span', {class: 'muted'});
  const element = h('span', {class: 'link-label'}, rate, latency);
  return {element, update: (link) => {
    setBox(element, {x: link.label.x, y: link.label.y});
    attr(element, 'class', `link-label link-label-${link.state}`);
    attr(element, 'data-link', link.key);
    const to = link.named ? ` to ${link.to.name}` : '';
    if (link.state === 'broken') {
      setText(rate, `✕ cut${to}`);
      setText(latency, '');
    } else if (link.state === 'idle') {
      setText(rate, `idle${to}`);
      setText(latency, '');
    } else {
      setText(rate, link.rate === null ? (to || 'sending') : `${format.bytes(link.rate)}/s${to}`);
      setText(latency, link.ms === null ? '' : `${format.ms(link.ms)}/step`);
    }
    attr(element, 'title', `${link.from.name} to ${link.to.name}: ${link.rate === null ? '' : `${format.bytes(link.rate)}/s, `}${link.ms === null ? 'no step now' : `${format.ms(link.ms)} of sending per step`}`);
  }};
}
