// A new fine-tuning job: a file is looked at and uploaded, then the job is described.

import {get, post, upload} from './api.js';
import {bar} from './charts.js';
import {attr, button, field, h, setText, show} from './dom.js';
import * as format from './format.js';
import {checkFile} from './jsonl.js';

const CREATE_MS = 60_000;

/** Problems with their lines, as a list. */
export function problemList(problems, total) {
  return h('div', {class: 'report-problems'},
    h('ol', {class: 'problem-lines'}, problems.map(({line, message}) => h('li', null, h('b', {class: 'line-number'}, `line ${line}`), h('span', null, message)))),
    total > problems.length ? h('p', {class: 'muted'}, `and ${format.count(total - problems.length)} more`) : null);
}

/** The form; `created(job)` is told of the job that was made. */
export function newJob(created) {
  const files = [];
  const fileSelect = (id, none) => h('select', {id}, none ? h('option', {value: ''}, none) : null);
  const controls = {
    model: h('select', {id: 'job-model', required: true}),
    training: fileSelect('job-training'),
    validation: fileSelect('job-validation', 'none'),
    method: h('select', {id: 'job-method', onchange: methodChanged}, h('option', {value: 'supervised'}, 'supervised: learn answers'), h('option', {value: 'dpo'}, 'DPO: learn preferences')),
    epochs: auto('job-epochs', {min: 1, max: 255, step: 1}),
    batch: auto('job-batch', {min: 1, max: 4096, step: 1}),
    rate: auto('job-rate', {min: 0.000001, max: 1000, step: 'any'}),
    beta: auto('job-beta', {min: 0.000001, max: 2, step: 'any', placeholder: '0.1'}),
    rank: auto('job-rank', {min: 1, max: 256, step: 1, placeholder: '16'}),
    alpha: auto('job-alpha', {min: 0.001, max: 4096, step: 'any', placeholder: 'twice the rank'}),
    suffix: h('input', {id: 'job-suffix', maxlength: 64, pattern: '[A-Za-z0-9._\\-]*', autocomplete: 'off', spellcheck: 'false', placeholder: 'part of the model’s name'}),
    seed: auto('job-seed', {min: 0, max: 2147483647, step: 1, placeholder: 'random'}),
    publish: h('select', {id: 'job-publish', onchange: publishChanged}, h('option', {value: ''}, 'when the job ends'), h('option', {value: 'loss'}, 'only if its loss is lower than what is served'), h('option', {value: 'exact_match'}, 'only if more of its answers match exactly')),
    evaluation: fileSelect('job-evaluation', 'choose a file'),
  };
  const betaField = field('Beta', controls.beta, 'how close it stays to the model');
  const evaluationField = field('Compared on', controls.evaluation, 'examples with their answers');
  const problem = h('p', {class: 'problem', role: 'alert', hidden: true});
  const submit = h('button', {class: 'button primary', id: 'job-create'}, 'Start the job');
  const drop = dropZone(async (file) => {
    await loadFiles();
    controls.training.value = file.id;
    fileChosen();
  }, (report) => {
    if (report.method) controls.method.value = report.method;
    methodChanged();
  });
  const form = h('form', {class: 'card job-form', onsubmit: create},
    h('h2', null, '2 · The job'),
    h('div', {class: 'form-grid'},
      field('Model', controls.model), field('Training file', controls.training), field('Validation file', controls.validation, 'loss and accuracy are measured on it'),
      field('Method', controls.method), field('Epochs', controls.epochs), field('Batch size', controls.batch), field('Learning rate, times', controls.rate), betaField,
      field('LoRA rank', controls.rank), field('LoRA alpha', controls.alpha), field('Suffix', controls.suffix), field('Seed', controls.seed),
      field('Serve it', controls.publish), evaluationField),
    problem, h('div', {class: 'card-actions'}, submit));
  const element = h('div', {class: 'new-job'}, drop.element, form);
  controls.training.addEventListener('change', fileChosen);
  methodChanged();
  publishChanged();

  function auto(id, props) {
    return h('input', {type: 'number', id, placeholder: 'auto', ...props});
  }
  function methodChanged() {
    show(betaField, controls.method.value === 'dpo');
  }
  function publishChanged() {
    show(evaluationField, controls.publish.value);
  }
  function fileChosen() {
    submit.disabled = !controls.training.value;
    setText(submit, controls.training.value ? 'Start the job' : 'Upload a training file first');
  }

  async function loadFiles() {
    const list = (await get('/v1/files?purpose=fine-tune&limit=200')).data;
    files.splice(0, files.length, ...list);
    for (const select of [controls.training, controls.validation, controls.evaluation]) {
      const [chosen, none] = [select.value, select.querySelector('option[value=""]')];
      select.replaceChildren(...(none ? [none] : []), ...files.map((file) => h('option', {value: file.id}, `${format.short(file.filename, 40)} · ${format.bytes(file.bytes)} · ${format.ago(file.created_at)}`)));
      select.value = files.some((file) => file.id === chosen) ? chosen : none ? '' : files[0]?.id ?? '';
    }
    fileChosen();
  }

  async function load() {
    try {
      const [{data}] = await Promise.all([get('/v1/models'), loadFiles()]);
      // Jobs train adapters on the model that the cluster was started with.
      const bases = data.filter((card) => card.parent === null);
      controls.model.replaceChildren(...bases.map((card) => h('option', {value: card.id}, card.id)));
      show(problem, false);
    } catch (error) {
      setText(problem, error.message);
      show(problem, true);
    }
  }

  function body() {
    const number = (control) => (control.value === '' ? undefined : control.valueAsNumber);
    const text = (control) => (control.value === '' ? undefined : control.value);
    const method = controls.method.value;
    const hyperparameters = {n_epochs: number(controls.epochs), batch_size: number(controls.batch), learning_rate_multiplier: number(controls.rate)};
    if (method === 'dpo') hyperparameters.beta = number(controls.beta);
    const lora = {r: number(controls.rank), alpha: number(controls.alpha)};
    return {
      model: controls.model.value, training_file: controls.training.value, validation_file: text(controls.validation),
      suffix: text(controls.suffix), seed: number(controls.seed), method: {type: method, [method]: {hyperparameters}},
      lora: lora.r === undefined && lora.alpha === undefined ? undefined : lora,
      promote: controls.publish.value ? {metric: controls.publish.value, file: text(controls.evaluation)} : undefined,
    };
  }

  async function create(event) {
    event.preventDefault();
    submit.disabled = true;
    show(problem, false);
    try {
      created(await post('/v1/fine_tuning/jobs', body(), {timeout: CREATE_MS}));
    } catch (error) {
      setText(problem, error.message);
      show(problem, true);
    }
    fileChosen();
  }

  return {element, load};
}

/** Where a file is dropped or chosen: it is looked at, then uploaded, unless something is plainly wrong with it. */
function dropZone(uploaded, looked) {
  const input = h('input', {type: 'file', id: 'job-file', accept: '.jsonl,.json,.ndjson,application/jsonl', class: 'offscreen', onchange: () => { if (input.files[0]) take(input.files[0]); input.value = ''; }});
  const progress = bar('wide');
  const progressText = h('p', {class: 'hint'});
  const progressBox = h('div', {hidden: true}, progress.element, progressText);
  const report = h('div', {class: 'report', role: 'status', 'aria-live': 'polite'});
  const zone = h('label', {class: 'drop', for: 'job-file'}, input, h('b', null, 'Drop a JSONL file here'), h('span', {class: 'muted'}, 'or choose one. One example per line: messages, prompt and completion, text, or a preference.'));
  const element = h('section', {class: 'card', 'aria-labelledby': 'upload-title'}, h('h2', {id: 'upload-title'}, '1 · Training file'), zone, progressBox, report);
  let current = null;

  for (const kind of ['dragenter', 'dragover']) zone.addEventListener(kind, (event) => { event.preventDefault(); zone.classList.add('over'); });
  for (const kind of ['dragleave', 'drop']) zone.addEventListener(kind, (event) => { event.preventDefault(); zone.classList.remove('over'); });
  zone.addEventListener('drop', (event) => { if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]); });

  function advance(word, share) {
    show(progressBox, true);
    progress.update([{name: 'compute', value: share, text: `${word} ${format.percent(share)}`}], 1);
    setText(progressText, `${word}: ${format.percent(share)}`);
  }

  async function take(file) {
    current?.abort();
    current = new AbortController();
    const {signal} = current;
    report.replaceChildren();
    try {
      const found = await checkFile(file, (share) => advance('looking at it', share), signal);
      show(progressBox, false);
      looked(found);
      if (found.total) {
        report.replaceChildren(
          h('p', {class: 'problem'}, `✕ ${format.counted(found.total, 'line')} of ${file.name} cannot be used. It was not uploaded.`), problemList(found.problems, found.total),
          h('p', null, button('Upload it all the same', () => send(file, found, signal), {class: 'button small'})));
        return;
      }
      await send(file, found, signal);
    } catch (error) {
      show(progressBox, false);
      if (!signal.aborted) report.replaceChildren(h('p', {class: 'problem'}, `✕ ${error.message}`));
    }
  }

  async function send(file, found, signal) {
    try {
      const stored = await upload(file, (share) => advance('uploading', share), signal);
      show(progressBox, false);
      report.replaceChildren(
        h('p', {class: 'good'}, `✓ ${file.name} is uploaded as `, h('code', null, stored.id)),
        h('p', {class: 'hint'}, `${format.counted(found.examples, 'example')}${found.format ? `, ${found.format}` : ''}, ${format.bytes(stored.bytes)}. The cluster checks every line again when the job begins.`));
      if (found.total) report.append(problemList(found.problems, found.total));
      await uploaded(stored);
    } catch (error) {
      show(progressBox, false);
      if (!signal.aborted) report.replaceChildren(h('p', {class: 'problem'}, `✕ ${error.message}`));
    }
  }
  attr(zone, 'tabindex', null);
  return {element};
}
