// Draining a node, and laying all out anew: first what would become of the layout, then the deed.

import {ApiError, post, request} from './api.js';
import {confirmDialog, openDialog, toast} from './dialog.js';
import {button, h, setText, show} from './dom.js';
import * as format from './format.js';

const DEED_TIMEOUT_MS = 30_000;

const CHANGES = {
  'nothing': 'Nothing else changes: no place is lost.',
  'standbys step in': 'Standbys load its layers and take its place. Streams pause for a moment.',
  'another replica takes over': 'Its replica ends; another one takes over its requests.',
  'a new layout': 'The cluster is laid out anew over the nodes that stay.',
};

/** Opens the dialog for a node; `done()` is called after the scheduler has agreed. */
export function openDrain(name, done) {
  const preview = h('div', {class: 'plan', 'aria-live': 'polite'}, h('p', {class: 'muted'}, 'asking the scheduler what would happen…'));
  const problem = h('p', {class: 'problem', role: 'alert', hidden: true});
  const force = h('input', {type: 'checkbox'});
  const forceRow = h('label', {class: 'check', hidden: true}, force, h('span', null, 'Drain it even so: what it holds is lost until another node takes its place, and requests wait.'));
  const go = button(`Drain ${name}`, drain, {class: 'button danger', disabled: true});
  let mustForce = false;
  const allow = () => { go.disabled = mustForce && !force.checked; };
  force.addEventListener('change', allow);

  const dialog = openDialog({
    title: `Drain ${name}?`,
    body: [h('p', null, 'The node is emptied and stays so until it is used again or stopped. Its process goes on.'), preview, problem, forceRow],
    actions: [button('Cancel', () => dialog.close()), go],
    className: 'drain',
  });

  function refuse(message) {
    setText(problem, message);
    show(problem, true);
    show(forceRow, true);
    mustForce = true;
    allow();
  }

  async function ask() {
    try {
      const plan = await post('/admin/plan', {without: [name]});
      preview.replaceChildren(planView(plan, `Without ${name}`, plan.possible ? CHANGES[plan.change] ?? plan.change : `Not possible without ${name}.`));
      if (plan.possible) allow();
      else refuse(plan.problem ?? 'nothing can take its place');
    } catch (error) {
      const missing = error instanceof ApiError && (error.status === 404 || error.status === 405);
      preview.replaceChildren(h('p', {class: 'muted'}, missing
        ? 'This gateway has no preview. The scheduler refuses where nothing can take the place of the node.'
        : `The scheduler could not say what would happen: ${error.message}`));
      allow();
    }
  }

  async function drain() {
    go.disabled = true;
    show(problem, false);
    try {
      const query = mustForce && force.checked ? '?force=true' : '';
      await request('POST', `/admin/nodes/${encodeURIComponent(name)}/drain${query}`, {timeout: DEED_TIMEOUT_MS});
      toast(`${name} is being drained`, 'good');
      dialog.close();
      done();
    } catch (error) {
      refuse(error.message);
    }
  }

  ask();
}

/** Makes a node useful again. */
export async function undrain(name, done) {
  try {
    await request('DELETE', `/admin/nodes/${encodeURIComponent(name)}/drain`, {timeout: DEED_TIMEOUT_MS});
    toast(`${name} is of use again`, 'good');
    done();
  } catch (error) {
    toast(error.message, 'bad');
  }
}

/** Opens the dialog that has all laid out anew; `done()` is called after the scheduler has agreed. */
export function openReplan(done) {
  const preview = h('div', {class: 'plan', 'aria-live': 'polite'}, h('p', {class: 'muted'}, 'asking the scheduler what it would plan…'));
  confirmDialog({
    title: 'Lay the model out anew?', action: 'Lay it out anew', ready: ask(),
    body: h('div', {class: 'stack'}, h('p', null, 'As it would be planned from nothing for the nodes that there are now. What serves goes on until the new slices are in memory; streams pause for a moment then.'), preview),
    act: () => post('/admin/replan', {}, {timeout: DEED_TIMEOUT_MS}),
  }).then((replanned) => {
    if (replanned) toast('the model is being laid out anew', 'good');
    done();
  });

  async function ask() {
    const plan = await post('/admin/replan', {dry_run: true});
    const same = plan.change === 'nothing';
    preview.replaceChildren(planView(plan, same ? 'The layout' : 'The new layout', !plan.possible ? `Not possible: ${plan.problem}` : same ? 'It is laid out so already.' : 'Another layout than now.'));
    return plan.possible && !same;
  }
}

/** A layout that could be: replicas with their stages, and who would hold them. */
function planView(plan, title, change) {
  const stones = (plan.replicas ?? []).map((replica) => h('div', {class: 'plan-replica'},
    h('span', {class: 'plan-name'}, `replica ${replica.replica}`),
    (replica.stages ?? []).map((stage) => h('div', {class: 'plan-stage'},
      h('span', {class: 'muted'}, format.layers(stage.layers)),
      (stage.ranks ?? []).map((rank) => h('span', {class: 'plan-rank'}, h('b', null, rank.node), ` ${format.bytes(rank.memory_bytes)}`))))));
  return h('div', {class: 'stack'},
    h('p', {class: plan.possible ? 'plan-change' : 'plan-change plan-impossible'}, plan.possible ? '✓ ' : '✕ ', change),
    stones.length ? h('div', {class: 'plan-layout', role: 'group', 'aria-label': title}, h('p', {class: 'muted'}, `${title}:`), stones) : null);
}
