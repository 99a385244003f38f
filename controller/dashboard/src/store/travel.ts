// What follows from a volume's history: pure, so that it is tested without a browser.
import type { HistoryPolicy, VolumeHistory, VolumePoint } from "../api/types";

/** The newest point that is not younger than the instant; of several of one instant the last. */
export function pointAsOf(points: VolumePoint[], atMs: number): VolumePoint | undefined {
  let found: VolumePoint | undefined;
  for (const point of points) if (point.at_ms <= atMs) found = point;
  return found;
}

/** Where points lie between the ends of the slider, 0 to 1. */
export function marks(points: VolumePoint[], from: number, until: number): number[] {
  const span = Math.max(1, until - from);
  return points.map((point) => Math.min(1, Math.max(0, (point.at_ms - from) / span)));
}

const UNITS: Record<string, number> = { s: 1, m: 60, h: 3600, d: 86_400 };

/** `15m`, `2d`, `90` seconds; null of what is none. */
export function seconds(text: string): number | null {
  const found = /^(\d{1,9})([smhd]?)$/.exec(text.trim());
  return found ? Number(found[1]) * UNITS[found[2] || "s"]! : null;
}

/** `4h:15m 2d:1h`: points of up to an age, and the gap to which they are thinned; null of what is none. */
export function bands(text: string): HistoryPolicy["keep"] | null {
  const words = text.trim().split(/[\s,]+/).filter(Boolean);
  if (words.length === 0 || words.length > 8) return null;
  const found: HistoryPolicy["keep"] = [];
  for (const word of words) {
    const [age, gap, more] = word.split(":");
    const [for_s, every_s] = [seconds(age ?? ""), seconds(gap ?? "")];
    if (for_s === null || every_s === null || more !== undefined) return null;
    found.push({ for_s, every_s });
  }
  return found;
}

function short(s: number): string {
  for (const [unit, length] of [["d", 86_400], ["h", 3600], ["m", 60]] as const) if (s >= length && s % length === 0) return `${s / length}${unit}`;
  return `${s}s`;
}

export const bandsText = (keep: HistoryPolicy["keep"]): string => keep.map((band) => `${short(band.for_s)}:${short(band.every_s)}`).join(" ");
export const everyText = (every: number | null | undefined): string => (every ? short(every) : "");

/** What all points together had stored. */
export const stored = (history: VolumeHistory): number => history.points.reduce((sum, point) => sum + point.stored_bytes, 0);
