// How a node's health looks: a shape with a word, so that colour says nothing alone.

import {attr, h, setText, svg} from './dom.js';
import {HEALTH} from './view.js';

const SHAPES = {
  ready: () => [svg('circle', {cx: 8, cy: 8, r: 7, class: 'fill'}), svg('path', {class: 'mark', d: 'M4.8 8.3l2.2 2.2 4.2-4.6'})],
  loading: () => [svg('circle', {cx: 8, cy: 8, r: 6, class: 'track'}),
    svg('circle', {cx: 8, cy: 8, r: 6, class: 'arc', pathLength: 100, 'stroke-dasharray': '0 100', transform: 'rotate(-90 8 8)'})],
  waiting: () => [svg('circle', {cx: 8, cy: 8, r: 6.2, class: 'outline'}), ...[4.9, 8, 11.1].map((cx) => svg('circle', {cx, cy: 8, r: 1, class: 'fill'}))],
  standby: () => [svg('circle', {cx: 8, cy: 8, r: 6.2, class: 'outline'})],
  draining: () => [svg('circle', {cx: 8, cy: 8, r: 6.2, class: 'outline'}), svg('path', {class: 'stroke', d: 'M8 4.4v6.4M5.2 8.4L8 11.2l2.8-2.8'})],
  drained: () => [svg('circle', {cx: 8, cy: 8, r: 6.2, class: 'outline'}), svg('path', {class: 'stroke', d: 'M5 8h6'})],
  quarantined: () => [svg('path', {class: 'fill', d: 'M8 .9L15.4 14.4H.6z'}), svg('path', {class: 'mark', d: 'M8 5.6v4.2M8 11.7v.9'})],
  lost: () => [svg('circle', {cx: 8, cy: 8, r: 6.2, class: 'outline', 'stroke-dasharray': '2.4 2.4'}), svg('path', {class: 'stroke', d: 'M5.4 5.4l5.2 5.2M10.6 5.4l-5.2 5.2'})],
};

/** The shape of a health; `update(health)`. */
export function healthIcon() {
  const element = svg('svg', {class: 'health-icon', viewBox: '0 0 16 16', width: 14, height: 14, 'aria-hidden': 'true'});
  let kind = null;
  return {
    element,
    update(health) {
      if (health.kind !== kind) {
        kind = health.kind;
        element.replaceChildren(...(SHAPES[kind] ?? SHAPES.standby)());
      }
      attr(element, 'class', `health-icon health-${kind}`);
      if (kind === 'loading') attr(element.querySelector('.arc'), 'stroke-dasharray', `${Math.round((health.share ?? 0) * 100)} 100`);
    },
  };
}

/** The word of a health, with how far it is. */
export function healthText(node) {
  const {kind, detail} = node.health;
  return kind === 'loading' ? `${HEALTH.loading} ${detail}` : HEALTH[kind];
}

/** Shape and word together. */
export function healthLabel() {
  const icon = healthIcon();
  const text = h('span');
  return {
    element: h('span', {class: 'health-label'}, icon.element, text),
    update(node) {
      icon.update(node.health);
      setText(text, healthText(node));
    },
  };
}
