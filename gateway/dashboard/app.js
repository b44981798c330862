// The frame of the dashboard: which page is shown, how the cluster is, the theme. Each page is a module of its own.

import {onKeyWanted} from './api.js';
import {askKey} from './dialog.js';
import {attr, h, setText} from './dom.js';
import {feed} from './feed.js';
import {nextTheme, theme} from './settings.js';

/**
 * A page is loaded when it is first visited. `make(context)` gives `{element, show?(parts), hide?(), update?(state)}`, where the
 * parts are those of the address behind the page's name.
 */
const PAGES = [
  {id: 'cluster', title: 'Cluster', make: async (context) => (await import('./page-cluster.js')).clusterPage(context)},
  {id: 'requests', title: 'Requests', make: async (context) => (await import('./page-requests.js')).requestsPage(context)},
  {id: 'models', title: 'Models', make: async (context) => (await import('./page-models.js')).modelsPage(context)},
  {id: 'chat', title: 'Chat', make: async (context) => (await import('./page-chat.js')).chatPage(context)},
  {id: 'tuning', title: 'Tuning', make: async (context) => (await import('./page-tuning.js')).tuningPage(context)},
  {id: 'keys', title: 'Keys', make: async (context) => (await import('./page-keys.js')).keysPage(context)},
];

const news = feed();
const main = document.getElementById('main');
const pill = document.getElementById('link');
const themeButton = document.getElementById('theme');
const links = new Map();
const made = new Map();
let current = null;
let drawn = false;

function addressed() {
  const [id, ...rest] = location.hash.replace(/^#\/?/, '').split('/').map(decoded);
  const page = PAGES.find((one) => one.id === id);
  return page ? {page, rest} : {page: PAGES[0], rest: []};
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

async function route() {
  const {page} = addressed();
  document.title = `${page.title} · Ashlar`;
  for (const [id, link] of links) attr(link, 'aria-current', id === page.id ? 'page' : null);
  if (current?.page !== page) {
    current?.view.hide?.();
    current = null;
    const view = await pageView(page);
    // Meanwhile somebody may have gone on, or back to where this began.
    if (addressed().page !== page || current) return;
    main.replaceChildren(view.element);
    current = {page, view};
    window.scrollTo(0, 0);
  }
  current.view.show?.(addressed().rest);
  current.view.update?.(news.state);
}

async function pageView(page) {
  if (!made.has(page.id)) {
    try {
      const view = await page.make({feed: news, go: (hash) => { location.hash = hash; }});
      if (!made.has(page.id)) made.set(page.id, view);
    } catch (error) {
      return {element: h('p', {class: 'page notice', role: 'alert'}, `This page could not be loaded: ${error.message}. Reload to try again.`)};
    }
  }
  return made.get(page.id);
}

function drawSoon() {
  if (drawn) return;
  drawn = true;
  requestAnimationFrame(() => {
    drawn = false;
    drawPill();
    current?.view.update?.(news.state);
  });
}

function drawPill() {
  const {view} = news.state;
  const [tone, text] = view.connected === null ? ['idle', 'connecting']
    : !view.connected ? ['bad', news.state.error?.status ? `✕ error ${news.state.error.status}` : '✕ not connected']
      : view.ready ? ['good', '✓ ready'] : ['warn', '! not ready'];
  setText(pill, text);
  attr(pill, 'class', `pill pill-${tone}`);
  attr(pill, 'title', view.connected === false ? news.state.error?.message : view.problem ?? null);
}

function drawTheme() {
  const words = {auto: 'as the system', light: 'light', dark: 'dark'};
  setText(themeButton, {auto: '◐', light: '☀', dark: '☾'}[theme()]);
  attr(themeButton, 'aria-label', `Theme: ${words[theme()]}. Change it`);
  attr(themeButton, 'title', `Theme: ${words[theme()]}`);
}

function start() {
  const pages = document.getElementById('pages');
  for (const page of PAGES) {
    const link = h('a', {href: `#/${page.id}`, class: `page-link page-${page.id}`}, page.title);
    links.set(page.id, link);
    pages.append(link);
  }
  // Arrows go between pages' links, as in a list of tabs; Tab alone works, too.
  pages.addEventListener('keydown', (event) => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    const all = [...links.values()];
    const at = all.indexOf(document.activeElement);
    if (!step || at < 0) return;
    event.preventDefault();
    all[(at + step + all.length) % all.length].focus();
  });
  document.querySelector('.skip').addEventListener('click', (event) => {
    event.preventDefault();
    main.focus();
  });
  themeButton.addEventListener('click', () => {
    nextTheme();
    drawTheme();
  });
  onKeyWanted(askKey);
  drawTheme();
  news.listen(drawSoon);
  window.addEventListener('hashchange', route);
  route();
  news.start();
}

start();
