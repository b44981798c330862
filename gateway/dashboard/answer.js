// One answer of the playground: sent, streamed into the page, measured.

import {events} from './api.js';
import {bar} from './charts.js';
import {attr, h, setText, show} from './dom.js';
import * as format from './format.js';

const PHASES = [['queue', 'queued'], ['prefill', 'prompt'], ['decode', 'answer']];

/**
 * Streams the answer to `body` into an element of its own. `done` resolves to the answer's text, or to `null` where there is none;
 * it never rejects: what went wrong stands in the element.
 */
export function streamAnswer(body, signal, onGrow) {
  const thoughts = h('div', {class: 'text'});
  const reasoning = h('details', {class: 'reasoning', open: true, hidden: true}, h('summary', null, 'Reasoning'), thoughts);
  const content = h('div', {class: 'text answer-text'});
  const problem = h('p', {class: 'problem', role: 'alert', hidden: true});
  const stats = h('p', {class: 'stats'});
  const time = bar('wide');
  const receipt = h('div', {class: 'answer-receipt', hidden: true}, time.element);
  const element = h('div', {class: 'message assistant streaming', 'aria-busy': 'true'},
    h('div', {class: 'message-role'}, body.model), reasoning, content, problem, stats, receipt);
  const figures = {sent: performance.now(), first: null, last: null, pieces: 0, usage: null, finish: null, seed: null};
  let [answer, thought, drawn] = ['', '', false];

  // Tokens may come faster than the screen shows them.
  const drawSoon = () => {
    if (drawn) return;
    drawn = true;
    requestAnimationFrame(draw);
  };
  function draw() {
    drawn = false;
    setText(content, answer);
    setText(thoughts, thought);
    show(reasoning, thought);
    setText(stats, statsText(figures, signal.aborted));
    onGrow();
  }

  async function run() {
    try {
      const onOpen = (response) => { figures.seed = response.headers.get('x-ashlar-seed'); };
      for await (const chunk of events('POST', '/v1/chat/completions', {body, signal, onOpen})) {
        const choice = chunk.choices?.[0];
        const [text, reason] = [choice?.delta?.content, choice?.delta?.reasoning_content];
        if (text || reason) {
          figures.last = performance.now();
          figures.first ??= figures.last;
          figures.pieces += 1;
        }
        if (text) answer += text;
        if (reason) thought += reason;
        if (choice?.finish_reason) figures.finish = choice.finish_reason;
        if (chunk.usage) figures.usage = chunk.usage;
        if (chunk.ashlar) drawReceipt(chunk.ashlar);
        drawSoon();
      }
    } catch (error) {
      if (!signal.aborted) {
        setText(problem, error.message);
        show(problem, true);
      }
    }
    attr(element, 'aria-busy', null);
    element.classList.remove('streaming');
    draw();
    return answer === '' && thought === '' ? null : answer;
  }

  function drawReceipt(given) {
    const parts = PHASES.map(([name, word]) => ({name, value: given[`${name}_ms`], text: `${word} ${format.ms(given[`${name}_ms`])}`}));
    time.update(parts, parts.reduce((sum, part) => sum + part.value, 0));
    const more = [given.preemptions ? format.counted(given.preemptions, 'preemption') : '', given.replays ? format.counted(given.replays, 'replay') : ''];
    receipt.append(h('span', {class: 'sub'}, [...parts.map((part) => part.text), ...more].filter(Boolean).join(' · ')));
    show(receipt, true);
  }

  return {element, done: run()};
}

function statsText({sent, first, last, pieces, usage, finish, seed}, stopped) {
  const parts = [];
  if (first !== null) parts.push(`first token ${format.ms(first - sent)}`);
  const tokens = usage?.completion_tokens ?? pieces;
  if (first !== null && last - first > 20 && tokens > 1) parts.push(`${format.number((tokens - 1) / ((last - first) / 1000))} tokens/s`);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    parts.push(`${format.count(usage.prompt_tokens)} prompt${cached ? ` (${format.count(cached)} cached)` : ''} + ${format.counted(usage.completion_tokens, 'token')}`);
  }
  if (stopped) parts.push('stopped');
  else if (finish) parts.push(finish === 'length' ? 'ended at its longest' : `ended by ${finish}`);
  if (seed && usage) parts.push(`seed ${seed}`);
  return parts.join(' · ');
}
