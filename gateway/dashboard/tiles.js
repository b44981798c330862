// The figures at the top of the cluster's page, each with its last minute.

import {sparkline} from './charts.js';
import {attr, h, setText} from './dom.js';
import * as format from './format.js';

const POINTS = 60;
/** Rates are shown as means of so many seconds. */
const MEAN_S = 5;

function tile(title, classes, hint) {
  const value = h('span', {class: 'tile-value'});
  const more = h('span', {class: 'tile-more'});
  const spark = sparkline(classes, {points: POINTS});
  const element = h('section', {class: 'tile', 'aria-label': title}, h('h2', {class: 'tile-title', title: hint}, title), h('p', {class: 'tile-line'}, value, more), spark.element);
  return {element, value, more, spark};
}

const mean = (values) => {
  const known = values.filter((value) => value !== null && value !== undefined);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
};

/** Tokens per second, from the gateway's seconds where it keeps them, else from the scheduler's counters. */
function throughput(state) {
  const {live, view} = state;
  if (!live?.history) {
    const samples = view.samples.slice(-POINTS);
    return {generated: samples.map((one) => one.generated), prompt: samples.map((one) => one.prompt), now: samples[samples.length - 1]};
  }
  // The second that is under way is not over yet. A second that is not listed had nothing.
  const last = Math.floor(live.now) - 1;
  const seconds = new Map(live.history.map((entry) => [entry.t, entry]));
  const list = (name) => Array.from({length: POINTS}, (_, at) => seconds.get(last - POINTS + 1 + at)?.[name] ?? 0);
  const [generated, prompt] = [list('generated_tokens'), list('prompt_tokens')];
  return {generated, prompt, now: {generated: mean(generated.slice(-MEAN_S)), prompt: mean(prompt.slice(-MEAN_S))}};
}

/** All tiles; `update(state)`. */
export function tiles() {
  const tokens = tile('Tokens per second', ['s1', 's2'], 'Generated and prompt tokens, mean of the last seconds');
  const requests = tile('Requests', ['s1', 's3'], 'Sequences that are computed, and that wait for room');
  const ttft = tile('Time to first token', ['s1', 's4'], 'Half, nine tenths and 99 in 100 of the last minute’s requests were faster');
  const itl = tile('Between tokens', ['s1', 's4'], 'Half, nine tenths and 99 in 100 of the last minute’s pauses were shorter');
  const kv = tile('KV cache', ['s1'], 'Share of blocks that are in use');
  const prefix = tile('Prefix cache', ['s1'], 'Share of prompt tokens that were found computed already');
  const all = [tokens, requests, ttft, itl, kv, prefix];
  const element = h('div', {class: 'tiles'}, all.map((one) => one.element));

  function latency(view, state, name) {
    const now = state.live?.[`${name}_ms`];
    setText(view.value, now?.count ? format.ms(now.p50) : '–');
    setText(view.more, !state.live ? 'not told by this gateway' : now?.count ? `p90 ${format.ms(now.p90)} · p99 ${format.ms(now.p99)}` : 'none in the last minute');
    const list = state.latencies.slice(-POINTS);
    view.spark.update([list.map((one) => one[name]?.p50 ?? null), list.map((one) => one[name]?.p99 ?? null)]);
  }

  return {element, update(state) {
    const {view} = state;
    const samples = view.samples.slice(-POINTS);
    const last = samples[samples.length - 1];
    const rates = throughput(state);
    setText(tokens.value, rates.now ? format.number(rates.now.generated) : '–');
    setText(tokens.more, rates.now ? `generated · ${format.number(rates.now.prompt)} prompt` : '');
    tokens.spark.update([rates.generated, rates.prompt]);
    const counters = view.cluster?.counters;
    setText(requests.value, counters ? format.count(counters.running) : '–');
    setText(requests.more, counters ? `running · ${format.count(counters.waiting)} waiting` : '');
    attr(requests.element, 'data-tone', counters?.waiting > 0 ? 'warn' : null);
    requests.spark.update([samples.map((one) => one.running), samples.map((one) => one.waiting)]);
    latency(ttft, state, 'ttft');
    latency(itl, state, 'itl');
    setText(kv.value, format.percent(last?.kv ?? null));
    setText(kv.more, last ? `${format.count(last.kvBlocks[1])} of ${format.count(last.kvBlocks[0])} blocks` : '');
    kv.spark.update([samples.map((one) => one.kv)], 1);
    setText(prefix.value, format.percent(last?.hits ?? last?.hitsEver ?? null));
    setText(prefix.more, last ? (last.hits === null ? 'since the scheduler leads' : `now · ${format.percent(last.hitsEver)} in all`) : '');
    prefix.spark.update([samples.map((one) => one.hits)], 1);
  }};
}
