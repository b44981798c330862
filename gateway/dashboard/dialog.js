// Dialogs and passing messages. The browser's own `dialog` keeps the focus inside and closes on Escape.

import {button, field, h, setText, show} from './dom.js';

/** Opens a dialog with a title, a body and buttons; returns `{element, close, closed}`. */
export function openDialog({title, body, actions = [], className = ''}) {
  // The title gets the focus, so that what the dialog is about is read first.
  const heading = h('h2', {class: 'dialog-title', tabindex: '-1', autofocus: true, id: `dialog-${performance.now().toString(36).replace('.', '')}`}, title);
  const element = h('dialog', {class: `dialog ${className}`, 'aria-labelledby': heading.id},
    h('div', {class: 'dialog-head'}, heading, h('button', {type: 'button', class: 'icon-button', 'aria-label': 'Close', onclick: () => element.close()}, '✕')),
    h('div', {class: 'dialog-body'}, body),
    actions.length ? h('div', {class: 'dialog-actions'}, actions) : null);
  const opener = document.activeElement;
  const closed = new Promise((resolve) => {
    element.addEventListener('close', () => {
      element.remove();
      if (opener?.isConnected) opener.focus({preventScroll: true});
      resolve();
    }, {once: true});
  });
  // A click beside it closes it, as everywhere.
  element.addEventListener('pointerdown', (event) => { if (event.target === element) element.close(); });
  document.body.append(element);
  element.showModal();
  return {element, close: () => element.close(), closed};
}

/**
 * Asks before something is done; `act()` does it and may throw, which is shown in the dialog. Resolves to whether it was done.
 * It cannot be done before `ready` has resolved to whether it may.
 */
export function confirmDialog({title, body, action, danger = false, act, ready = true}) {
  const problem = h('p', {class: 'problem', role: 'alert', hidden: true});
  let done = false;
  const go = button(action, async () => {
    go.disabled = true;
    show(problem, false);
    try {
      await act();
      done = true;
      dialog.close();
    } catch (error) {
      setText(problem, error.message);
      show(problem, true);
      go.disabled = false;
    }
  }, {class: danger ? 'button danger' : 'button primary'});
  go.disabled = ready !== true;
  Promise.resolve(ready).then((may) => { go.disabled = !may; }, (error) => {
    setText(problem, error.message);
    show(problem, true);
  });
  const dialog = openDialog({title, body: [body, problem], actions: [button('Cancel', () => dialog.close()), go]});
  return dialog.closed.then(() => done);
}

/** Asks for an API key; resolves to it, or to `null`. */
export function askKey() {
  const input = h('input', {type: 'password', autocomplete: 'off', spellcheck: 'false', required: true});
  let key = null;
  const form = h('form', {class: 'stack', onsubmit: (event) => {
    event.preventDefault();
    key = input.value.trim() || null;
    dialog.close();
  }}, h('p', null, 'This gateway wants an API key. It is kept until this tab is closed, and sent to this gateway alone.'),
  field('Key', input), h('div', {class: 'dialog-actions'}, h('button', {class: 'button primary'}, 'Use it')));
  const dialog = openDialog({title: 'An API key is needed', body: form});
  input.focus();
  return dialog.closed.then(() => key);
}

/** Says something for a few seconds, also to those who listen to the page. */
export function toast(text, tone = 'info') {
  const box = document.getElementById('toasts');
  const line = h('p', {class: `toast toast-${tone}`}, tone === 'bad' ? '✕ ' : tone === 'good' ? '✓ ' : '', text);
  box.append(line);
  while (box.children.length > 4) box.firstChild.remove();
  setTimeout(() => line.remove(), tone === 'bad' ? 9000 : 5000);
}
