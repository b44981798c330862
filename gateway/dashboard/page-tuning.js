// Fine-tuning: the list of jobs, and beside it a job or the form for a new one.

import {get} from './api.js';
import {bar} from './charts.js';
import {attr, h, keyed, setText, show} from './dom.js';
import * as format from './format.js';
import {poll} from './poll.js';
import {JOB_STATUS, jobTone, jobView} from './tuning-job.js';
import {newJob} from './tuning-new.js';

/** Makes the page. */
export function tuningPage({go}) {
  const problem = h('p', {class: 'notice', hidden: true});
  const list = h('ul', {class: 'jobs'});
  const none = h('p', {class: 'empty'}, 'No job yet.');
  const form = newJob((job) => {
    poller.now();
    go(`#/tuning/${job.id}`);
  });
  const detail = jobView({go, refresh: () => poller.now()});
  const add = h('a', {class: 'button primary', href: '#/tuning/new'}, 'New job');
  const element = h('div', {class: 'page page-tuning'},
    h('div', {class: 'page-head'}, h('h1', null, 'Fine-tuning'), h('div', {class: 'head-actions'}, add)), problem,
    h('div', {class: 'tuning'}, h('nav', {class: 'card job-list', 'aria-label': 'Jobs'}, none, list), h('div', {class: 'tuning-main'}, form.element, detail.element)));
  let selected = null;
  let known = [];

  const poller = poll(async (signal) => {
    known = (await get('/v1/fine_tuning/jobs?limit=50', {signal})).data;
    show(problem, false);
    show(none, known.length === 0);
    // The first visit shows the newest job; without any, the form.
    if (selected === null) select(known[0]?.id ?? 'new');
    draw();
    const shown = known.find((job) => job.id === selected);
    if (shown) detail.update(shown);
    else if (selected !== 'new') detail.update(await get(`/v1/fine_tuning/jobs/${selected}`, {signal}));
  }, {every: 1000, onError(error) {
    setText(problem, error.message);
    show(problem, true);
  }});

  function draw() {
    keyed(list, known, (job) => job.id, jobLine);
    for (const line of list.children) attr(line.firstChild, 'aria-current', line.dataset.job === selected ? 'page' : null);
  }

  function select(id) {
    selected = id;
    const isNew = id === 'new';
    show(form.element, isNew);
    show(detail.element, !isNew);
    if (isNew) {
      detail.hide();
      form.load();
    } else {
      detail.show(id);
    }
    draw();
  }

  show(form.element, false);
  show(detail.element, false);

  return {
    element,
    show([id]) {
      if (id) select(id);
      else if (selected && selected !== 'new') detail.show(selected);
      poller.start();
      poller.now();
    },
    hide() {
      poller.stop();
      detail.hide();
    },
  };
}

function jobLine(first) {
  const name = h('b', {class: 'clip'});
  const status = h('span', {class: 'pill'});
  const progress = bar('thin');
  const text = h('span', {class: 'sub clip'});
  const link = h('a', {class: 'job-line', href: `#/tuning/${first.id}`}, h('span', {class: 'job-line-head'}, name, status), progress.element, text);
  const element = h('li', {dataset: {job: first.id}}, link);
  return {element, update: (job) => {
    const {steps = 0, total_steps: total, metrics} = job.ashlar ?? {};
    setText(name, job.user_provided_suffix ?? job.id);
    setText(status, JOB_STATUS[job.status] ?? job.status);
    attr(status, 'class', `pill pill-${jobTone(job.status)}`);
    progress.update([{name: 'compute', value: steps, text: `${steps} steps`}], total ?? 1);
    setText(text, [format.ago(job.created_at), total ? `${steps}/${total} steps` : null, metrics?.train_loss === undefined ? null : `loss ${format.precise(metrics.train_loss)}`].filter(Boolean).join(' · '));
  }};
}
