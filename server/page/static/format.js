// Numbers as people read them. English, like the rest of the page.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** 65,536 */
export function count(number) {
  return whole.format(number);
}

/** Bytes with three digits: 2.76 MiB, 0.989 MiB. */
export function bytes(number) {
  let unit = 0;
  let size = number;
  while (size >= 1000 && unit < UNITS.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${unit === 0 || size >= 100 ? size.toFixed(0) : size.toPrecision(3)} ${UNITS[unit]}`;
}

/** A share of 0..1: 0 %, < 0.1 %, 0.4 %, 12 %. */
export function percent(share) {
  const hundredths = 100 * share;
  if (hundredths > 0 && hundredths < 0.1) return "< 0.1 %";
  return `${hundredths > 0 && hundredths < 1 ? hundredths.toFixed(1) : hundredths.toFixed(0)} %`;
}

/** A rate: 0, 7.3, 812. */
export function rate(number) {
  return number > 0 && number < 10 ? number.toFixed(1) : count(number);
}

/** A duration in seconds: 4.1 ms, 3.2 s, 8 s, 2 min 5 s. */
export function duration(seconds) {
  if (seconds < 0.01) return `${(1000 * seconds).toFixed(1)} ms`;
  if (seconds < 1) return `${(1000 * seconds).toFixed(0)} ms`;
  if (seconds < 10) return `${Number(seconds.toFixed(1))} s`;
  if (seconds < 60) return `${seconds.toFixed(0)} s`;
  const minutes = Math.floor(seconds / 60);
  const rest = Math.round(seconds - 60 * minutes);
  return minutes < 60 ? `${minutes} min ${rest} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
