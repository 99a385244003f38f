// Numbers for people.

export function bytes(value: number): string {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let at = 0;
  let rest = value;
  while (rest >= 1024 && at < units.length - 1) {
    rest /= 1024;
    at += 1;
  }
  return at === 0 ? `${Math.round(rest)} B` : `${rest < 10 ? rest.toFixed(1) : Math.round(rest)} ${units[at]}`;
}

export const rate = (value: number): string => `${bytes(value)}/s`;

export function duration(ms: number): string {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  const seconds = ms / 1000;
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(seconds % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export function ago(atMs: number, nowMs: number): string {
  const past = nowMs - atMs;
  return past < 2000 ? "now" : `${duration(past).replace(/ .. s$/, "")} ago`;
}

export const moment = (atMs: number): string => new Date(atMs).toLocaleString(undefined, { hour12: false });

/** Millionths as a percentage, rounded down: what was not whole is not shown as whole. */
export const percent = (ppm: number): string => (ppm >= 1_000_000 ? "100 %" : `${(Math.floor(ppm / 10) / 1000).toFixed(3)} %`);

/** Nano-dollars: with as many places as a small sum needs. */
export const money = (nanousd: number): string => `$${(nanousd / 1e9).toFixed(Math.abs(nanousd) >= 1e11 ? 0 : Math.abs(nanousd) >= 1e9 || nanousd === 0 ? 2 : 4)}`;

/** Nano-dollars an hour. */
export const price = (nanousd: number): string => `$${(nanousd / 1e9).toFixed(4)}/h`;

/** The feed's time, which need not be wall time: day and hour of a replayed feed. */
export function feedTime(ms: number): string {
  const AFTER_2001 = 1e12;
  if (ms > AFTER_2001) return moment(ms);
  const minutes = Math.floor(ms / 60_000);
  const two = (value: number) => String(value).padStart(2, "0");
  return `day ${Math.floor(minutes / 1440) + 1}, ${two(Math.floor(minutes / 60) % 24)}:${two(minutes % 60)}`;
}

export function eta(min: number | null | undefined, max: number | null | undefined): string {
  if (min === null || min === undefined) return "";
  if (max === null || max === undefined) return `at least ${duration(min)}`;
  return duration(min) === duration(max) ? duration(min) : `${duration(min)} – ${duration(max)}`;
}
