// Networks: which hosts have their ports, the tunnels between them, and what a switch does with a port.
import type { Port, PortFlows } from "../api/types";
import { MOST_HOSTS, WIDTH, topology } from "../store/topology";
import { guests, hosts, networks, now, ports, projects } from "../store/store";
import { between, linkText } from "../store/ways";
import { useAnswer } from "../ui/answer";
import { useLinksOf } from "../ui/links";
import { ago, bytes, duration } from "../ui/format";
import { Empty, Facts, Grid, GuestLink, HostLink, Panel, State, hostName } from "../ui/parts";

const portsOf = (network: string): Port[] => [...ports.value.values()].filter((port) => port.network === network);

export function Networks() {
  const rows = [...networks.value.values()].map((network) => {
    const own = portsOf(network.id);
    return { ...network, own, at: new Set(own.map((port) => port.host).filter(Boolean)).size };
  });
  return (
    <Panel title={`Networks (${rows.length})`} wide>
      <Grid name="networks" items={rows} empty={<>No network yet: <code>supercloud network create NAME --cidr 10.20.0.0/24</code></>} columns={[
        { title: "name", key: (network) => network.name, show: (network) => <a href={`#/networks/${network.id}`}>{network.name}</a> },
        { title: "prefix", key: (network) => network.cidr, show: (network) => network.cidr },
        { title: "ports", key: (network) => network.own.length, show: (network) => network.own.length },
        { title: "hosts", key: (network) => network.at, show: (network) => network.at },
        { title: "gateway", show: (network) => network.gateway, wide: true },
        { title: "MTU", key: (network) => network.mtu, show: (network) => network.mtu, wide: true },
        { title: "VNI", key: (network) => network.vni, show: (network) => network.vni, wide: true },
        { title: "project", show: (network) => projects.value.get(network.project)?.name ?? network.project, wide: true },
      ]} />
    </Panel>
  );
}

/** The network as the hosts span it: who has ports, and the tunnels between them with their round trips. */
function Drawing(props: { name: string; ports: Port[] }) {
  const found = topology(props.ports, hosts.value);
  const links = useLinksOf(found.nodes.map((node) => node.id));
  if (found.nodes.length === 0) return <Empty>None of its guests runs: it spans no host.</Empty>;
  const tunnels = found.tunnels.map((tunnel) => ({ ...tunnel, link: between(links, tunnel.a.id, tunnel.b.id) }));
  const count = (number: number, what: string) => `${number} ${what}${number === 1 ? "" : "s"}`;
  const text = `${props.name}: ${count(found.nodes.length, "host")}, ${count(tunnels.length, "tunnel")}`;
  return (
    <>
      <div class="topology" tabIndex={0} role="region" aria-label={`drawing of ${props.name}`}>
        <svg viewBox={`0 0 ${WIDTH} ${found.height}`} role="img" aria-label={text}>
          {tunnels.map(({ a, b, link }) => <line key={a.id + b.id} class={link?.state ?? "not_measured"} x1={a.x} y1={a.y} x2={b.x} y2={b.y} />)}
          {tunnels.length <= 15 && tunnels.map(({ a, b, link }) => <text key={a.id + b.id} class="rtt" x={(a.x + b.x) / 2} y={(a.y + b.y) / 2 - 5}>{linkText(link)}</text>)}
          {found.nodes.map((node) => (
            <g key={node.id} class={`node ${node.state}`}>
              <rect x={node.x - 105} y={node.y - 32} width="210" height="64" rx="8" />
              <text x={node.x} y={node.y - 12} class="name">{node.name.length > 22 ? `${node.name.slice(0, 21)}…` : node.name}</text>
              <text x={node.x} y={node.y + 5} class="cloud-name">{node.cloud}</text>
              <text x={node.x} y={node.y + 22}>{node.ports.length === 0 ? "being prepared" : node.ports.length <= 2 ? node.ports.map((port) => guests.value.get(port.guest)?.name ?? port.ipv4).join(", ").slice(0, 30) : `${node.ports.length} ports`}</text>
            </g>
          ))}
        </svg>
      </div>
      {found.leftOut > 0 && <p class="small">{found.leftOut} more hosts are not drawn: the first {MOST_HOSTS} by cloud and name are.</p>}
      {found.away.length > 0 && <p class="small">{found.away.length} {found.away.length === 1 ? "port is" : "ports are"} nowhere now: their guests do not run.</p>}
      {tunnels.length > 0 && (
        <Grid name={`tunnels of ${props.name}`} items={tunnels.map((tunnel) => ({ ...tunnel, id: tunnel.a.id + tunnel.b.id }))} empty="" columns={[
          { title: "tunnel", key: (one) => one.a.name, show: (one) => `${one.a.name} ↔ ${one.b.name}` },
          { title: "round trip between the hosts", key: (one) => one.link?.rtt_us ?? Infinity, show: (one) => linkText(one.link) },
          { title: "clouds", show: (one) => (one.a.cloud === one.b.cloud ? one.a.cloud : `${one.a.cloud} ↔ ${one.b.cloud}`), wide: true },
        ]} />
      )}
    </>
  );
}

export function NetworkPage(props: { id: string }) {
  const network = [...networks.value.values()].find((one) => one.id === props.id || one.name === props.id);
  if (!network) return <Panel title="No such network" wide><Empty>There is no network {props.id}, or this token does not see it.</Empty></Panel>;
  const own = portsOf(network.id);
  return (
    <div class="tiles">
      <Panel title={network.name} wide>
        <Facts rows={[
          ["prefix", network.cidr], ["gateway", network.gateway], ["MTU", String(network.mtu)], ["VNI", String(network.vni)],
          ["name servers", network.dns.join(", ") || "none"], ["project", projects.value.get(network.project)?.name ?? network.project],
        ]} />
      </Panel>
      <Panel title="Hosts and tunnels" wide><Drawing name={network.name} ports={own} /></Panel>
      <Panel title={`Ports (${own.length})`} wide>
        <Grid name={`ports of ${network.name}`} items={own} empty="no port" columns={[
          { title: "guest", key: (port) => guests.value.get(port.guest)?.name ?? "", show: (port) => <GuestLink id={port.guest} /> },
          { title: "address", key: (port) => port.ipv4, show: (port) => <a href={`#/ports/${port.id}`}>{port.ipv4}</a> },
          { title: "at", key: (port) => hostName(port.host), show: (port) => <HostLink id={port.host} /> },
          { title: "MAC", key: (port) => port.mac, show: (port) => <code>{port.mac}</code>, wide: true },
          { title: "being prepared at", show: (port) => <HostLink id={port.prepared_at} />, wide: true },
          { title: "forwarded by", show: (port) => <HostLink id={port.moved_from} />, wide: true },
        ]} />
      </Panel>
    </div>
  );
}

const PURPOSES: Record<PortFlows["flows"][number]["purpose"], string> = {
  guest: "what the guest may send", dhcp: "asks for its address", metadata: "metadata service", tunnel: "comes by a tunnel", deliver: "delivered to it",
  remote: "carried to its host", forward: "passed on after a move", flood: "broadcasts of its network", other: "other",
};

/** How a frame from another guest of the network gets here. */
function Paths(props: { port: Port }) {
  const { port } = props;
  const others = portsOf(port.network).filter((one) => one.id !== port.id && one.host);
  const links = useLinksOf(port.host ? [port.host] : []);
  if (!port.host || others.length === 0) return <Empty>{port.host ? "No other guest of the network runs." : "Its guest runs nowhere."}</Empty>;
  const rows = others.map((one) => ({ ...one, link: one.host === port.host ? undefined : between(links, one.host!, port.host!) }));
  return (
    <Grid name="paths" items={rows} empty="" columns={[
      { title: "to", key: (one) => guests.value.get(one.guest)?.name ?? "", show: (one) => <GuestLink id={one.guest} /> },
      { title: "by", key: (one) => hostName(one.host), show: (one) => (one.host === port.host ? "the same switch" : <>tunnel {hostName(port.host)} ↔ {hostName(one.host)}</>) },
      { title: "round trip between the hosts", key: (one) => one.link?.rtt_us ?? -1, show: (one) => (one.host === port.host ? "–" : linkText(one.link)) },
      { title: "address", show: (one) => one.ipv4, wide: true },
    ]} />
  );
}

export function PortPage(props: { id: string }) {
  const port = ports.value.get(props.id);
  const EVERY_MS = 5000;
  const { value: told, problem } = useAnswer<PortFlows>(`/v1/ports/${props.id}/flows`, `${port?.host}`, port?.host ? EVERY_MS : 0);
  if (!port) return <Panel title="No such port" wide><Empty>There is no port {props.id}, or this token does not see it.</Empty></Panel>;
  const flows = (told?.flows ?? []).map((flow, at) => ({ ...flow, id: String(at) }));
  return (
    <div class="tiles">
      <Panel title={`${guests.value.get(port.guest)?.name ?? "port"}: ${port.ipv4}`} wide aside={told && <small>asked of {told.host_name} {ago(told.asked_at_ms, now.value)}</small>}>
        <Facts rows={[
          ["guest", <GuestLink id={port.guest} />],
          ["network", <a href={`#/networks/${port.network}`}>{networks.value.get(port.network)?.name ?? port.network}</a>],
          ["at", <HostLink id={port.host} />],
          ["MAC", <code>{port.mac}</code>],
          ...(told ? [
            ["the guest sent", `${bytes(told.traffic.sent_bytes)}, ${told.traffic.sent_packets} packets`] as [string, string],
            ["it was given", `${bytes(told.traffic.received_bytes)}, ${told.traffic.received_packets} packets`] as [string, string],
            ["dropped at the port", `${told.traffic.dropped_packets} packets`] as [string, string],
          ] : []),
        ]} />
      </Panel>
      <Panel title={told ? `Flows (${told.flows.length}${told.left_out > 0 ? ` of ${told.flows.length + told.left_out}` : ""})` : "Flows"} wide>
        {problem ? <p class="warn" role="status">{problem}</p> : !told ? <Empty>The host's switch is being asked…</Empty> : (
          <Grid name="flows" items={flows} empty="Its switch holds no flow for it." columns={[
            { title: "for", key: (flow) => flow.purpose, show: (flow) => PURPOSES[flow.purpose] },
            { title: "packets", key: (flow) => flow.packets, show: (flow) => flow.packets },
            { title: "bytes", key: (flow) => flow.bytes, show: (flow) => bytes(flow.bytes) },
            { title: "then", show: (flow) => <code title={flow.actions}>{flow.actions}</code> },
            { title: "table", key: (flow) => flow.table * 65_536 - flow.priority, show: (flow) => `${flow.table}, priority ${flow.priority}`, wide: true },
            { title: "packets that", show: (flow) => <code title={flow.matching}>{flow.matching}</code>, wide: true },
            { title: "since", key: (flow) => flow.age_s, show: (flow) => duration(flow.age_s * 1000), wide: true },
          ]} />
        )}
      </Panel>
      <Panel title="Paths to the others of its network" wide><Paths port={port} /></Panel>
      {port.moved_from && <Panel title="After the move" wide><p><State of="busy" /> What still arrives at <HostLink id={port.moved_from} /> is passed on.</p></Panel>}
    </div>
  );
}
