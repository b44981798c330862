// Requests: those that are in flight, and where the time of the last ones went.

import {get} from './api.js';
import {bar, legend} from './charts.js';
import {attr, h, keyed, setText, show} from './dom.js';
import * as format from './format.js';
import {poll} from './poll.js';

const PHASES = [['queue', 'queued'], ['prefill', 'prompt'], ['decode', 'answer']];
const STAGE_PARTS = [['compute', 'computing', 'compute_us'], ['exchange', 'exchanging', 'collective_us'], ['send', 'sending', 'send_us'], ['wait', 'waiting', 'wait_us']];
const STATES = {waiting: '◌ waiting', prefill: '◔ prompt', decode: '● answer', preempted: '‖ preempted'};
const REASONS = {stop: '✓ stop', length: '✓ length', failed: '✕ failed', cancelled: '– cancelled'};

/** Makes the page. */
export function requestsPage() {
  const head = (titles) => h('thead', null, h('tr', null, titles.map((title) => h('th', {scope: 'col'}, title))));
  const summary = h('p', {class: 'summary', 'aria-live': 'polite'});
  const notice = h('p', {class: 'notice', hidden: true});
  const flying = h('tbody');
  const noneFlying = h('p', {class: 'empty'}, 'No request is in flight.');
  const ended = h('table', {class: 'list requests'}, head(['Request', 'Ended', 'Tokens', 'Where the time went', 'First token', 'In all']));
  const noneEnded = h('p', {class: 'empty'}, 'No request has ended yet. Try one in the chat.');
  const scaleText = h('span', {class: 'muted'});
  const body = h('div', null,
    h('section', {class: 'card', 'aria-labelledby': 'flying-title'},
      h('div', {class: 'card-head'}, h('h2', {id: 'flying-title'}, 'In flight')), noneFlying,
      h('table', {class: 'list flying'}, head(['Request', 'State', 'Prompt', 'Answer', 'Queued', 'Age']), flying)),
    h('section', {class: 'card', 'aria-labelledby': 'ended-title'},
      h('div', {class: 'card-head'}, h('h2', {id: 'ended-title'}, 'Recent'), scaleText, legend(PHASES)), noneEnded, ended));
  const element = h('div', {class: 'page page-requests'}, h('div', {class: 'page-head'}, h('h1', null, 'Requests'), summary), notice, body);
  let scale = 1;

  const poller = poll(async (signal) => take(await get('/admin/requests', {signal})), {onError(error) {
    const missing = error.status === 404 || error.status === 405;
    setText(notice, missing ? 'This gateway does not tell of single requests.' : `Requests cannot be shown: ${error.message}`);
    show(notice, true);
    show(body, !missing);
  }});

  function take({in_flight: inFlight = [], recent = []}) {
    show(notice, false);
    show(body, true);
    const waiting = inFlight.filter((request) => request.state === 'waiting').length;
    setText(summary, `${inFlight.length - waiting} running, ${waiting} waiting, ${recent.length} ended lately`);
    show(noneFlying, inFlight.length === 0);
    show(flying.parentNode, inFlight.length > 0);
    keyed(flying, inFlight, (request) => request.id, flyingRow);
    show(noneEnded, recent.length === 0);
    show(ended, recent.length > 0);
    // One scale for all, so that lengths can be compared; a rounded one, so that it does not jump with every request.
    scale = roundUp(Math.max(1, ...recent.map((request) => request.e2e_ms ?? 0)));
    setText(scaleText, recent.length ? `full width is ${format.ms(scale)}` : '');
    keyed(ended, recent, (request) => request.id, () => endedRow(() => scale));
  }

  return {element, show: () => poller.start(), hide: () => poller.stop()};
}

function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= value);
}

function requestName(request) {
  return [h('code', {title: request.id}, format.short(request.id.replace(/^[a-z]+-/, ''), 10)), h('span', {class: 'sub'}, request.adapter ?? request.model ?? '')];
}

function flyingRow(first) {
  const state = h('span', {class: 'request-state'});
  const replica = h('span', {class: 'sub'});
  const prompt = bar('wide');
  const [promptText, answer, queued, age] = [h('span', {class: 'sub'}), h('span'), h('span'), h('span')];
  const element = h('tr', null, h('td', {class: 'cell-name'}, requestName(first)), h('td', null, state, replica), h('td', {class: 'cell-bar'}, prompt.element, promptText),
    h('td', {class: 'number', 'data-label': 'Answer'}, answer), h('td', {class: 'number', 'data-label': 'Queued'}, queued), h('td', {class: 'number', 'data-label': 'Age'}, age));
  return {element, update: (request) => {
    attr(state, 'class', `request-state state-${request.state}`);
    setText(state, STATES[request.state] ?? request.state);
    setText(replica, request.replica === null || request.replica === undefined ? '' : `replica ${request.replica}`);
    const computed = Math.min(request.computed_tokens, request.prompt_tokens);
    prompt.update([{name: 'prefill', value: computed, text: `${computed} of ${request.prompt_tokens} prompt tokens computed`}], request.prompt_tokens);
    setText(promptText, `${format.count(computed)} of ${format.counted(request.prompt_tokens, 'token')}`);
    setText(answer, format.counted(request.generated_tokens, 'token'));
    setText(queued, format.ms(request.queue_ms));
    setText(age, format.ms(request.age_ms));
  }};
}

function endedRow(scale) {
  let request = null;
  const details = h('td', {colspan: 6});
  const detailsRow = h('tr', {class: 'details', hidden: true}, details);
  const toggle = h('button', {type: 'button', class: 'disclose', 'aria-expanded': 'false', onclick: () => {
    const open = detailsRow.hidden;
    show(detailsRow, open);
    attr(toggle, 'aria-expanded', String(open));
    if (open) details.replaceChildren(receiptView(request));
  }});
  const [when, reason, tokens, cached, first, all] = [h('span', {class: 'sub'}), h('span'), h('span'), h('span', {class: 'sub'}), h('span'), h('span')];
  const time = bar('wide tall');
  const timeText = h('span', {class: 'sub'});
  const element = h('tbody', null, h('tr', null, h('td', {class: 'cell-name'}, toggle), h('td', null, reason, when), h('td', {'data-label': 'Tokens'}, tokens, cached),
    h('td', {class: 'cell-bar'}, time.element, timeText), h('td', {class: 'number', 'data-label': 'First token'}, first), h('td', {class: 'number', 'data-label': 'In all'}, all)), detailsRow);
  return {element, update: (next) => {
    if (!request) toggle.replaceChildren(...requestName(next));
    const {receipt} = next;
    request = next;
    attr(element, 'data-request', next.id);
    setText(reason, REASONS[next.reason] ?? next.reason);
    attr(reason, 'class', `reason-${next.reason}`);
    setText(when, format.ago(next.finished));
    setText(tokens, receipt ? `${format.count(receipt.prompt_tokens)} + ${format.count(receipt.generated_tokens)}` : '–');
    const extras = receipt ? [receipt.cached_tokens ? `${format.count(receipt.cached_tokens)} cached` : '', receipt.preemptions ? format.counted(receipt.preemptions, 'preemption') : '', receipt.replays ? format.counted(receipt.replays, 'replay') : ''] : [next.error ?? ''];
    setText(cached, extras.filter(Boolean).join(' · '));
    const parts = receipt ? PHASES.map(([name, word]) => ({name, value: receipt[`${name}_ms`], text: `${word} ${format.ms(receipt[`${name}_ms`])}`})) : [{name: 'decode', value: next.e2e_ms, text: `in all ${format.ms(next.e2e_ms)}`}];
    time.update(parts, scale());
    setText(timeText, receipt ? parts.map((part) => part.text).join(' · ') : 'no receipt');
    setText(first, format.ms(next.ttft_ms));
    setText(all, format.ms(next.e2e_ms));
  }};
}

/** A receipt in full: what each stage did meanwhile. */
export function receiptView(request) {
  const {receipt} = request;
  const stages = receipt?.stages ?? [];
  const whole = Math.max(1, ...stages.map((stage) => STAGE_PARTS.reduce((sum, [, , field]) => sum + (stage[field] ?? 0), 0)));
  const lines = stages.map((stage, index) => {
    const time = bar('wide tall');
    const parts = STAGE_PARTS.map(([name, word, field]) => ({name, value: stage[field] ?? 0, text: `${word} ${format.ms((stage[field] ?? 0) / 1000)}`}));
    time.update(parts, whole);
    return h('div', {class: 'receipt-stage'}, h('b', null, `stage ${index}`), h('div', null, time.element, h('span', {class: 'sub'}, parts.map((part) => part.text).join(' · '))));
  });
  return h('div', {class: 'receipt'},
    h('p', {class: 'sub'}, `Request ${request.id}${request.model ? `, ${request.model}` : ''}`),
    request.error ? h('p', {class: 'problem'}, request.error) : null,
    lines.length ? [legend(STAGE_PARTS.map(([name, word]) => [name, word])), lines] : h('p', {class: 'muted'}, 'The stages’ shares of it are not known.'));
}
