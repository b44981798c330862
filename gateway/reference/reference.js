// Shows /openapi.json to people. Everything is text: nothing of the document becomes markup.

const element = (name, properties = {}, ...children) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== ''));
  return made;
};

const ORDER = ['get', 'post', 'patch', 'delete'];
const find = document.getElementById('find');
const contents = document.getElementById('contents');
const main = document.getElementById('operations');
const state = document.getElementById('state');

/** What a value may be, in words. */
const kindOf = (schema) => {
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(' or ');
  if (schema.anyOf) return schema.anyOf.map(kindOf).join(', or ');
  if (schema.type === 'array') return `list of ${kindOf(schema.items)}`;
  if (schema.format === 'binary') return 'file';
  const whole = (bound) => Number.isSafeInteger(bound) && Math.abs(bound) < 2 ** 31 - 1;
  const low = schema.minimum, high = schema.maximum;
  const isReal = schema.type === 'number';
  const lower = low !== undefined && (isReal || whole(low)), upper = high !== undefined && (isReal || whole(high));
  const range = lower && upper ? ` ${low} to ${high}` : lower ? ` from ${low}` : upper ? ` to ${high}` : '';
  return `${schema.type}${range}`;
};

/** Rows of a table of fields, those of objects within included. */
const rows = (schema, prefix = '') => {
  const wanted = new Set(schema.required ?? []);
  return Object.entries(schema.properties ?? {}).flatMap(([name, field]) => {
    const inner = field.type === 'array' ? field.items : field;
    const path = prefix + name;
    const row = element('tr', {},
      element('td', {}, path),
      element('td', {},
        element('span', { className: 'kind' }, kindOf(field) + (wanted.has(name) ? ', required' : '')),
        element('div', {}, field.description ?? '')));
    const below = inner.properties ? rows(inner, `${path}${field.type === 'array' ? '[].' : '.'}`) : [];
    return [row, ...below];
  });
};

const table = (caption, list) => list.length === 0 ? '' : element('table', {},
  element('thead', {}, element('tr', {}, element('th', { scope: 'col' }, caption), element('th', { scope: 'col' }, ''))),
  element('tbody', {}, ...list));

const parameterRow = (parameter) => element('tr', {},
  element('td', {}, parameter.in === 'path' ? `{${parameter.name}}` : `?${parameter.name}=`),
  element('td', {},
    element('span', { className: 'kind' }, kindOf(parameter.schema)),
    element('div', {}, parameter.description)));

const example = (operation) => {
  const content = Object.values(operation.responses['200'].content ?? {});
  const shown = content.find((kind) => kind.example !== undefined && kind.example !== null);
  if (!shown) return '';
  const text = typeof shown.example === 'string' ? shown.example : JSON.stringify(shown.example, null, 2);
  return element('details', {}, element('summary', {}, 'Answer'), element('pre', { tabIndex: 0 }, text));
};

const head = (method, path) => [element('span', { className: `verb ${method}` }, method.toUpperCase()), element('span', { className: 'path' }, path)];

const sectionOf = (path, method, operation, id) => {
  const body = Object.entries(operation.requestBody?.content ?? {});
  return element('section', { id },
    element('h3', {}, operation.summary),
    element('div', {}, ...head(method, path)),
    operation.description ? element('p', { className: 'about' }, operation.description) : '',
    table('Address', (operation.parameters ?? []).map(parameterRow)),
    ...body.map(([kind, { schema }]) => table(kind === 'multipart/form-data' ? 'Form' : 'Body', rows(schema))),
    example(operation));
};

const show = (reference) => {
  const subjects = new Map();
  for (const [path, methods] of Object.entries(reference.paths)) {
    for (const method of ORDER.filter((method) => methods[method])) {
      const operation = methods[method];
      const id = `${method}${path}`.replace(/[^a-z0-9]+/gi, '-').toLowerCase();
      const section = sectionOf(path, method, operation, id);
      const link = element('li', {}, element('a', { href: `#${id}` },
        element('span', { className: `verb ${method}` }, method.toUpperCase()), operation.summary));
      const list = subjects.get(operation.tags[0]) ?? [];
      list.push({ section, link, words: `${path} ${section.textContent}`.toLowerCase() });
      subjects.set(operation.tags[0], list);
    }
  }
  const groups = [...subjects].map(([subject, list]) => {
    const heading = element('h2', {}, subject);
    const title = element('h2', {}, subject);
    contents.append(heading, element('ul', {}, ...list.map((entry) => entry.link)));
    main.append(title, ...list.map((entry) => entry.section));
    return { heading, title, list };
  });
  const filter = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const { heading, title, list } of groups) {
      let any = false;
      for (const { section, link, words: own } of list) {
        const fits = words.every((word) => own.includes(word));
        section.hidden = link.hidden = !fits;
        any ||= fits;
        count += fits ? 1 : 0;
      }
      heading.hidden = title.hidden = !any;
    }
    state.textContent = words.length === 0 ? '' : count === 1 ? 'One operation.' : `${count} operations.`;
  };
  find.addEventListener('input', filter);
  filter();
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
};

try {
  const answer = await fetch('/openapi.json');
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  show(await answer.json());
} catch (error) {
  state.textContent = `The reference could not be loaded: ${error.message}. Reload the page to try again.`;
}
