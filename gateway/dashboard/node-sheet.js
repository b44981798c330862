// Everything about one node, in a dialog that stays current while it is open.

import {bar} from './charts.js';
import {openDialog} from './dialog.js';
import {button, facts, h, keyed, setText, show} from './dom.js';
import * as format from './format.js';
import {healthLabel} from './health.js';
import {openDrain, undrain} from './drain.js';
import {ledgerKind, ledgerParts, ledgerWord, timeParts} from './node-parts.js';

/** Opens it; `listen(update)` has it updated, and returns what ends that. */
export function openNode(name, view, listen, done) {
  const state = healthLabel();
  const detail = h('span', {class: 'muted'});
  const list = facts([
    ['Place', (node) => format.place(node.place)],
    ['Layers', (node) => format.layers(node.layers)],
    ['Model', (node) => node.model],
    ['Address', (node) => node.address],
    ['Threads', (node) => (node.raw.threads === undefined ? null : `${node.raw.threads}${node.raw.isa ? `, ${node.raw.isa}` : ''}`)],
    ['Memory bandwidth', (node) => `${format.bytes(node.raw.bandwidth_bytes_per_s)}/s`],
    ['Arithmetic', (node) => `${format.number(node.raw.flops_per_s / 1e9)} GFLOP/s`],
    ['Computing per step', (node) => (node.computeMsPerStep === null ? null : format.ms(node.computeMsPerStep))],
    ['Sending per step', (node) => (node.sendMsPerStep === null ? null : format.ms(node.sendMsPerStep))],
    ['Sent to the next stage', (node) => (node.raw.busy?.sent_bytes === undefined ? null : `${format.bytes(node.raw.busy.sent_bytes)} in all`)],
    ['Training so far', (node) => (node.raw.trained?.compute_us > 0 ? `${format.duration(node.raw.trained.compute_us / 1e6)} computing, ${format.duration((node.raw.trained.wait_us + node.raw.trained.exchange_us) / 1e6)} waiting and exchanging` : null)],
  ]);
  const time = bar('wide');
  const timeText = h('p', {class: 'hint'});
  const reserved = bar('wide');
  const resident = bar('wide');
  const ledger = h('tbody');
  const drainButton = button('Drain…', () => { dialog.close(); openDrain(name, done); });
  const undrainButton = button('Use it again', () => { dialog.close(); undrain(name, done); });
  const dialog = openDialog({
    title: name,
    className: 'node-sheet',
    body: [
      h('p', {class: 'sheet-state'}, state.element, detail), list.element,
      h('h3', null, 'Time, last seconds'), time.element, timeText,
      h('h3', null, 'Memory'), h('div', {class: 'memory-pair'}, h('span', null, 'ledger'), reserved.element, h('span', null, 'resident'), resident.element),
      h('table', {class: 'plain'}, ledger),
    ],
    actions: [undrainButton, drainButton, button('Close', () => dialog.close())],
  });

  function update(current) {
    const node = current.nodes.get(name);
    if (!node) return dialog.close();
    state.update(node);
    setText(detail, node.health.kind === 'quarantined' ? node.health.detail : '');
    list.update(node);
    const times = timeParts(node);
    time.update(times.parts, 1, times.label);
    setText(timeText, node.shares ? times.label : 'no figures yet');
    const memory = ledgerParts(node);
    reserved.update(memory.parts, memory.whole, memory.label);
    resident.update(memory.compact, memory.whole);
    const rows = [...memory.lines.map(([line, value]) => [ledgerWord(line), value, ledgerKind(line)]),
      ['reserved in all', memory.total, null], ['resident', memory.resident, 'resident'], ['offered', memory.memory, null]];
    keyed(ledger, rows, ([word]) => word, ([word, , kind]) => {
      const cell = h('td', {class: 'number'});
      return {element: h('tr', null, h('th', {scope: 'row'}, h('span', {class: kind ? `swatch part-${kind}` : 'swatch none', 'aria-hidden': 'true'}), word), cell), update: ([, value]) => setText(cell, format.bytes(value))};
    });
    const leaving = node.raw.leaving || node.health.kind === 'quarantined';
    show(drainButton, !leaving && node.lostAt === null);
    show(undrainButton, leaving && node.lostAt === null);
  }

  update(view);
  const end = listen(update);
  dialog.closed.then(end);
}
