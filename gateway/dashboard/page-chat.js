// The playground: a conversation with a model or an adapter, or with two of them side by side.

import {get} from './api.js';
import {streamAnswer} from './answer.js';
import {openCode} from './code.js';
import {attr, button, field, h, setText, show} from './dom.js';
import {recall, remember} from './settings.js';

const DEFAULTS = {temperature: '', top_p: '', max_tokens: '', seed: '', system: ''};

/** Makes the page. */
export function chatPage() {
  const kept = {...DEFAULTS, ...recall('chat', {})};
  const number = (name, props) => h('input', {type: 'number', value: kept[name], placeholder: 'model’s', id: `chat-${name}`, oninput: keep, ...props});
  const controls = {
    temperature: number('temperature', {min: 0, max: 2, step: 'any'}),
    top_p: number('top_p', {min: 0, max: 1, step: 'any'}),
    max_tokens: number('max_tokens', {min: 1, step: 1, placeholder: 'all that fit'}),
    seed: number('seed', {min: 0, step: 1, placeholder: 'random'}),
    system: h('textarea', {rows: 3, placeholder: 'none', id: 'chat-system', oninput: keep}),
  };
  controls.system.value = kept.system;
  const panes = [pane('Model'), pane('Compare with')];
  const compare = h('input', {type: 'checkbox', id: 'chat-compare', onchange: () => compareWith(compare.checked)});
  const prompt = h('textarea', {rows: 2, id: 'chat-prompt', placeholder: 'Ask something', 'aria-label': 'Message', onkeydown: (event) => {
    if (event.key === 'Escape') current?.abort('stop');
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  }});
  const sendButton = h('button', {class: 'button primary', id: 'chat-send'}, 'Send');
  const stopButton = button('Stop', () => current?.abort('stop'), {class: 'button danger', id: 'chat-stop', hidden: true});
  const composer = h('form', {class: 'composer', onsubmit: (event) => { event.preventDefault(); send(); }}, prompt, sendButton, stopButton);
  const notice = h('p', {class: 'problem', role: 'alert', hidden: true});
  const element = h('div', {class: 'page page-chat'},
    h('div', {class: 'page-head'}, h('h1', null, 'Chat'), h('div', {class: 'head-actions'},
      h('label', {class: 'check'}, compare, h('span', null, 'Side by side')),
      button('Show as code', () => openCode(bodyFor(panes[0], prompt.value.trim() || lastQuestion(), false)), {class: 'button small'}),
      button('New chat', reset, {class: 'button small'}))),
    h('div', {class: 'chat'},
      h('div', {class: 'chat-main'}, notice, h('div', {class: 'panes'}, panes.map((one) => one.element)), composer),
      h('details', {class: 'card chat-settings', open: window.matchMedia('(min-width: 900px)').matches}, h('summary', null, 'Settings'),
        field('System prompt', controls.system), field('Temperature', controls.temperature, '0 takes the likeliest token'), field('Top p', controls.top_p),
        field('Longest answer, in tokens', controls.max_tokens), field('Seed', controls.seed, 'the same request with the same seed gives the same answer'))));
  let current = null;

  function pane(label) {
    const picker = h('select', {'aria-label': label, class: 'picker'});
    const messages = h('div', {class: 'messages', role: 'log', 'aria-label': 'Conversation', tabindex: '0'}, emptyText());
    return {picker, messages, transcript: [], element: h('section', {class: 'card pane'}, h('div', {class: 'pane-head'}, picker), messages)};
  }

  function emptyText() {
    return h('p', {class: 'empty'}, 'Nothing said yet. Enter sends, Shift and Enter begin a new line.');
  }

  function keep() {
    remember('chat', Object.fromEntries(Object.entries(controls).map(([name, control]) => [name, control.value])));
  }

  function compareWith(on) {
    compare.checked = on;
    show(panes[1].element, on);
    attr(element, 'data-compare', on ? 'true' : null);
    const [first, second] = panes;
    if (on && first.transcript.length && !second.transcript.length) {
      second.transcript.push(...first.transcript);
      second.messages.replaceChildren(h('p', {class: 'empty'}, 'Goes on from the conversation beside it.'));
    }
  }

  function reset() {
    current?.abort('reset');
    for (const one of panes) {
      one.transcript.length = 0;
      one.messages.replaceChildren(emptyText());
    }
    show(notice, false);
    prompt.focus();
  }

  function lastQuestion() {
    return panes[0].transcript.findLast((message) => message.role === 'user')?.content ?? 'What is 12 + 34?';
  }

  /** The request that asks a pane's model `question` after what was said there. */
  function bodyFor(one, question, withHistory = true) {
    const messages = withHistory ? [...one.transcript] : [];
    if (controls.system.value.trim()) messages.unshift({role: 'system', content: controls.system.value});
    messages.push({role: 'user', content: question});
    const body = {model: one.picker.value, messages, stream: true};
    for (const name of ['temperature', 'top_p', 'max_tokens', 'seed']) {
      if (controls[name].value !== '') body[name] = controls[name].valueAsNumber;
    }
    return body;
  }

  async function send() {
    const question = prompt.value.trim();
    const wrong = Object.values(controls).find((control) => !control.checkValidity());
    if (wrong) return wrong.reportValidity();
    if (!question || current || !panes[0].picker.value) return undefined;
    prompt.value = '';
    current = new AbortController();
    show(sendButton, false);
    show(stopButton, true);
    const asked = panes.filter((one) => !one.element.hidden);
    const stop = current;
    await Promise.all(asked.map((one) => ask(one, question, stop.signal)));
    if (current === stop) current = null;
    show(sendButton, true);
    if (document.activeElement === stopButton) prompt.focus();
    show(stopButton, false);
    return undefined;
  }

  async function ask(one, question, signal) {
    const body = {...bodyFor(one, question), stream_options: {include_usage: true}, ashlar_receipt: true};
    if (!one.transcript.length) one.messages.replaceChildren();
    const bottom = () => { one.messages.scrollTop = one.messages.scrollHeight; };
    // Who has scrolled up wants to read, and is left there.
    const follow = () => { if (one.messages.scrollHeight - one.messages.scrollTop - one.messages.clientHeight < 120) bottom(); };
    one.messages.append(h('div', {class: 'message user'}, h('div', {class: 'message-role'}, 'you'), h('div', {class: 'text'}, question)));
    const answer = streamAnswer(body, signal, follow);
    one.messages.append(answer.element);
    bottom();
    const text = await answer.done;
    if (signal.reason === 'reset') return;
    follow();
    // A question that came to nothing is not part of what the model is told next.
    if (text !== null) one.transcript.push({role: 'user', content: question}, {role: 'assistant', content: text});
  }

  async function loadModels(wanted, other) {
    try {
      const {data} = await get('/v1/models');
      const names = data.map((card) => [card.id, card.parent ? `${card.id} (adapter)` : card.id]);
      panes.forEach((one, index) => {
        const choice = [wanted, other][index] || one.picker.value || recall(`chat.model${index}`, '');
        one.picker.replaceChildren(...names.map(([id, text]) => h('option', {value: id}, text)));
        one.picker.value = names.some(([id]) => id === choice) ? choice : names[Math.min(index, names.length - 1)]?.[0] ?? '';
      });
      show(notice, false);
    } catch (error) {
      setText(notice, `The models cannot be listed: ${error.message}`);
      show(notice, true);
    }
  }
  panes.forEach((one, index) => one.picker.addEventListener('change', () => remember(`chat.model${index}`, one.picker.value)));
  compareWith(false);

  return {element, show([wanted, other]) {
    loadModels(wanted, other);
    if (other) compareWith(true);
  }};
}
