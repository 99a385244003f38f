// A network as it is drawn: hosts with its ports, and the tunnels between them. Pure, so that it is tested without a browser.
import type { Host, Port } from "../api/types";

export interface Node { id: string; name: string; cloud: string; state: string; ports: Port[]; x: number; y: number }
export interface Tunnel { a: Node; b: Node }
export interface Topology { nodes: Node[]; tunnels: Tunnel[]; away: Port[]; leftOut: number; height: number }

/** As many hosts are drawn; their number of tunnels is its square. */
export const MOST_HOSTS = 12;
export const WIDTH = 760;
export const HEIGHT = 400;
/** Two hosts stand side by side. */
const LOW = 110;

/** Hosts on an ellipse, those of one cloud side by side; between any two of them there is a tunnel. Ports that are nowhere stand aside. */
export function topology(ports: Port[], hosts: ReadonlyMap<string, Host>): Topology {
  const byHost = new Map<string, Port[]>();
  const away: Port[] = [];
  for (const port of ports) {
    if (port.host) byHost.set(port.host, [...(byHost.get(port.host) ?? []), port]);
    else away.push(port);
    // A destination that is being prepared has its tunnels already.
    if (port.prepared_at && !byHost.has(port.prepared_at)) byHost.set(port.prepared_at, []);
  }
  const found = [...byHost].map(([id, own]) => {
    const host = hosts.get(id);
    return { id, name: host?.name ?? id.slice(0, 13), cloud: host?.cloud_name ?? "", state: host?.state ?? "unreachable", ports: own };
  });
  found.sort((a, b) => a.cloud.localeCompare(b.cloud) || a.name.localeCompare(b.name));
  const shown = found.slice(0, MOST_HOSTS);
  const height = shown.length <= 2 ? LOW : HEIGHT;
  const nodes = shown.map((one, at): Node => {
    const angle = shown.length === 1 ? Math.PI / 2 : (2 * Math.PI * at) / shown.length - Math.PI;
    return { ...one, x: WIDTH / 2 + (shown.length === 1 ? 0 : (WIDTH / 2 - 110) * Math.cos(angle)), y: height / 2 + (shown.length <= 2 ? 0 : (height / 2 - 60) * Math.sin(angle)) };
  });
  const tunnels = nodes.flatMap((a, at) => nodes.slice(at + 1).map((b) => ({ a, b })));
  return { nodes, tunnels, away, leftOut: found.length - shown.length, height };
}
