// Numbers, sizes and times as people read them. Everything takes `null` for unknown and answers with a dash.

const DASH = '–';
const integers = new Intl.NumberFormat('en', {maximumFractionDigits: 0});

const known = (value) => typeof value === 'number' && Number.isFinite(value);

/** Three significant digits at most: 0.31, 4.2, 17, 1,234. */
export function number(value) {
  if (!known(value)) return DASH;
  const size = Math.abs(value);
  if (size !== 0 && size < 0.0095) return value.toExponential(1);
  if (size < 1) return trimmed(value, 2);
  return size < 9.95 ? trimmed(value, 1) : integers.format(value);
}

/** Three significant digits, all of them shown: 2.26, 0.0412. */
export function precise(value) {
  if (!known(value)) return DASH;
  return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(2) : String(value.toPrecision(3));
}

/** A round number on an axis. */
export function tick(value) {
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e6) ? String(Number(value.toPrecision(4)).toExponential()) : String(Number(value.toPrecision(6)));
}

/** A round share on an axis. */
export function percentTick(share) {
  return `${Number((share * 100).toPrecision(4))} %`;
}

function trimmed(value, digits) {
  return String(Number(value.toFixed(digits)));
}

/** A whole number: 12,345. */
export function count(value) {
  return known(value) ? integers.format(value) : DASH;
}

/** A number with its noun: `1 node`, `2 nodes`. */
export function counted(value, noun, plural = `${noun}s`) {
  return `${count(value)} ${value === 1 ? noun : plural}`;
}

const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];

/** Bytes: 102.4 MiB. */
export function bytes(value) {
  if (!known(value)) return DASH;
  let size = value;
  let unit = 0;
  while (Math.abs(size) >= 1000 && unit < UNITS.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${unit === 0 || size >= 99.95 ? integers.format(size) : size.toFixed(1)} ${UNITS[unit]}`;
}

/** A share of 1: 37 %. */
export function percent(share) {
  if (!known(share)) return DASH;
  const value = share * 100;
  return `${value > 0 && value < 9.95 ? trimmed(value, 1) : integers.format(value)} %`;
}

/** Milliseconds: 0.31 ms, 42 ms, 1.8 s, 2 min 5 s. */
export function ms(value) {
  if (!known(value)) return DASH;
  if (value < 1000) return `${value < 0.095 && value > 0 ? trimmed(value, 3) : number(value)} ms`;
  return value < 59_950 ? `${(value / 1000).toFixed(1)} s` : duration(value / 1000);
}

/** Seconds: 8 s, 2 min 5 s, 3 h 10 min, 2 d 4 h. */
export function duration(seconds) {
  if (!known(seconds)) return DASH;
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min${whole % 60 ? ` ${whole % 60} s` : ''}`;
  const minutes = Math.round(whole / 60);
  if (minutes < 1440) return `${Math.floor(minutes / 60)} h${minutes % 60 ? ` ${minutes % 60} min` : ''}`;
  const hours = Math.round(minutes / 60);
  return `${Math.floor(hours / 24)} d${hours % 24 ? ` ${hours % 24} h` : ''}`;
}

/** How long ago a Unix time was: `12 s ago`. */
export function ago(unixSeconds, now = Date.now() / 1000) {
  if (!known(unixSeconds)) return DASH;
  const age = now - unixSeconds;
  return age < 1.5 ? 'just now' : `${duration(age)} ago`;
}

/** A Unix time as the clock of the reader shows it. */
export function clock(unixSeconds) {
  if (!known(unixSeconds)) return DASH;
  const date = new Date(unixSeconds * 1000);
  const time = date.toLocaleTimeString('en-GB');
  return date.toDateString() === new Date().toDateString() ? time : `${date.toLocaleDateString('en-CA')} ${time}`;
}

/** A range of layers, whose end is exclusive: `layers 0–1`. */
export function layers(range) {
  if (!range || range.end <= range.start) return 'no layers';
  return range.end - range.start === 1 ? `layer ${range.start}` : `layers ${range.start}–${range.end - 1}`;
}

/** A place: `replica 0 · stage 1 · rank 0`. */
export function place(at) {
  return at ? `replica ${at.replica} · stage ${at.stage} · rank ${at.rank}` : 'no place';
}

/** At most so many characters, with what was cut off shown by an ellipsis. */
export function short(text, most) {
  const characters = Array.from(String(text ?? ''));
  return characters.length <= most ? characters.join('') : `${characters.slice(0, most - 1).join('')}…`;
}
