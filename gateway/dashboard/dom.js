// Building and updating elements. Text only ever becomes text nodes and attributes: names of nodes, adapters and files and
// what models write come from elsewhere, and none of it is markup.

const SVG = 'http://www.w3.org/2000/svg';

/** An HTML element: `h('p', {class: 'x', onclick: f, hidden: true}, 'text', child, [more])`. */
export function h(tag, props, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** The same of SVG. */
export function svg(tag, props, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'style') Object.assign(element.style, value);
    else if (name === 'dataset') Object.assign(element.dataset, value);
    else attr(element, name, value);
  }
  add(element, children);
  return element;
}

function add(element, children) {
  for (const child of children) {
    if (Array.isArray(child)) add(element, child);
    else if (child !== null && child !== undefined && child !== false) element.append(child);
  }
}

/** Sets an attribute if it has changed; `null` and `false` remove it, `true` is present without a value. */
export function attr(element, name, value) {
  if (value === null || value === undefined || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
    return;
  }
  const text = value === true ? '' : String(value);
  if (element.getAttribute(name) !== text) element.setAttribute(name, text);
}

/** Sets the text if it has changed: an unchanged one costs no layout, and is not read out again. */
export function setText(element, text) {
  const wanted = text === null || text === undefined ? '' : String(text);
  if (element.textContent !== wanted) element.textContent = wanted;
}

/** Shows or hides. */
export function show(element, shown) {
  if (element.hidden === Boolean(shown)) element.hidden = !shown;
}

const lists = new WeakMap();

/**
 * Makes the children of `parent` those of `items`, by key: what is there stays (with its focus), what is new is made, what has
 * gone is removed. `make(item)` returns `{element, update?(item, index)}`.
 */
export function keyed(parent, items, keyOf, make) {
  let known = lists.get(parent);
  if (!known) lists.set(parent, known = new Map());
  const seen = new Set();
  let place = parent.firstChild;
  items.forEach((item, index) => {
    const key = keyOf(item, index);
    if (seen.has(key)) return;
    seen.add(key);
    let view = known.get(key);
    if (!view) known.set(key, view = make(item, index));
    view.update?.(item, index);
    if (view.element === place) place = place.nextSibling;
    else parent.insertBefore(view.element, place);
  });
  for (const [key, view] of known) {
    if (seen.has(key)) continue;
    view.element.remove();
    known.delete(key);
  }
}

/** The view that [`keyed`] made for a key. */
export function viewOf(parent, key) {
  return lists.get(parent)?.get(key);
}

/** A labelled control: `field('Seed', input, 'what it is for')`. */
export function field(label, control, hint) {
  return h('label', {class: 'field'}, h('span', {class: 'field-label'}, label), control,
    hint ? h('span', {class: 'hint'}, hint) : null);
}

/** A button. */
export function button(text, onclick, props) {
  return h('button', {type: 'button', class: 'button', onclick, ...props}, text);
}

/** A list of facts, from pairs of a word and a text (or a function that gives it at each update). */
export function facts(pairs, className = 'facts') {
  const list = h('dl', {class: className});
  const views = pairs.map(([word, value]) => {
    const cell = h('dd', null, typeof value === 'function' ? '' : value);
    const row = h('div', null, h('dt', null, word), cell);
    list.append(row);
    return {cell, row, value};
  });
  const update = (...state) => {
    for (const {cell, row, value} of views) {
      if (typeof value !== 'function') continue;
      const text = value(...state);
      show(row, text !== null && text !== undefined);
      setText(cell, text);
    }
  };
  return {element: list, update};
}

/** Makes a set of tabs work as WAI-ARIA describes: one stop of the Tab key, arrows go between them. */
export function tabs(names, onSelect, label) {
  const buttons = names.map((name, index) => h('button', {
    type: 'button', role: 'tab', class: 'tab', onclick: () => select(index, false),
  }, name));
  const element = h('div', {class: 'tabs', role: 'tablist', 'aria-label': label, onkeydown}, buttons);
  let selected = 0;
  function onkeydown(event) {
    const steps = {ArrowRight: 1, ArrowLeft: -1, Home: -selected, End: names.length - 1 - selected};
    if (!(event.key in steps)) return;
    event.preventDefault();
    select((selected + steps[event.key] + names.length) % names.length, true);
  }
  function select(index, focus) {
    selected = index;
    buttons.forEach((tab, at) => {
      attr(tab, 'aria-selected', at === index ? 'true' : 'false');
      attr(tab, 'tabindex', at === index ? '0' : '-1');
    });
    if (focus) buttons[index].focus();
    onSelect(index);
  }
  return {element, select: (index) => select(index, false)};
}

/** Copies a text and says so on the button for a moment. */
export async function copy(text, from) {
  const label = from.textContent;
  try {
    await navigator.clipboard.writeText(text);
    from.textContent = 'Copied';
  } catch {
    // Without a secure context there is no clipboard to write to: the older way still works.
    const area = h('textarea', {class: 'offscreen', 'aria-hidden': 'true'});
    area.value = text;
    from.parentNode.append(area);
    area.select();
    from.textContent = document.execCommand('copy') ? 'Copied' : 'Not possible: select the text';
    area.remove();
    from.focus();
  }
  setTimeout(() => { from.textContent = label; }, 1600);
}
