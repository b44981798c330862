// API keys: who is let in, to what, and for how much. A key's text is shown once.

import {get, post, request} from './api.js';
import {confirmDialog, openDialog, toast} from './dialog.js';
import {attr, button, field, h, keyed, setText, show} from './dom.js';
import * as format from './format.js';
import {poll} from './poll.js';

const SCOPES = {inference: 'ask models', training: 'files and jobs of its tenant', admin: 'everything', metrics: 'read metrics'};
const LIMITS = [
  ['requests_per_minute', 'requests/min', 4294967295], ['tokens_per_minute', 'tokens/min', 4294967295], ['concurrency', 'at once', 4294967295],
  ['kv_share_percent', '% of the KV cache', 100], ['training_minutes', 'training minutes', 4294967295],
];

/** Makes the page. */
export function keysPage() {
  const problem = h('p', {class: 'notice', hidden: true});
  const open = h('p', {class: 'notice', hidden: true}, 'This gateway lets in whoever reaches it: ', h('code', null, 'keys_required = true'), ' changes that.');
  const rows = h('tbody');
  const none = h('p', {class: 'empty', hidden: true}, 'There is no key yet.');
  const table = h('table', {class: 'list keys'}, h('thead', null, h('tr', null, ['Key', 'Good for', 'Limits', 'Until', ''].map((title) => h('th', {scope: 'col'}, title)))), rows);
  const element = h('div', {class: 'page page-keys'},
    h('div', {class: 'page-head'}, h('h1', null, 'Keys'), h('div', {class: 'head-actions'}, button('Make a key…', () => openCreate(refresh), {class: 'button primary'}))),
    problem, open, h('section', {class: 'card', 'aria-label': 'Keys'}, none, table));
  const poller = poll(async (signal) => {
    const list = await get('/admin/keys', {signal});
    show(problem, false);
    show(open, !list.required);
    show(none, list.data.length === 0);
    show(table, list.data.length > 0);
    keyed(rows, list.data, (key) => key.id, () => keyRow(refresh));
  }, {every: 2000, onError(error) {
    setText(problem, error.message);
    show(problem, true);
  }});
  const refresh = () => poller.now();
  return {element, show: () => poller.start(), hide: () => poller.stop()};
}

function keyRow(done) {
  let key = null;
  const [name, id, tenant] = [h('b', {class: 'wrap'}), h('span', {class: 'sub'}), h('span', {class: 'sub'})];
  const [scopes, names, limits, until] = [h('span'), h('span', {class: 'sub wrap'}), h('span', {class: 'wrap'}), h('span')];
  const revoke = button('Revoke…', () => openRevoke(key, done), {class: 'button small'});
  const fixed = h('span', {class: 'muted'}, 'configured');
  const element = h('tr', null, h('td', {class: 'cell-name'}, name, id, tenant), h('td', {'data-label': 'Good for'}, scopes, names),
    h('td', {'data-label': 'Limits'}, limits), h('td', {'data-label': 'Until'}, until), h('td', {class: 'cell-action'}, revoke, fixed));
  return {element, update: (next) => {
    key = next;
    attr(element, 'data-key', key.id);
    setText(name, key.name);
    setText(id, key.id);
    setText(tenant, key.tenant === key.id ? 'a tenant of its own' : `tenant ${key.tenant}`);
    setText(scopes, key.scopes.join(', '));
    setText(names, [...(key.models ?? []), ...(key.adapters ?? [])].join(', '));
    const said = LIMITS.filter(([limit]) => key[limit] !== null).map(([limit, unit]) => `${format.count(key[limit])} ${unit}`);
    if (key.priority) said.push(`priority ${key.priority}`);
    if (key.share_prefix_cache) said.push('shares prefixes');
    setText(limits, said.join(' · ') || 'none');
    setText(until, key.expires_at ? new Date(key.expires_at * 1000).toLocaleDateString() : 'it is revoked');
    show(revoke, !key.configured);
    show(fixed, key.configured);
    attr(revoke, 'aria-label', `Revoke ${key.name}…`);
  }};
}

function openRevoke(key, done) {
  confirmDialog({
    title: `Revoke ${key.name}?`, action: 'Revoke it', danger: true,
    body: h('p', null, 'Every gateway refuses it within a second. Answers that have begun go on. It cannot be taken back.'),
    act: () => request('DELETE', `/admin/keys/${encodeURIComponent(key.id)}`),
  }).then((revoked) => {
    if (revoked) toast(`${key.name} is let in no longer`, 'good');
    done();
  });
}

function openCreate(done) {
  const text = (id, props) => h('input', {id, autocomplete: 'off', spellcheck: 'false', ...props});
  const number = (id, props) => text(id, {type: 'number', step: 1, placeholder: 'no limit', ...props});
  const name = text('key-name', {required: true, maxlength: 128, placeholder: 'who or what it is for'});
  const tenant = text('key-tenant', {maxlength: 64, pattern: '[A-Za-z0-9._\\-]*', placeholder: 'one of its own'});
  const scopes = Object.entries(SCOPES).map(([scope, what]) => {
    const box = h('input', {type: 'checkbox', id: `key-scope-${scope}`, value: scope});
    box.checked = scope === 'inference';
    return {box, row: h('label', {class: 'check'}, box, h('span', null, h('b', null, scope), `: ${what}`))};
  });
  const models = text('key-models', {placeholder: 'all'});
  const adapters = text('key-adapters', {placeholder: 'its own, and those of nobody'});
  const limits = LIMITS.map(([limit, unit, max]) => [limit, unit, number(`key-${limit.replaceAll('_', '-')}`, {min: 1, max})]);
  const priority = number('key-priority', {placeholder: '0; lower goes first'});
  const days = number('key-days', {min: 1, max: 36600, placeholder: 'until it is revoked'});
  const shares = h('input', {type: 'checkbox', id: 'key-shares'});
  let made = null;
  confirmDialog({
    title: 'Make a key', action: 'Make it',
    body: h('div', {class: 'stack'}, field('Name', name), field('Tenant', tenant, 'files, jobs, stored responses and cached prefixes are a tenant’s'),
      h('fieldset', {class: 'stack'}, h('legend', null, 'Good for'), scopes.map(({row}) => row)),
      h('div', {class: 'form-grid'}, field('Models', models), field('Adapters', adapters), limits.map(([, unit, input]) => field(unit[0].toUpperCase() + unit.slice(1), input)), field('Priority', priority), field('Days', days)),
      h('label', {class: 'check'}, shares, h('span', null, 'Share cached prefixes with all others that do'))),
    act: async () => {
      const list = (input) => { const names = input.value.split(/[\s,]+/).filter(Boolean); return names.length ? names : undefined; };
      const value = (input) => (input.value === '' ? undefined : input.valueAsNumber);
      const body = {
        name: name.value.trim(), tenant: tenant.value || undefined, scopes: scopes.filter(({box}) => box.checked).map(({box}) => box.value),
        models: list(models), adapters: list(adapters), priority: value(priority), share_prefix_cache: shares.checked || undefined,
        expires_in_s: days.value === '' ? undefined : days.valueAsNumber * 86_400,
      };
      for (const [limit, , input] of limits) body[limit] = value(input);
      made = await post('/admin/keys', body);
    },
  }).then(() => {
    if (made) showOnce(made);
    done();
  });
}

/** The only time that a key is seen. */
function showOnce(made) {
  const secret = h('code', {class: 'secret', id: 'key-secret', tabindex: '0'}, made.key);
  const copy = button('Copy', async () => {
    try {
      await navigator.clipboard.writeText(made.key);
      toast('copied', 'good');
    } catch {
      getSelection().selectAllChildren(secret);
      toast('mark it and copy it by hand', 'bad');
    }
  }, {class: 'button primary'});
  const dialog = openDialog({
    title: `The key ${made.name}`,
    body: [h('p', null, 'It is shown only now: put it where it is needed before you close this.'), secret],
    actions: [button('Close', () => dialog.close()), copy],
  });
}
