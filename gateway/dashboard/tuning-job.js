// One fine-tuning job: how far it is, its curves, its events, what it has made.

import {ApiError, download, events, get, post} from './api.js';
import {bar, lineChart} from './charts.js';
import {confirmDialog, toast} from './dialog.js';
import {attr, button, facts, h, keyed, setText, show} from './dom.js';
import * as format from './format.js';
import {problemsOf} from './jsonl.js';
import {problemList} from './tuning-new.js';

const POINTS_MAX = 20_000;
const EVENTS_MAX = 300;
const RETRY_MS = 2000;
const ENDED = ['succeeded', 'failed', 'cancelled'];

/** Words and shapes of a job's status. */
export const JOB_STATUS = {
  validating_files: '◌ checking files', queued: '◌ queued', running: '● running', paused: '‖ paused',
  succeeded: '✓ succeeded', failed: '✕ failed', cancelled: '– cancelled',
};

/** The tone of a status, for its pill. */
export function jobTone(status) {
  return {succeeded: 'good', failed: 'bad', running: 'busy', paused: 'warn'}[status] ?? 'idle';
}

/** The view of a job; `show(id)` begins to follow it, `hide()` ends that, `update(job)` shows a newer state of it. */
export function jobView({go, refresh}) {
  const parts = build({go, act, cancel, save});
  let [id, job, follower, rates] = [null, null, null, []];
  let curves = null;
  let list = [];
  let drawn = false;

  function show_(next) {
    if (next === id && follower) return;
    hide();
    id = next;
    job = null;
    rates = [];
    curves = {loss: [], validLoss: [], accuracy: [], validAccuracy: [], rate: [], norm: [], lastStep: 0};
    list = [];
    parts.clear();
    draw();
    follower = new AbortController();
    follow(id, follower.signal);
  }

  function hide() {
    follower?.abort();
    follower = null;
  }

  /** Follows the events until the job has ended. A connection that breaks is taken up after the last event that came. */
  async function follow(of, signal) {
    let after = '';
    while (!signal.aborted) {
      try {
        for await (const event of events('GET', `/v1/fine_tuning/jobs/${of}/events?stream=true${after ? `&after=${after}` : ''}`, {signal})) {
          after = event.id;
          takeEvent(event);
        }
        if (ENDED.includes((await get(`/v1/fine_tuning/jobs/${of}`, {signal})).status)) return;
      } catch (error) {
        if (signal.aborted) return;
        if (error instanceof ApiError && error.status === 404) return;
      }
      await new Promise((resolve) => { setTimeout(resolve, RETRY_MS); });
    }
  }

  function takeEvent(event) {
    list.unshift(event);
    if (list.length > EVENTS_MAX) list.pop();
    const {data} = event;
    if (data && data.step !== undefined) takeMetrics(data);
    if (/^Checkpoint created/.test(event.message)) loadCheckpoints();
    if (drawn) return;
    drawn = true;
    requestAnimationFrame(() => {
      drawn = false;
      draw();
    });
  }

  function takeMetrics(data) {
    const add = (points, y) => {
      if (typeof y !== 'number') return;
      // A step that is told again after an interruption takes the place of what was told before.
      while (points.length && points[points.length - 1][0] >= data.step) points.pop();
      points.push([data.step, y]);
      if (points.length > POINTS_MAX) points.shift();
    };
    add(curves.loss, data.train_loss);
    add(curves.validLoss, data.valid_loss);
    add(curves.accuracy, data.train_mean_token_accuracy ?? data.train_accuracy);
    add(curves.validAccuracy, data.valid_mean_token_accuracy ?? data.valid_accuracy);
    add(curves.rate, data.learning_rate);
    add(curves.norm, data.gradient_norm);
  }

  function draw() {
    parts.drawCurves(curves);
    parts.drawEvents(list);
  }

  function update(next) {
    if (next.id !== id) return;
    const was = job?.status;
    job = next;
    const now = performance.now() / 1000;
    const trained = job.ashlar?.trained_tokens;
    const last = rates[rates.length - 1];
    if (typeof trained === 'number' && (!last || trained !== last.trained)) rates.push({now, trained});
    while (rates.length > 2 && rates[1].now < now - 15) rates.shift();
    const span = rates.length > 1 ? rates[rates.length - 1].now - rates[0].now : 0;
    parts.drawJob(job, span > 0.5 && now - rates[rates.length - 1].now < 15 ? (rates[rates.length - 1].trained - rates[0].trained) / span : null);
    if (was !== job.status || !was) loadCheckpoints();
  }

  async function loadCheckpoints() {
    const of = id;
    try {
      const {data} = await get(`/v1/fine_tuning/jobs/${of}/checkpoints?limit=100`);
      if (of === id) parts.drawCheckpoints(data);
    } catch {
      // They are asked for again with the next change of the job.
    }
  }

  async function act(action) {
    try {
      update(await post(`/v1/fine_tuning/jobs/${id}/${action}`, {}, {timeout: 60_000}));
    } catch (error) {
      toast(error.message, 'bad');
    }
    refresh();
  }

  function cancel() {
    confirmDialog({title: 'Cancel this job?', action: 'Cancel the job', danger: true, body: h('p', null, 'It ends for good. What it has learnt since its last checkpoint is lost.'), act: () => post(`/v1/fine_tuning/jobs/${id}/cancel`)}).then(refresh);
  }

  function save(path, name) {
    download(path, name).catch((error) => toast(error.message, 'bad'));
  }

  return {element: parts.element, show: show_, hide, update, id: () => id};
}

function build({go, act, cancel, save}) {
  const title = h('h2', {class: 'wrap'});
  const status = h('span', {class: 'pill', role: 'status'});
  const pause = button('Pause', () => act('pause'), {class: 'button small'});
  const resume = button('Resume', () => act('resume'), {class: 'button small primary'});
  const stop = button('Cancel…', cancel, {class: 'button small'});
  const chat = button('Compare in the chat', null, {class: 'button small primary'});
  const onModels = button('On the models page', null, {class: 'button small'});
  const progress = bar('wide tall');
  const progressText = h('p', {class: 'hint job-progress'});
  const problem = h('div', {class: 'report', hidden: true});
  const loss = lineChart({title: 'Loss', format: format.precise, tick: format.tick});
  const accuracy = lineChart({title: 'Accuracy', format: format.percent, tick: format.percentTick});
  const rate = lineChart({title: 'Learning rate', format: format.precise, tick: format.tick, height: 120, fromZero: true});
  const norm = lineChart({title: 'Gradient norm', format: format.precise, tick: format.tick, height: 120, fromZero: true});
  const list = facts([
    ['Model', (job) => job.model], ['Method', (job) => (job.method?.type === 'dpo' ? `DPO, beta ${job.method.dpo.hyperparameters.beta}` : 'supervised')],
    ['Epochs', (job) => String(job.hyperparameters?.n_epochs)], ['Batch size', (job) => String(job.hyperparameters?.batch_size)],
    ['Learning rate', (job) => (job.ashlar?.learning_rate ? `${format.tick(job.ashlar.learning_rate)} (times ${job.hyperparameters?.learning_rate_multiplier})` : `times ${job.hyperparameters?.learning_rate_multiplier}`)],
    ['LoRA', (job) => (job.ashlar?.lora ? `rank ${job.ashlar.lora.r}, alpha ${job.ashlar.lora.alpha}` : job.ashlar?.full ? 'all weights' : null)],
    ['Seed', (job) => (job.seed === null ? null : String(job.seed))],
    ['Examples', (job) => (job.ashlar?.data ? `${format.count(job.ashlar.data.examples)} in ${format.counted(job.ashlar.data.samples, 'sample')}` : null)],
    ['Tokens per epoch', (job) => (job.ashlar?.data ? `${format.count(job.ashlar.data.tokens)}, ${format.count(job.ashlar.data.target_tokens)} learnt` : null)],
    ['Training file', (job) => job.training_file], ['Validation file', (job) => job.validation_file],
    ['Created', (job) => format.clock(job.created_at)], ['Ended', (job) => (job.finished_at ? format.clock(job.finished_at) : null)],
    ['Promotion', (job) => job.ashlar?.promotion?.reason ?? (job.ashlar?.promotion ? 'being compared with what is served' : null)],
  ]);
  const warnings = h('ul', {class: 'warnings', hidden: true});
  const files = h('ul', {class: 'files'});
  const noFiles = h('p', {class: 'muted'}, 'None yet.');
  const checkpoints = h('tbody');
  const checkpointTable = h('table', {class: 'list'}, h('thead', null, h('tr', null, ['Step', 'Model', 'Loss', 'Validation'].map((word) => h('th', {scope: 'col'}, word)))), checkpoints);
  const noCheckpoints = h('p', {class: 'muted'}, 'None yet.');
  const eventList = h('ol', {class: 'log events'});
  const chartBox = h('div', {class: 'charts'}, [loss, accuracy, rate, norm].map((chart) => h('div', {class: 'card'}, chart.element)));
  const element = h('div', {class: 'job'},
    h('section', {class: 'card'}, h('div', {class: 'card-head'}, title, status), progress.element, progressText, problem,
      h('div', {class: 'card-actions'}, pause, resume, stop, chat, onModels)),
    chartBox,
    h('div', {class: 'columns even'},
      h('section', {class: 'card'}, h('h2', null, 'Settings and data'), warnings, list.element),
      h('section', {class: 'card'}, h('h2', null, 'Results'), noFiles, files, h('h3', null, 'Checkpoints'), noCheckpoints, checkpointTable)),
    h('section', {class: 'card'}, h('h2', null, 'Events'), eventList));
  const names = new Map();
  let [model, base, drawnJob] = [null, null, null];
  chat.addEventListener('click', () => go(`#/chat/${encodeURIComponent(base)}/${encodeURIComponent(model)}`));
  onModels.addEventListener('click', () => go(`#/models/${encodeURIComponent(model)}`));

  function drawJob(job, tokensPerSecond) {
    const {steps = 0, total_steps: total} = job.ashlar ?? {};
    [model, base] = [job.fine_tuned_model, job.model];
    setText(title, job.fine_tuned_model ?? job.user_provided_suffix ?? job.id);
    attr(title, 'title', job.id);
    setText(status, JOB_STATUS[job.status] ?? job.status);
    attr(status, 'class', `pill pill-${jobTone(job.status)}`);
    progress.update([{name: 'compute', value: steps, text: `${steps} of ${total ?? 'an unknown number of'} steps`}], total ?? 1);
    const left = job.status === 'running' && job.estimated_finish ? `about ${format.duration(job.estimated_finish - Date.now() / 1000)} left, ends at ${format.clock(job.estimated_finish)}` : null;
    setText(progressText, [total ? `step ${format.count(steps)} of ${format.count(total)}` : null, `${format.counted(job.ashlar?.trained_tokens ?? 0, 'token')} trained`,
      tokensPerSecond && job.status === 'running' ? `${format.number(tokensPerSecond)} tokens/s` : null, left].filter(Boolean).join(' · '));
    const ended = ENDED.includes(job.status);
    show(pause, !ended && job.status !== 'paused');
    show(resume, job.status === 'paused');
    show(stop, !ended);
    show(chat, job.fine_tuned_model && job.status === 'succeeded');
    show(onModels, job.fine_tuned_model && job.status === 'succeeded');
    drawProblem(job.error);
    list.update(job);
    const told = job.ashlar?.data?.warnings ?? [];
    show(warnings, told.length);
    keyed(warnings, told, (text) => text, (text) => ({element: h('li', null, `! ${text}`)}));
    // Of one that failed at once there is nothing to draw.
    show(chartBox, !ended || steps > 0);
    drawnJob = job;
    nameFiles(job.result_files ?? []);
    const made = (job.result_files ?? []).filter((file) => names.get(file)).map((file) => [file, names.get(file), `/v1/files/${file}/content`]);
    // Adapters are among the result files, but for jobs of older releases.
    const adapterFiles = job.ashlar?.adapter && made.length === job.result_files?.length ? ['adapter_model.safetensors', 'adapter_config.json'] : [];
    for (const file of adapterFiles.filter((one) => !made.some(([, name]) => name === one))) made.push([file, file, `/v1/fine_tuning/jobs/${job.id}/adapter/${file}`]);
    show(noFiles, made.length === 0);
    keyed(files, made, ([key]) => `${job.id} ${key}`, ([, name, path]) => ({element: h('li', null, button(`Download ${name}`, () => save(path, name), {class: 'link-button'}))}));
  }

  /** Files are listed under their names once these are known. */
  async function nameFiles(files_) {
    for (const file of files_.filter((one) => !names.has(one))) {
      names.set(file, null);
      const {filename} = await get(`/v1/files/${file}`).catch(() => ({filename: file}));
      names.set(file, filename);
      if (drawnJob?.result_files?.includes(file)) drawJob(drawnJob, null);
    }
  }

  function drawProblem(error) {
    show(problem, error);
    if (!error || problem.dataset.shown === error.message) return;
    problem.dataset.shown = error.message;
    const lines = problemsOf(error.message);
    const more = Number(/; and (\d+) more$/.exec(error.message)?.[1] ?? 0);
    problem.replaceChildren(h('p', {class: 'problem', role: 'alert'}, `✕ ${lines.length ? error.message.slice(0, error.message.search(/: line \d+: /)) : error.message}`, error.code ? h('span', {class: 'sub'}, ` ${error.code}`) : null),
      lines.length ? problemList(lines, lines.length + more) : '');
  }

  return {
    element, drawJob,
    clear() {
      setText(title, '');
      setText(status, 'loading');
      setText(progressText, '');
      for (const one of [pause, resume, stop, chat, onModels, problem]) show(one, false);
      drawnJob = null;
      delete problem.dataset.shown;
      this.drawCheckpoints([]);
    },
    drawCurves(curves) {
      loss.update([{name: 'training', className: 'c1', points: curves.loss}, {name: 'validation', className: 'c2', dots: true, points: curves.validLoss}]);
      accuracy.update([{name: 'training', className: 'c1', points: curves.accuracy}, {name: 'validation', className: 'c2', dots: true, points: curves.validAccuracy}]);
      rate.update([{name: 'rate', className: 'c1', points: curves.rate}]);
      norm.update([{name: 'norm', className: 'c1', points: curves.norm}]);
    },
    drawEvents(list_) {
      keyed(eventList, list_, (event) => event.id, (event) => ({element: h('li', {class: `log-${{warn: 'warn', error: 'bad'}[event.level] ?? 'info'}`},
        h('time', null, format.clock(event.created_at)), h('span', {class: 'log-mark', 'aria-hidden': 'true'}, {warn: '!', error: '✕'}[event.level] ?? '·'), h('span', null, event.message))}));
    },
    drawCheckpoints(data) {
      show(noCheckpoints, data.length === 0);
      show(checkpointTable, data.length > 0);
      keyed(checkpoints, data, (one) => one.id, (one) => ({element: h('tr', null, h('td', {class: 'number'}, format.count(one.step_number)),
        h('td', {class: 'wrap'}, h('a', {href: `#/chat/${encodeURIComponent(one.fine_tuned_model_checkpoint)}`}, one.fine_tuned_model_checkpoint)),
        h('td', {class: 'number'}, format.precise(one.metrics.train_loss)), h('td', {class: 'number'}, format.precise(one.metrics.valid_loss)))}));
    },
  };
}
