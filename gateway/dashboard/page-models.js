// Models and adapters: what is served, on which nodes, in which generation; deploying, scaling, removing, rolling back.

import {ApiError, get, post, request} from './api.js';
import {confirmDialog, toast} from './dialog.js';
import {attr, button, facts, field, h, keyed, setText, show} from './dom.js';
import * as format from './format.js';
import {poll} from './poll.js';

/** A change may have every rank load something, or a model be fetched from a hub. */
const CHANGE_MS = 620_000;
const GENERATIONS_KEPT = 8;
const STATUS = {serving: '✓ serving', loading: '◔ loading', removing: '– removing'};

/** Makes the page. */
export function modelsPage({feed, go}) {
  const problem = h('p', {class: 'notice', hidden: true});
  const models = h('div', {class: 'model-cards'});
  const adapters = h('tbody');
  const none = h('p', {class: 'empty'}, 'No adapter is served. A fine-tuning job makes one, or load one that lies in the cluster’s adapters directory.');
  const table = h('table', {class: 'list adapters'}, h('thead', null, h('tr', null, ['Adapter', 'Generation', 'From', 'Since', ''].map((title) => h('th', {scope: 'col'}, title)))), adapters);
  const element = h('div', {class: 'page page-models'},
    h('div', {class: 'page-head'}, h('h1', null, 'Models'), h('div', {class: 'head-actions'}, button('Deploy a model…', () => openDeploy(refresh), {class: 'button primary'}))),
    problem,
    h('section', {'aria-label': 'Models'}, models),
    h('section', {class: 'card', 'aria-labelledby': 'adapters-title'},
      h('div', {class: 'card-head'}, h('h2', {id: 'adapters-title'}, 'Adapters'), button('Load an adapter…', () => openLoad(refresh), {class: 'button small'})), none, table));
  let wanted = '';

  async function ask(signal) {
    const [deployed, listed] = await Promise.all([
      get('/admin/models', {signal}).catch((error) => { if (error instanceof ApiError && error.status) return {data: null, error}; throw error; }),
      get('/v1/models', {signal}),
    ]);
    setText(problem, deployed.error ? deployed.error.message : '');
    show(problem, deployed.error);
    const own = listed.data.find((card) => card.parent === null);
    keyed(models, deployed.data ?? [], (model) => model.name, () => modelCard({go, refresh, feed}));
    const views = feed.state.view.cluster?.adapters ?? [];
    const list = listed.data.filter((card) => card.parent !== null).map((card) => ({...card, view: views.find((one) => one.name === card.id), base: own?.id}));
    show(none, list.length === 0);
    show(table, list.length > 0);
    keyed(adapters, list, (card) => card.id, () => adapterRow({go, refresh}));
    highlight();
  }
  const poller = poll(ask, {every: 2000, onError(error) {
    setText(problem, error.message);
    show(problem, true);
  }});
  const refresh = () => { poller.now(); feed.now(); };

  function highlight() {
    for (const row of adapters.children) attr(row, 'aria-current', row.dataset.adapter === wanted && wanted ? 'true' : null);
  }

  return {
    element,
    show([name = '']) {
      wanted = name;
      poller.start();
      highlight();
    },
    hide: () => poller.stop(),
  };
}

function modelCard({go, refresh, feed}) {
  let model = null;
  const name = h('h2');
  const status = h('span', {class: 'pill'});
  const problem = h('p', {class: 'problem', hidden: true});
  const list = facts([
    ['Model', () => model.model],
    ['Nodes', () => (model.members.length ? model.members.join(', ') : 'none yet')],
    ['Standing by', () => (model.standbys?.length ? model.standbys.join(', ') : null)],
    ['Nodes wanted', () => (model.own ? (model.nodes === null ? 'all that no other model has' : `at most ${model.nodes}`) : String(model.nodes))],
    ['Replicas', () => `${model.replicas_ready} ready${model.replicas ? ` of ${model.replicas}` : ''}`],
    ['Longest sequence', () => (model.max_context_tokens ? format.counted(model.max_context_tokens, 'token') : null)],
    ['Quantised to', () => model.quantize ?? null],
    ['Since', () => (model.created_at ? format.ago(model.created_at) : null)],
    ['Digest', () => model.model_digest],
  ]);
  const remove = button('Remove…', () => openRemove(model.name, refresh), {class: 'button small'});
  const element = h('article', {class: 'card model-card'},
    h('div', {class: 'card-head'}, name, status), problem, list.element,
    h('div', {class: 'card-actions'}, button('Chat', () => go(`#/chat/${encodeURIComponent(model.name)}`), {class: 'button small'}),
      button('Scale…', () => openScale(model, feed, refresh), {class: 'button small'}), remove));
  return {element, update: (next) => {
    model = next;
    attr(element, 'data-model', model.name);
    setText(name, model.name);
    setText(status, STATUS[model.status] ?? model.status);
    attr(status, 'class', `pill ${model.status === 'serving' ? 'pill-good' : 'pill-warn'}`);
    setText(problem, model.problem);
    show(problem, model.problem);
    list.update();
    show(remove, !model.own);
  }};
}

function adapterRow({go, refresh}) {
  let card = null;
  const name = h('b', {class: 'wrap'});
  const base = h('span', {class: 'sub'});
  const [generation, digest, root, since] = [h('span'), h('span', {class: 'sub'}), h('span', {class: 'wrap'}), h('span')];
  const element = h('tr', null, h('td', {class: 'cell-name'}, name, base), h('td', {'data-label': 'Generation'}, generation, digest), h('td', null, root), h('td', {class: 'number'}, since),
    h('td', {class: 'cell-action'},
      button('Chat', () => go(`#/chat/${encodeURIComponent(card.id)}`), {class: 'button small'}),
      button('Compare', () => go(`#/chat/${encodeURIComponent(card.base ?? card.parent)}/${encodeURIComponent(card.id)}`), {class: 'button small'}),
      button('Roll back…', () => openRollBack(card, refresh), {class: 'button small'}),
      button('Unload…', () => openUnload(card, refresh), {class: 'button small'})));
  return {element, update: (next) => {
    card = next;
    attr(element, 'data-adapter', card.id);
    setText(name, card.id);
    setText(base, `on ${card.parent}`);
    setText(generation, `generation ${card.generation}`);
    setText(digest, card.view ? format.short(String(card.view.adapter), 17) : '');
    setText(root, format.short(card.root, 24));
    attr(root, 'title', card.root);
    setText(since, format.ago(card.created));
  }};
}

function openRemove(name, done) {
  confirmDialog({
    title: `Remove ${name}?`, action: `Remove ${name}`, danger: true,
    body: h('p', null, 'Requests in progress end, then its nodes stand by again. Requests for it are refused from now on.'),
    act: () => request('DELETE', `/admin/models/${encodeURIComponent(name)}`, {timeout: CHANGE_MS}),
  }).then((removed) => {
    if (removed) toast(`${name} is being removed`, 'good');
    done();
  });
}

function openScale(model, feed, done) {
  const input = h('input', {type: 'number', id: 'scale-nodes', min: 1, max: 1024, step: 1, value: model.nodes ?? model.members.length, required: true});
  const all = h('input', {type: 'checkbox'});
  all.checked = model.own && model.nodes === null;
  const sync = () => { input.disabled = all.checked; };
  all.addEventListener('change', sync);
  sync();
  const free = [...feed.state.view.nodes.values()].filter((node) => node.health.kind === 'standby').map((node) => node.name);
  confirmDialog({
    title: `Scale ${model.name}`, action: 'Scale',
    body: h('div', {class: 'stack'}, h('p', null, `It has ${format.counted(model.members.length, 'node')}. ${free.length ? `Standing by: ${free.join(', ')}.` : 'No node stands by.'}`),
      field('Nodes', input), model.own ? h('label', {class: 'check'}, all, h('span', null, 'All that no other model has')) : null),
    act: () => request('PATCH', `/admin/models/${encodeURIComponent(model.name)}`, {body: {nodes: model.own && all.checked ? null : input.valueAsNumber}, timeout: CHANGE_MS}),
  }).then((scaled) => {
    if (scaled) toast(`${model.name} is being scaled`, 'good');
    done();
  });
}

function openDeploy(done) {
  const input = (props) => h('input', {autocomplete: 'off', spellcheck: 'false', ...props});
  const number = (placeholder) => input({type: 'number', min: 1, max: 1024, step: 1, placeholder});
  const controls = {
    model: input({required: true, placeholder: 'directory, GGUF file or hub id'}),
    name: input({maxlength: 64, placeholder: 'last part of the model'}),
    nodes: number('one per rank'), stages: number('the fewest that fit'), tensor_parallel_size: number('1'), replicas: number('as many as fit'),
    quantize: h('select', null, ['', 'q8_0', 'q6_k', 'q5_k_m', 'q5_1', 'q5_0', 'q4_k_m', 'q4_k_s', 'q4_1', 'q4_0'].map((kind) => h('option', {value: kind}, kind || 'as the files are'))),
    max_context_tokens: h('input', {type: 'number', min: 2, step: 1, placeholder: 'as configured'}),
  };
  for (const [name, control] of Object.entries(controls)) control.id = `deploy-${name.replaceAll('_', '-')}`;
  confirmDialog({
    title: 'Deploy a model', action: 'Deploy',
    body: h('div', {class: 'stack'}, h('p', {class: 'muted'}, 'It is served beside the others, on standbys of its own.'),
      field('Model', controls.model), h('div', {class: 'form-grid'}, field('Name', controls.name), field('Nodes', controls.nodes), field('Stages', controls.stages),
        field('Ranks per stage', controls.tensor_parallel_size), field('Replicas', controls.replicas), field('Quantise to', controls.quantize), field('Longest sequence', controls.max_context_tokens))),
    act: () => {
      const body = {};
      for (const [name, control] of Object.entries(controls)) {
        if (control.value !== '') body[name] = control.type === 'number' ? control.valueAsNumber : control.value;
      }
      return request('POST', '/admin/models', {body, timeout: CHANGE_MS});
    },
  }).then((deployed) => {
    if (deployed) toast('the model is being loaded', 'good');
    done();
  });
}

function openLoad(done) {
  const name = h('input', {id: 'adapter-name', required: true, autocomplete: 'off', spellcheck: 'false', placeholder: 'what clients call it'});
  const path = h('input', {id: 'adapter-path', required: true, autocomplete: 'off', spellcheck: 'false', placeholder: 'below the adapters directory'});
  const replace = h('input', {type: 'checkbox', id: 'adapter-replace'});
  confirmDialog({
    title: 'Load an adapter', action: 'Load',
    body: h('div', {class: 'stack'}, field('Name', name), field('Directory', path, 'with adapter_config.json and adapter_model.safetensors'),
      h('label', {class: 'check'}, replace, h('span', null, 'Replace what is served under this name by a new generation'))),
    act: () => post('/v1/load_lora_adapter', {lora_name: name.value, lora_path: path.value, ...(replace.checked ? {load_inplace: true} : {})}, {timeout: CHANGE_MS}),
  }).then((loaded) => {
    if (loaded) toast('the adapter is served', 'good');
    done();
  });
}

function openUnload(card, done) {
  confirmDialog({
    title: `Unload ${card.id}?`, action: 'Unload', danger: true,
    body: h('p', null, 'Requests under way keep it. From then on its name is unknown, and its earlier generations are gone, too.'),
    act: () => post('/v1/unload_lora_adapter', {lora_name: card.id, expected_generation: card.generation}, {timeout: CHANGE_MS}),
  }).then((unloaded) => {
    if (unloaded) toast(`${card.id} is unloaded`, 'good');
    done();
  });
}

function openRollBack(card, done) {
  const input = h('input', {type: 'number', id: 'adapter-generation', min: 1, step: 1, required: true, value: Math.max(1, card.generation - 1)});
  confirmDialog({
    title: `Serve another generation of ${card.id}`, action: 'Serve it',
    body: h('div', {class: 'stack'}, h('p', null, `Generation ${card.generation} is served. The last ${GENERATIONS_KEPT} are kept, also those that a comparison has held back.`), field('Generation', input)),
    act: () => post('/v1/roll_back_lora_adapter', {lora_name: card.id, to_generation: input.valueAsNumber, expected_generation: card.generation}, {timeout: CHANGE_MS}),
  }).then((rolled) => {
    if (rolled) toast(`${card.id} serves generation ${input.value}`, 'good');
    done();
  });
}
