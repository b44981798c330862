// Where a node's time and memory go, as parts of a bar.

import * as format from './format.js';

const TIMES = [['compute', 'computing'], ['exchange', 'exchanging'], ['send', 'sending'], ['wait', 'waiting']];

/** What the parts of a time bar mean, for a legend. */
export const TIME_LEGEND = TIMES;

/** The last seconds of a node, as shares of the time; what is left is idle. */
export function timeParts(node) {
  if (!node.shares) return {parts: [], busy: null, label: 'no step in the last seconds'};
  // Waiting is told when the step is, so that a window may hold more than its own length.
  const whole = Math.max(1, TIMES.reduce((sum, [name]) => sum + node.shares[name], 0));
  const parts = TIMES.map(([name, word]) => {
    const value = node.shares[name] / whole;
    return {name, value, text: `${word} ${format.percent(value)}`};
  });
  const busy = parts.slice(0, 3).reduce((sum, part) => sum + part.value, 0);
  return {parts, busy, label: parts.map((part) => part.text).join(', ')};
}

const LEDGER_WORDS = {kv_cache: 'KV cache'};
/** A line has the same colour on every node. */
const LEDGER_ORDER = ['weights', 'kv_cache', 'activations', 'boundary_log', 'embedding', 'head'];

const ledgerRank = (name) => (LEDGER_ORDER.includes(name) ? LEDGER_ORDER.indexOf(name) : name === 'serving' ? 0 : LEDGER_ORDER.length);

/** The class of a line's colour. */
export function ledgerKind(name) {
  return `ledger-${ledgerRank(name)}`;
}

/** The name of a line of the ledger, for people. */
export function ledgerWord(name) {
  return LEDGER_WORDS[name] ?? name.replaceAll('_', ' ');
}

/** What is reserved on a node by the ledger's lines, beside what is really resident. */
export function ledgerParts(node) {
  const {reserved = 0, adapters = 0, jobs = 0, resident = 0, memory, ledger} = node.raw;
  const lines = ledger
    ? Object.entries(ledger).filter(([, value]) => typeof value === 'number' && value > 0)
    : reserved > 0 ? [['serving', reserved]] : [];
  const own = lines.reduce((sum, [, value]) => sum + value, 0);
  if (ledger && reserved > own * 1.01) lines.push(['other', reserved - own]);
  if (adapters > 0 && !lines.some(([name]) => name === 'adapters')) lines.push(['adapters', adapters]);
  if (jobs > 0 && !lines.some(([name]) => name === 'jobs')) lines.push(['jobs', jobs]);
  lines.sort(([a], [b]) => ledgerRank(a) - ledgerRank(b));
  const total = lines.reduce((sum, [, value]) => sum + value, 0);
  const whole = Math.max(total, resident, 1);
  const parts = lines.map(([name, value]) => ({name, value, kind: ledgerKind(name), text: `${ledgerWord(name)} ${format.bytes(value)}`}));
  return {
    lines, parts, total, whole, resident, memory,
    compact: [{name: 'resident', value: Math.min(resident, whole), text: `resident ${format.bytes(resident)}`}],
    label: `${format.bytes(resident)} resident of ${format.bytes(total)} reserved`,
  };
}
