import { useState } from "preact/hooks";
import type { Host } from "../api/types";
import { may } from "../store/derive";
import { hostRisk, priced } from "../store/risk";
import { areAllWays, clouds, evacuations, events, guests, hosts, markets, now, rentings, ways, who } from "../store/store";
import { ago, bytes, moment, price } from "../ui/format";
import { Empty, Facts, Grid, Panel, State, room } from "../ui/parts";
import { Sure } from "../ui/dialog";
import { LinkGrid, useLinksOf } from "../ui/links";
import { PlanButton } from "../ui/plan_ask";
import { EventLine } from "./events";

const SUBSTRATES: Record<string, string> = {
  hardware: "the processor's own virtualization", nested_hardware: "virtualization handed through to a virtual machine",
  pvm: "page-table virtualization", emulation_only: "/dev/kvm emulates: not used", none: "no usable /dev/kvm",
};

interface Measured { ns_per_instruction?: number; ns_per_exit?: number; reason?: string }
interface Probe { substrate?: string; kvm?: Record<string, Measured>; machine?: { cpu_vendor?: string; hypervisor?: string | null; product?: string | null; cpus?: number; memory_bytes?: number; nics?: { name: string; driver: string }[] } }

/** What was measured, as far as this page knows the words; the rest is below it as it was told. */
function ProbeFacts(props: { probe: Probe | null }) {
  if (!props.probe) return <Empty>Its agent told nothing of it.</Empty>;
  const { substrate, kvm, machine } = props.probe;
  const found = Object.values(kvm ?? {}).find((one) => one && typeof one === "object");
  const rows: [string, string][] = [];
  if (substrate) rows.push(["gives", SUBSTRATES[substrate] ?? substrate]);
  if (found?.ns_per_instruction !== undefined) rows.push(["a guest's instruction", `${found.ns_per_instruction.toPrecision(3)} ns`]);
  if (found?.ns_per_exit !== undefined) rows.push(["an exit and back", `${Math.round(found.ns_per_exit)} ns`]);
  if (found?.reason) rows.push(["because", found.reason]);
  if (machine?.cpu_vendor) rows.push(["processor", `${machine.cpus ?? "?"} × ${machine.cpu_vendor}`]);
  if (machine?.hypervisor !== undefined) rows.push(["below it", machine.hypervisor ?? "a real machine"]);
  if (machine?.product) rows.push(["product", machine.product]);
  if (machine?.nics && machine.nics.length > 0) rows.push(["network cards", machine.nics.map((nic) => `${nic.name} (${nic.driver})`).join(", ")]);
  return (
    <>
      {rows.length > 0 && <Facts rows={rows} />}
      <details><summary>as told by its agent</summary><pre tabIndex={0}>{JSON.stringify(props.probe, null, 1)}</pre></details>
    </>
  );
}

const percent = (part: number): string => `${Math.round(part * 100)} %`;

/** Hosts that are rented, on their way, or were: what a provider was asked for and what became of it. */
function Rentings() {
  const found = [...rentings.value.values()].sort((a, b) => b.created_at_ms - a.created_at_ms);
  if (found.length === 0) return null;
  return (
    <Panel title={`Rented (${found.filter((one) => one.state !== "ended").length})`} wide>
      <Grid name="rentings" items={found} empty="" columns={[
        { title: "host", key: (one) => one.host_name, show: (one) => <a href={`#/hosts/${one.host_name}`}>{one.host_name}</a> },
        { title: "state", key: (one) => one.state, show: (one) => <State of={one.state} /> },
        { title: "cloud", key: (one) => one.cloud_name, show: (one) => one.cloud_name },
        { title: "what", key: (one) => one.instance_type, show: (one) => `${one.instance_type}, ${one.tenure.replaceAll("_", " ")}` },
        { title: "at most", key: (one) => one.max_price_nanousd_per_hour ?? 0, show: (one) => (one.max_price_nanousd_per_hour ? price(one.max_price_nanousd_per_hour) : "–"), wide: true },
        { title: "instance", show: (one) => one.instance ?? "–", wide: true },
        { title: "asked for", key: (one) => one.created_at_ms, show: (one) => <a href={`#/operations/${one.rent_operation}`}>{ago(one.created_at_ms, now.value)}</a>, wide: true },
        { title: "ended", show: (one) => (one.end ?? one.ending_as ?? "–").replaceAll("_", " "), wide: true },
      ]} />
    </Panel>
  );
}

function Clouds() {
  const found = [...clouds.value.values()];
  if (found.length === 0) return null;
  const of = (cloud: string) => [...hosts.value.values()].filter((host) => host.cloud === cloud && host.state !== "removed");
  const running = (cloud: string) => [...guests.value.values()].filter((guest) => guest.cloud === cloud && guest.state === "running").length;
  return (
    <Panel title={`Clouds (${found.length})`} wide aside={<PlanButton aim={{ kind: "rebalance", name: "all hosts" }} text="Rebalance…" />}>
      <Grid name="clouds" items={found} empty="" columns={[
        { title: "name", key: (cloud) => cloud.name, show: (cloud) => cloud.name },
        { title: "hosts", key: (cloud) => of(cloud.id).length, show: (cloud) => of(cloud.id).length },
        { title: "guests running", key: (cloud) => running(cloud.id), show: (cloud) => running(cloud.id) },
        { title: "provider", key: (cloud) => cloud.provider, show: (cloud) => cloud.provider, wide: true },
        { title: "", show: (cloud) => (of(cloud.id).length === 0 ? null : <PlanButton aim={{ kind: "evacuate", cloud: cloud.id, name: cloud.name }} text="Evacuate…" />) },
      ]} />
    </Panel>
  );
}

export function Hosts() {
  const found = [...hosts.value.values()].filter((host) => host.state !== "removed").map((host) => {
    const { market, renting } = priced(host, rentings.value.values(), markets.value);
    return { ...host, market, renting, risk: hostRisk(host, renting, evacuations.value) };
  });
  return (
    <div class="tiles">
      <Panel title={`Hosts (${found.length})`} wide>
        <Grid name="hosts" tall items={found} empty={<>No host yet: <code>supercloud host join-token NAME --cloud CLOUD</code></>} columns={[
          { title: "name", key: (host) => host.name, show: (host) => <a href={`#/hosts/${host.name}`}>{host.name}</a> },
          { title: "cloud", key: (host) => host.cloud_name, show: (host) => host.cloud_name },
          { title: "state", key: (host) => host.state, show: (host) => <State of={host.state} /> },
          { title: "vCPU", key: (host) => host.used.vcpus, show: (host) => `${host.used.vcpus} / ${host.capacity.vcpus}` },
          { title: "memory", key: (host) => host.used.memory_bytes, show: (host) => `${bytes(host.used.memory_bytes)} / ${bytes(host.capacity.memory_bytes)}` },
          { title: "price", key: (host) => host.market?.price_nanousd_per_hour ?? -1, show: (host) => (host.market ? price(host.market.price_nanousd_per_hour) : host.renting ? "not known" : "–") },
          { title: "risk", key: (host) => host.risk.text, show: (host) => <span class={host.risk.tone}>{host.risk.text}</span> },
          { title: "runs", key: (host) => host.compat_classes[0]?.accelerator ?? "", show: (host) => host.compat_classes.map((one) => `${one.back_end}/${one.accelerator}`).join(", "), wide: true },
          { title: "heard of", key: (host) => host.last_seen_ms, show: (host) => ago(host.last_seen_ms, now.value), wide: true },
        ]} />
      </Panel>
      <Clouds />
      <Panel title={`Links between hosts (${ways.value.length}${areAllWays.value ? "" : " of more"})`} wide><LinkGrid name="links" links={ways.value} /></Panel>
      <Rentings />
    </div>
  );
}

/** What it can run: a machine has many CPU baselines, which are told where they are asked for. */
function Classes(props: { host: Host }) {
  const found = new Map<string, string[]>();
  for (const one of props.host.compat_classes) {
    const machine = `${one.back_end}/${one.accelerator}/${one.machine_version}`;
    found.set(machine, [...(found.get(machine) ?? []), one.cpu_baseline]);
  }
  if (found.size === 0) return <>nothing</>;
  return <>{[...found].map(([machine, baselines]) => (baselines.length === 1 ? <div key={machine}>{machine}/{baselines[0]}</div> : <details key={machine}><summary>{machine}, {baselines.length} CPU baselines</summary><small>{baselines.join(", ")}</small></details>))}</>;
}

export function HostPage(props: { id: string }) {
  const [isAsked, setAsked] = useState(false);
  const host = [...hosts.value.values()].find((one) => one.name === props.id || one.id === props.id);
  const links = useLinksOf(host ? [host.id] : []);
  if (!host) return <Panel title="No such host" wide><Empty>There is no host {props.id}.</Empty></Panel>;
  const own = [...guests.value.values()].filter((guest) => guest.host === host.id);
  const told = events.value.filter((event) => event.host === host.id).slice(-30).reverse();
  const { market, renting: rented } = priced(host, rentings.value.values(), markets.value);
  const risk = hostRisk(host, rented, evacuations.value);
  const isCordoned = host.state === "cordoned";
  return (
    <div class="tiles">
      <Panel title={host.name} wide aside={<span class="line"><State of={host.state} />{host.state !== "removed" && <PlanButton aim={{ kind: "drain", host: host.id, name: host.name }} text="Drain…" />}{may(who.value, "system") && host.state !== "removed" && <button onClick={() => setAsked(true)}>{isCordoned ? "Take guests again…" : "Take no new guests…"}</button>}</span>}>
        {isAsked && (
          <Sure title={isCordoned ? `${host.name} takes guests again` : `${host.name} takes no new guests`} verb={isCordoned ? "Take guests again" : "Take no new guests"} close={() => setAsked(false)}
            ask={{ method: "PATCH", path: `/v1/hosts/${host.id}`, body: { cordoned: !isCordoned } }}>
            <p>{isCordoned ? "New guests and moves may choose it." : "Those that are there stay; nothing new is placed on it until it takes guests again."}</p>
          </Sure>
        )}
        <Facts rows={[
          ["cloud", host.cloud_name],
          ...room(host).map(([name, part]): [string, string] => [name, percent(part)]),
          ["capacity", `${host.capacity.vcpus} vCPU, ${bytes(host.capacity.memory_bytes)}, disk ${bytes(host.capacity.disk_bytes)}`],
          ["agents dial it at", host.data_address ?? "nowhere: it dials"],
          ["overlay", host.overlay_address ? `${host.overlay_address}, ${host.overlay_encryption ? "encrypted (WireGuard)" : "not encrypted"}` : "–"],
          ["heard of", ago(host.last_seen_ms, now.value)],
          ["agent", host.agent_version],
          ["runs", <Classes host={host} />],
          ["certificate (SHA-256)", <code>{host.certificate_sha256}</code>],
          ...(market ? [["costs now", price(market.price_nanousd_per_hour)] as [string, string]] : []),
          ["risk", <span class={risk.tone}>{risk.text}</span>],
          ...(rented ? [["rented as", `${rented.instance_type}, ${rented.tenure.replaceAll("_", " ")}, by ${rented.provider}`] as [string, string]] : []),
          ["joined", moment(host.created_at_ms)],
        ]} />
      </Panel>
      <Panel title="What its substrate gives, as measured">
        <ProbeFacts probe={host.probe as Probe | null} />
      </Panel>
      <Panel title="Links" wide><LinkGrid name={`links of ${host.name}`} links={links} /></Panel>
      <Panel title={`Guests here (${own.length})`}>
        {own.length === 0 ? <Empty>none</Empty> : <ul class="plain">{own.map((guest) => <li key={guest.id}><a href={`#/guests/${guest.id}`}>{guest.name}</a> <State of={guest.state} /></li>)}</ul>}
      </Panel>
      <Panel title="What happened here" wide>{told.length === 0 ? <Empty>nothing among the events that this page has</Empty> : told.map((event) => <EventLine key={event.seq} event={event} />)}</Panel>
    </div>
  );
}
