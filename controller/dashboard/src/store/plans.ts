// What follows from plans: pure, so that it is tested without a browser.
import type { FleetPlan, Guest, Host, PlanKind, PlanState, PlanStep } from "../api/types";

export function isAtRest(state: PlanState): boolean {
  return state !== "running" && state !== "cancelling" && state !== "undoing";
}

/** What may be asked of a plan in a state; the controller has the last word. */
export function offers(plan: FleetPlan): ("apply" | "cancel" | "undo")[] {
  switch (plan.state) {
    case "proposed": return plan.steps.length + plan.cordons.length > 0 ? ["apply", "cancel"] : ["cancel"];
    case "running": case "undoing": return ["cancel"];
    case "done": case "failed": case "cancelled":
      // Of what never began nothing can be taken back.
      return plan.steps.some((step) => step.state === "done" || step.state === "not_undone") || plan.cordons.some((cordon) => cordon.state === "cordoned") ? ["undo"] : [];
    default: return [];
  }
}

export const KINDS: Record<PlanKind, string> = { drain: "Drain", evacuate: "Evacuate", rebalance: "Rebalance", gather: "Gather" };

/** A plan in a few words: `Drain h3`. */
export function title(plan: FleetPlan, hosts: ReadonlyMap<string, { name: string }>, clouds: ReadonlyMap<string, { name: string }>): string {
  const where = plan.host ? (hosts.get(plan.host)?.name ?? plan.host) : plan.cloud ? (clouds.get(plan.cloud)?.name ?? plan.cloud) : "";
  switch (plan.kind) {
    case "rebalance": return "Rebalance";
    case "gather": return `Gather ${plan.steps.length + plan.stuck.length} in ${where}`;
    default: return `${KINDS[plan.kind]} ${where}`;
  }
}

export interface Load {
  id: string;
  name: string;
  cloud: string;
  /** Parts of the host's memory, 0 to 1 and more. */
  memoryNow: number;
  memoryThen: number;
  guestsNow: number;
  guestsThen: number;
}

const isAhead = (step: PlanStep): boolean => step.state === "pending" || step.state === "running";

/** How full the hosts of a plan are now, and will be when its steps that are still ahead are made. */
export function loads(plan: FleetPlan, hosts: ReadonlyMap<string, Host>, guests: ReadonlyMap<string, Guest>): Load[] {
  const ahead = plan.steps.filter(isAhead);
  if (ahead.length === 0) return [];
  const concerned = new Set([...ahead.flatMap((step) => [step.from, step.to]), ...plan.cordons.map((cordon) => cordon.host)]);
  const here = new Map<string, number>();
  for (const guest of guests.values()) {
    if (guest.host && guest.state === "running") here.set(guest.host, (here.get(guest.host) ?? 0) + 1);
  }
  const found: Load[] = [];
  for (const id of concerned) {
    const host = hosts.get(id);
    if (!host) continue;
    let memory = 0;
    let count = 0;
    for (const step of ahead) {
      const sign = step.to === id ? 1 : step.from === id ? -1 : 0;
      // A guest's memory travels once at least.
      memory += sign * (guests.get(step.guest)?.shape.memory_bytes ?? step.predicted_bytes);
      count += sign;
    }
    const all = Math.max(1, host.capacity.memory_bytes);
    const now = here.get(id) ?? 0;
    found.push({
      id, name: host.name, cloud: host.cloud_name,
      memoryNow: host.used.memory_bytes / all, memoryThen: Math.max(0, host.used.memory_bytes + memory) / all,
      guestsNow: now, guestsThen: Math.max(0, now + count),
    });
  }
  return found.sort((a, b) => a.name.localeCompare(b.name));
}

/** How many steps are in which state, in the order of the first of each. */
export function tally(steps: PlanStep[]): [PlanStep["state"], number][] {
  const found = new Map<PlanStep["state"], number>();
  for (const step of steps) found.set(step.state, (found.get(step.state) ?? 0) + 1);
  return [...found];
}
