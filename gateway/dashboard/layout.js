// Where everything of the picture lies. Wide: a column per stage, a band per host. Narrow: one card below the other.

const CARD_HEIGHT = 108;
const ROLE = {width: 156, height: 70};
const PAD = 14;
const HEAD = 28;
const ROW_GAP = 16;
const BAND_GAP = 14;
const STANDBY_GAP = 34;
const NARROW_BELOW = 720;

/** Boxes of bands, cards and roles, paths of lines, for a view and a width in pixels. */
export function layout(view, width) {
  const nodes = view.sortedNodes();
  const now = performance.now();
  const since = (at) => (at === null ? null : (now - at) / 1000);
  const card = (node, box) => ({node, box, layersAll: view.layersOf(node.model), lostSeconds: since(node.lostAt), markedSeconds: since(node.markedAt)});
  const bands = bandsOf(nodes);
  const links = linksOf(nodes);
  return width < NARROW_BELOW ? narrow(bands, links, width, card) : wide(bands, links, width, card, view.standbys ? 1 : 0);
}

/** Hosts with their nodes in rows: a row has at most one node per stage, and standbys after the last stage. */
function bandsOf(nodes) {
  const stages = Math.max(1, ...nodes.map((node) => (node.place ? node.place.stage + 1 : 0)));
  const bands = new Map();
  // Those that live take their cells first.
  for (const node of [...nodes].sort((a, b) => (a.lostAt !== null) - (b.lostAt !== null))) {
    if (!bands.has(node.host)) bands.set(node.host, {host: node.host, rows: [], stages});
    const {rows} = bands.get(node.host);
    const column = node.place ? node.place.stage : stages;
    const key = node.place ? `${node.model ?? ''}/${node.place.replica}/${node.place.rank}` : null;
    let row = rows.find((one) => (key === null || one.key === key) && !one.cells[column]);
    if (!row) rows.push(row = {key, cells: [], order: rows.length});
    row.cells[column] = node;
  }
  const list = [...bands.values()].sort((a, b) => a.host.localeCompare(b.host, 'en', {numeric: true}));
  for (const band of list) band.rows.sort((a, b) => (a.key ?? '~').localeCompare(b.key ?? '~', 'en', {numeric: true}) || a.order - b.order);
  return list;
}

/** From each rank to the one of the same number in the next stage. */
function linksOf(nodes) {
  const at = new Map();
  for (const node of nodes) {
    if (!node.place) continue;
    const key = `${node.model ?? ''}/${node.place.replica}/${node.place.rank}/${node.place.stage}`;
    if (!at.has(key) || at.get(key).lostAt !== null) at.set(key, node);
  }
  const links = [];
  for (const from of at.values()) {
    const {replica, rank, stage} = from.place;
    const to = at.get(`${from.model ?? ''}/${replica}/${rank}/${stage + 1}`);
    if (!to) continue;
    const sends = from.sentRate === null ? (from.shares?.send ?? 0) > 0 : from.sentRate > 0;
    const state = from.lostAt !== null || to.lostAt !== null ? 'broken' : sends ? 'flow' : 'idle';
    links.push({key: `${from.name}>${to.name}`, from, to, state, rate: from.sentRate, ms: from.sendMsPerStep});
  }
  return links;
}

function hostText(band, bands) {
  const count = band.rows.reduce((sum, row) => sum + row.cells.filter(Boolean).length, 0);
  const name = band.host || (bands.length > 1 ? 'host unknown' : 'this cluster');
  return `${name} · ${count} ${count === 1 ? 'node' : 'nodes'}`;
}

function wide(bands, links, width, card, standby) {
  const stages = bands[0]?.stages ?? 1;
  const left = ROLE.width + 44;
  const room = width - left - 2 * PAD - standby * STANDBY_GAP;
  const columns = stages + standby;
  let gap = stages > 1 ? 120 : 0;
  let cardWidth = (room - (stages - 1) * gap) / columns;
  if (cardWidth < 210) {
    gap = stages > 1 ? 88 : 0;
    cardWidth = (room - (stages - 1) * gap) / columns;
  }
  cardWidth = Math.round(Math.min(320, Math.max(196, cardWidth)));
  if (stages > 1) gap = Math.max(gap, Math.min(300, (room - columns * cardWidth) / (stages - 1)));
  const x = (column) => left + PAD + column * (cardWidth + gap) + (column === stages && standby ? STANDBY_GAP - gap : 0);
  const right = x(columns - 1) + cardWidth + PAD;
  const sheetWidth = Math.max(width, right);
  const heads = [];
  for (let stage = 0; stage < stages; stage += 1) heads.push({key: `stage ${stage}`, kind: 'column', text: `stage ${stage}`, box: {x: x(stage), y: 0, width: cardWidth}});
  if (standby) heads.push({key: 'standby', kind: 'column', text: 'without a place', box: {x: x(stages), y: 0, width: cardWidth}});
  const cards = [];
  const boxes = new Map();
  let y = 24;
  for (const band of bands) {
    const height = HEAD + band.rows.length * (CARD_HEIGHT + ROW_GAP) - ROW_GAP + PAD;
    band.box = {x: left, y, width: sheetWidth - left, height};
    heads.push({key: `host ${band.host}`, kind: 'band', text: hostText(band, bands), box: {x: left + PAD, y: y + 7}});
    band.rows.forEach((row, at) => row.cells.forEach((node, column) => {
      const box = {x: x(column), y: y + HEAD + at * (CARD_HEIGHT + ROW_GAP), width: cardWidth, height: CARD_HEIGHT};
      boxes.set(node.name, box);
      cards.push(card(node, box));
    }));
    y += height + BAND_GAP;
  }
  const height = Math.max(y - BAND_GAP, 24 + 2 * ROLE.height + 48);
  const middle = 24 + (height - 24) / 2;
  const gateway = {x: 0, y: middle - ROLE.height - 22, ...ROLE};
  const scheduler = {x: 0, y: middle + 22, ...ROLE};
  const bus = ROLE.width + 22;
  const from = scheduler.y + ROLE.height / 2;
  let control = `M${ROLE.width / 2} ${gateway.y + ROLE.height}V${scheduler.y}`;
  for (const {node, box} of cards) {
    if (!node.place || node.place.stage !== 0 || node.lostAt !== null) continue;
    control += `M${ROLE.width} ${from}H${bus}V${box.y + box.height / 2}H${box.x}`;
  }
  return {
    width: sheetWidth, height, narrow: false, bands, heads, cards, gateway, scheduler, control,
    links: links.map((link) => {
      const [a, b] = [boxes.get(link.from.name), boxes.get(link.to.name)];
      const [x1, y1, x2, y2] = [a.x + a.width, a.y + a.height / 2, b.x, b.y + b.height / 2];
      const bend = (x2 - x1) / 2;
      return {...link, path: `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`, label: {x: (x1 + x2) / 2, y: (y1 + y2) / 2}};
    }),
  };
}

function narrow(bands, links, width, card) {
  const half = (width - 28) / 2;
  const gateway = {x: 0, y: 0, width: half, height: ROLE.height};
  const scheduler = {x: half + 28, y: 0, width: half, height: ROLE.height};
  let control = `M${half} ${ROLE.height / 2}h28`;
  const [heads, cards, drawn] = [[], [], []];
  let y = ROLE.height + 22;
  control += `M${half + 28 + half / 2} ${ROLE.height}V${y}`;
  for (const band of bands) {
    const top = y;
    heads.push({key: `host ${band.host}`, kind: 'band', text: hostText(band, bands), box: {x: PAD, y: y + 7}});
    y += HEAD;
    const order = band.rows.flatMap((row) => row.cells.filter(Boolean));
    order.forEach((node, at) => {
      cards.push(card(node, {x: PAD, y, width: width - 2 * PAD, height: CARD_HEIGHT}));
      y += CARD_HEIGHT;
      const link = links.find((one) => one.from === node);
      if (link) {
        const next = order[at + 1] === link.to;
        const middle = width / 2;
        drawn.push({...link, named: !next, path: `M${middle} ${y}v${next ? 46 : 12}`, label: {x: middle, y: y + 23}});
        y += 46;
      } else {
        y += at + 1 < order.length ? ROW_GAP : 0;
      }
    });
    y += PAD;
    band.box = {x: 0, y: top, width, height: y - top};
    y += BAND_GAP;
  }
  return {width, height: y - BAND_GAP, narrow: true, bands, heads, cards, gateway, scheduler, control, links: drawn};
}
