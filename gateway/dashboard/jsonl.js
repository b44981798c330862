// A first look at a training file, in the browser: what is plainly wrong is said with its line before anything is uploaded. The cluster
// checks again, with the model's own template and tokenizer, and its word counts.

const SHOWN_MAX = 100;
const LINE_MAX = 8 << 20;
const ROLES = ['system', 'developer', 'user', 'assistant', 'tool'];

/** Formats, by what their examples have. */
const FORMATS = {chat: 'chats', completion: 'prompts with completions', text: 'texts', preference: 'preferences'};

/**
 * Reads a file line by line: `{lines, examples, format, method, problems: [{line, message}], total, characters}`. `onProgress(share)` is told how far it is.
 */
export async function checkFile(file, onProgress, signal) {
  const report = {lines: 0, examples: 0, format: null, method: null, problems: [], total: 0, characters: 0, longest: 0};
  const reader = file.stream().pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  let first = null;
  let read = 0;
  const problem = (message) => {
    report.total += 1;
    if (report.problems.length < SHOWN_MAX) report.problems.push({line: report.lines, message});
  };
  const line = (text) => {
    report.lines += 1;
    if (text.trim() === '') return;
    const {format, message} = lookAt(text);
    if (message) return problem(message);
    first ??= {format, line: report.lines};
    if (format !== first.format) return problem(`the example is one of ${FORMATS[format]}, but line ${first.line} is one of ${FORMATS[first.format]}: a file must keep to one format`);
    report.examples += 1;
    report.characters += text.length;
    return undefined;
  };
  for (;;) {
    const {value, done} = await reader.read();
    if (signal?.aborted) throw signal.reason;
    if (done) break;
    read += value.length;
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    if (rest.length > LINE_MAX) throw new Error(`line ${report.lines + lines.length + 1} is longer than 8 MiB: split the example`);
    lines.forEach(line);
    onProgress(Math.min(1, read / file.size));
  }
  if (rest !== '') line(rest);
  report.format = first ? FORMATS[first.format] : null;
  report.method = first ? (first.format === 'preference' ? 'dpo' : 'supervised') : null;
  return report;
}

function lookAt(text) {
  let example;
  try {
    example = JSON.parse(text.replace(/^\ufeff/, ''));
  } catch (error) {
    return {message: `the line is not valid JSON (${reason(error)}): each line must be one JSON object`};
  }
  if (typeof example !== 'object' || example === null || Array.isArray(example)) return {message: 'the line is no object: each line must be one JSON object'};
  const has = (name) => example[name] !== undefined && example[name] !== null;
  if (has('messages')) return {format: 'chat', message: conversation(example.messages, 'messages', true)};
  if (has('prompt') || has('completion')) {
    const missing = ['prompt', 'completion'].find((name) => typeof example[name] !== 'string');
    const empty = example.completion === '' ? '`completion` is empty' : null;
    return {format: 'completion', message: missing ? `\`${missing}\` must be a string` : empty};
  }
  if (has('text')) return {format: 'text', message: typeof example.text === 'string' && example.text ? null : '`text` must be a string that is not empty'};
  if (has('input') || has('preferred_output')) {
    const missing = ['preferred_output', 'non_preferred_output'].find((name) => !Array.isArray(example[name]) || example[name].length !== 1 || example[name][0]?.role !== 'assistant');
    return {format: 'preference', message: missing ? `\`${missing}\` must be a list of exactly one assistant message` : conversation(example.input?.messages, 'input.messages', false)};
  }
  return {message: 'the example has none of `messages`, `prompt` with `completion`, `text`, or `input` with `preferred_output` and `non_preferred_output`'};
}

/** What browsers say of bad JSON quotes the line; only what is wrong, and where, is kept. */
function reason(error) {
  const at = /position (\d+)|column (\d+)/.exec(error.message);
  if (/end of (JSON|data)|unterminated/i.test(error.message) && !at) return 'it ends too early';
  if (!at) return 'it cannot be read';
  return `at column ${at[1] === undefined ? at[2] : Number(at[1]) + 1}`;
}

function conversation(messages, path, answered) {
  if (!Array.isArray(messages) || !messages.length) return `\`${path}\` must be a list of messages`;
  for (const [index, message] of messages.entries()) {
    if (!ROLES.includes(message?.role)) return `\`${path}[${index}].role\` must be system, developer, user, assistant or tool`;
    const {content} = message;
    const fine = typeof content === 'string' || Array.isArray(content) || (message.role === 'assistant' && (message.tool_calls || content === null));
    if (!fine) return `\`${path}[${index}].content\` must be a string`;
  }
  if (!messages.some((message) => message.role === 'user')) return `\`${path}\` has no user message: an example needs at least one`;
  if (answered && !messages.some((message) => message.role === 'assistant')) return '`messages` has no assistant message: an example needs an answer to learn';
  return null;
}

/** Lines and what is wrong with them, out of what a job's error says: `2 line(s) cannot be used: line 3: …; line 9: …; and 1 more`. */
export function problemsOf(message) {
  const at = message.search(/line \d+: /);
  if (at < 0) return [];
  return message.slice(at).split(/; (?=line \d+: )/).map((part) => {
    const [, line, what] = /^line (\d+): ([\s\S]*)$/.exec(part) ?? [];
    return line ? {line: Number(line), message: what.replace(/; and \d+ more$/, '')} : null;
  }).filter(Boolean);
}
