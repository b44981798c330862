// Small charts: a line over time without axes, bars of parts, and a line chart with axes that can be read point by point.

import {attr, h, setText, show, svg} from './dom.js';

/** A line over time: `update([[1, 2, null, 3], …])` draws each series over the whole width, on one scale from 0. */
export function sparkline(classes, {points = 60, height = 34} = {}) {
  const paths = classes.map((name) => ({
    area: svg('path', {class: `spark-area ${name}`}),
    line: svg('path', {class: `spark-line ${name}`, 'vector-effect': 'non-scaling-stroke'}),
  }));
  const element = svg('svg', {class: 'spark', viewBox: `0 0 ${points - 1} ${height}`, preserveAspectRatio: 'none', 'aria-hidden': 'true'},
    paths.map(({area, line}) => [area, line]));
  return {
    element,
    update(series, most) {
      const top = Math.max(most ?? 0, 1e-9, ...series.flat().filter((value) => value !== null));
      series.forEach((values, index) => {
        const {line, area} = draw(values.slice(-points), points, height, most === undefined ? top * 1.1 : top);
        attr(paths[index].line, 'd', line);
        attr(paths[index].area, 'd', area);
      });
    },
  };
}

function draw(values, points, height, top) {
  const left = points - values.length;
  let line = '';
  let area = '';
  let start = null;
  values.forEach((value, index) => {
    const x = left + index;
    if (value === null || value === undefined) {
      if (start !== null) area += `L${x - 1} ${height}Z`;
      start = null;
      return;
    }
    const y = (height - 1 - (Math.min(value, top) / top) * (height - 2)).toFixed(2);
    line += `${start === null ? 'M' : 'L'}${x} ${y}`;
    area += start === null ? `M${x} ${height}L${x} ${y}` : `L${x} ${y}`;
    if (start === null) start = x;
  });
  if (start !== null) area += `L${points - 1} ${height}Z`;
  return {line, area};
}

/**
 * A bar of parts: `update([{name, value, text}], whole, label)`. A part's class is `part-NAME`; every part is named in the bar's label, so that
 * colour is not all there is.
 */
export function bar(className = '') {
  const parts = new Map();
  const element = h('span', {class: `bar ${className}`, role: 'img'});
  return {
    element,
    update(list, whole, label) {
      const seen = new Set();
      for (const {name, value, text, kind} of list) {
        seen.add(name);
        let part = parts.get(name);
        if (!part) {
          parts.set(name, part = h('span', {class: `part part-${kind ?? name}`}));
          element.append(part);
        }
        const share = whole > 0 ? Math.min(100, Math.max(0, (value / whole) * 100)) : 0;
        const width = `${share.toFixed(2)}%`;
        if (part.style.width !== width) part.style.width = width;
        if (text) attr(part, 'title', text);
      }
      for (const [name, part] of parts) {
        if (seen.has(name)) continue;
        part.remove();
        parts.delete(name);
      }
      attr(element, 'aria-label', label ?? list.map((part) => part.text).filter(Boolean).join(', '));
    },
  };
}

/** What the parts of bars mean. */
export function legend(entries) {
  return h('ul', {class: 'legend'}, entries.map(([name, text]) => h('li', null, h('span', {class: `swatch part-${name}`, 'aria-hidden': 'true'}), text)));
}

const MARGIN = {top: 8, right: 14, bottom: 22, left: 46};

/**
 * A line chart: `update([{name, className, dots, points: [[x, y], …]}])` with ascending x. Hovering, or the arrow keys while it has the
 * focus, read it point by point.
 */
export function lineChart({title, xName = 'step', format = String, tick = String, height = 190, fromZero = false}) {
  const plot = svg('g');
  const axes = svg('g', {class: 'axes'});
  const cursor = svg('line', {class: 'cursor', y1: MARGIN.top, y2: height - MARGIN.bottom});
  cursor.style.display = 'none';
  const image = svg('svg', {class: 'chart-image', height, width: '100%', role: 'img', tabindex: '0'}, axes, plot, cursor);
  const reading = h('output', {class: 'chart-reading'});
  const empty = h('p', {class: 'chart-empty'}, 'nothing yet');
  const keys = h('span', {class: 'chart-keys'});
  const element = h('figure', {class: 'chart'}, h('figcaption', null, h('span', {class: 'chart-title'}, title), keys, reading), h('div', {class: 'chart-box'}, image, empty));
  let series = [];
  let width = 0;
  let at = null;
  let scale = null;
  const resize = new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return;
    width = entry.contentRect.width;
    render();
  });
  resize.observe(image);

  image.addEventListener('pointermove', (event) => {
    if (scale) readAt(scale.value(event.clientX - image.getBoundingClientRect().left));
  });
  image.addEventListener('pointerleave', () => readAt(null));
  image.addEventListener('blur', () => readAt(null));
  image.addEventListener('keydown', (event) => {
    const xs = [...new Set(series.flatMap((one) => one.points.map(([x]) => x)))].sort((a, b) => a - b);
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!step || !xs.length) return;
    event.preventDefault();
    const here = at === null ? (step > 0 ? -1 : xs.length) : xs.indexOf(at);
    readAt(xs[Math.min(xs.length - 1, Math.max(0, here + step))]);
  });

  function readAt(x) {
    const xs = series.flatMap((one) => one.points.map((point) => point[0]));
    at = x === null || !xs.length ? null : xs.reduce((best, one) => (Math.abs(one - x) < Math.abs(best - x) ? one : best), xs[0]);
    cursor.style.display = at === null || !scale ? 'none' : '';
    if (at === null || !scale) {
      setText(reading, latest());
      return;
    }
    attr(cursor, 'x1', scale.x(at).toFixed(1));
    attr(cursor, 'x2', scale.x(at).toFixed(1));
    const values = series.map((one) => [one.name, one.points.find(([x1]) => x1 === at)?.[1]]).filter(([, y]) => y !== undefined);
    setText(reading, `${xName} ${at}: ${values.map(([name, y]) => `${name} ${format(y)}`).join(', ')}`);
  }

  function latest() {
    return series.filter((one) => one.points.length).map((one) => `${one.name} ${format(one.points[one.points.length - 1][1])}`).join(', ');
  }

  function render() {
    const all = series.flatMap((one) => one.points);
    show(empty, all.length === 0);
    plot.replaceChildren();
    axes.replaceChildren();
    scale = null;
    if (!all.length || width < 60) return;
    const ys = all.map(([, y]) => y);
    const xs = all.map(([x]) => x);
    const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
    const yTicks = ticks(fromZero ? 0 : Math.min(...ys), Math.max(...ys), 4);
    const [y0, y1] = [yTicks[0], yTicks[yTicks.length - 1]];
    const inner = width - MARGIN.left - MARGIN.right;
    const x = (value) => MARGIN.left + (x1 === x0 ? inner / 2 : ((value - x0) / (x1 - x0)) * inner);
    const y = (value) => height - MARGIN.bottom - ((value - y0) / (y1 - y0 || 1)) * (height - MARGIN.top - MARGIN.bottom);
    scale = {x, value: (pixel) => x0 + ((pixel - MARGIN.left) / inner) * (x1 - x0)};
    for (const value of yTicks) {
      axes.append(svg('line', {class: 'grid', x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value)}),
        svg('text', {x: MARGIN.left - 7, y: y(value) + 3.5, 'text-anchor': 'end'}, tick(value)));
    }
    for (const value of ticks(x0, x1, Math.max(3, Math.floor(inner / 55))).filter((tick) => tick >= x0 && tick <= x1 && Number.isInteger(tick))) {
      axes.append(svg('text', {x: x(value), y: height - 6, 'text-anchor': 'middle'}, String(value)));
    }
    for (const one of series) {
      const path = thinned(one.points, inner).map(([px, py], index) => `${index ? 'L' : 'M'}${x(px).toFixed(1)} ${y(py).toFixed(1)}`).join('');
      plot.append(svg('path', {class: `line ${one.className}`, d: path}));
      if (one.dots || one.points.length === 1) {
        for (const [px, py] of one.points.slice(-200)) plot.append(svg('circle', {class: `dot ${one.className}`, cx: x(px), cy: y(py), r: 2.6}));
      }
    }
    readAt(at);
    attr(image, 'aria-label', `${title} by ${xName}. Latest: ${latest()}. Arrow keys read it point by point.`);
  }

  return {
    element,
    update(next) {
      series = next;
      keys.replaceChildren(...next.filter((one) => one.points.length).map((one) => h('span', {class: 'chart-key'}, svg('svg', {width: 18, height: 8, 'aria-hidden': 'true'},
        svg('path', {class: `line ${one.className}`, d: 'M0 4L18 4'}), one.dots ? svg('circle', {class: `dot ${one.className}`, cx: 9, cy: 4, r: 2.6}) : null), one.name)));
      render();
    },
  };
}

/** Round numbers that enclose a range, about `wanted` of them. */
function ticks(low, high, wanted) {
  if (low === high) {
    const around = Math.abs(low) * 0.1 || 1;
    return ticks(low - around, high + around, wanted);
  }
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const list = [];
  const from = Math.floor(low / step + 1e-9);
  const to = Math.ceil(high / step - 1e-9);
  for (let at = from; at <= to; at += 1) list.push(Number((at * step).toPrecision(12)));
  return list;
}

/** At most one point per two pixels: of more, each pair of pixels shows its lowest and its highest. */
function thinned(points, width) {
  const columns = Math.max(1, Math.floor(width / 2));
  if (points.length <= columns * 2) return points;
  const [first, last] = [points[0][0], points[points.length - 1][0]];
  const kept = [];
  let column = -1;
  let low = null;
  let high = null;
  const flush = () => { if (low) kept.push(...(low === high ? [low] : low[0] < high[0] ? [low, high] : [high, low])); };
  for (const point of points) {
    const here = Math.floor(((point[0] - first) / (last - first || 1)) * columns);
    if (here !== column) {
      flush();
      column = here;
      low = point;
      high = point;
    }
    if (point[1] < low[1]) low = point;
    if (point[1] > high[1]) high = point;
  }
  flush();
  return kept;
}
