// The one way to the gateway: JSON, streams of events, uploads, downloads; and the key, should one be asked for.

const TIMEOUT_MS = 10_000;
/** The longest line of a stream that is waited for, in characters. */
const LINE_MAX = 4 << 20;

/** An answer that is no success; `status` is 0 where there was none at all. */
export class ApiError extends Error {
  constructor(status, body) {
    const error = body?.error ?? {};
    super(error.message ?? (status ? `the gateway answered with status ${status}` : 'the gateway does not answer'));
    this.status = status;
    this.param = error.param ?? null;
    this.code = error.code ?? null;
  }
}

let key = null;
try {
  key = sessionStorage.getItem('ashlar.key');
} catch {
  // Then it is asked for again after a reload.
}
let askForKey = async () => null;
let asking = null;

/** Sets who asks the operator for a key when the gateway wants one: resolves to it, or to `null`. */
export function onKeyWanted(ask) {
  askForKey = ask;
}

function headers(more) {
  return key ? {...more, authorization: `Bearer ${key}`} : {...more};
}

/** Asks once, however many requests want a key at the same time. */
async function newKey() {
  asking ??= askForKey().finally(() => { asking = null; });
  const given = await asking;
  if (!given) return false;
  key = given;
  try {
    sessionStorage.setItem('ashlar.key', given);
  } catch {
    // It holds until the page is closed.
  }
  return true;
}

async function send(method, path, {body, signal, quiet}) {
  for (;;) {
    const used = key;
    let response;
    try {
      response = await fetch(path, {
        method,
        headers: headers(body === undefined ? {} : {'content-type': 'application/json'}),
        body: body === undefined ? undefined : JSON.stringify(body),
        signal,
        cache: 'no-store',
        credentials: 'omit',
      });
    } catch (error) {
      if (signal?.aborted && signal.reason?.name !== 'TimeoutError') throw error;
      throw new ApiError(0, null);
    }
    if (response.status !== 401) return response;
    // Another request may have got a key meanwhile. What is polled in the background waits for that.
    if (key === used && (quiet || !(await newKey()))) return response;
  }
}

async function parsed(response) {
  const text = await response.text();
  try {
    return JSON.parse(text);
  } catch {
    return response.ok ? text : {error: {message: text.slice(0, 400) || undefined}};
  }
}

/** A request and its whole answer, JSON or text. */
export async function request(method, path, options = {}) {
  const timeout = AbortSignal.timeout(options.timeout ?? TIMEOUT_MS);
  const signal = options.signal ? AbortSignal.any([options.signal, timeout]) : timeout;
  const response = await send(method, path, {...options, signal});
  let body;
  try {
    body = await parsed(response);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError(0, null);
  }
  if (!response.ok) throw new ApiError(response.status, body);
  return body;
}

/** GET. */
export const get = (path, options) => request('GET', path, options);
/** POST of JSON. */
export const post = (path, body = {}, options = {}) => request('POST', path, {...options, body});

/**
 * A request whose answer is a stream of server-sent events: yields the data of each as JSON, ends with `[DONE]` or the
 * connection. `onOpen(response)` sees the headers.
 */
export async function* events(method, path, {body, signal, onOpen} = {}) {
  const response = await send(method, path, {body, signal});
  if (!response.ok) throw new ApiError(response.status, await parsed(response));
  onOpen?.(response);
  for await (const data of eventData(response.body)) {
    if (data === '[DONE]') return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(response.status, event);
    yield event;
  }
}

/** The data of each event of a byte stream. */
async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  let data = [];
  try {
    for (;;) {
      const {value, done} = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      if (rest.length > LINE_MAX) throw new Error('the stream has a line without an end');
      for (const line of lines) {
        if (line === '') {
          if (data.length) yield data.join('\n');
          data = [];
        } else if (line.startsWith('data:')) {
          data.push(line.slice(line[5] === ' ' ? 6 : 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Uploads a file for fine-tuning; `onProgress(share)` is told how far it is. */
export function upload(file, onProgress, signal) {
  const form = new FormData();
  form.append('purpose', 'fine-tune');
  form.append('file', file, file.name);
  return new Promise((resolve, reject) => {
    // `fetch` does not tell how far an upload is.
    const call = new XMLHttpRequest();
    call.open('POST', '/v1/files');
    for (const [name, value] of Object.entries(headers())) call.setRequestHeader(name, value);
    call.upload.onprogress = (event) => { if (event.lengthComputable) onProgress(event.loaded / event.total); };
    call.onerror = () => reject(new ApiError(0, null));
    call.onabort = () => reject(new DOMException('the upload was stopped', 'AbortError'));
    call.onload = async () => {
      let body = null;
      try {
        body = JSON.parse(call.responseText);
      } catch {
        // The status says enough.
      }
      if (call.status === 401 && await newKey()) resolve(upload(file, onProgress, signal));
      else if (call.status === 200) resolve(body);
      else reject(new ApiError(call.status, body));
    };
    signal?.addEventListener('abort', () => call.abort(), {once: true});
    call.send(form);
  });
}

/** Saves what is at `path` as a file. Without a key the browser does it by itself, however large the file is. */
export async function download(path, name) {
  const link = document.createElement('a');
  link.download = name;
  link.href = path;
  if (key) {
    const response = await send('GET', path, {});
    if (!response.ok) throw new ApiError(response.status, await parsed(response));
    link.href = URL.createObjectURL(await response.blob());
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  }
  link.click();
}
