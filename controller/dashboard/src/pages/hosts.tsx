import { useState } from "preact/hooks";
import { change, Refused } from "../api/http";
import { may } from "../store/derive";
import { events, guests, hosts, now, who } from "../store/store";
import { ago, bytes, moment } from "../ui/format";
import { Empty, Facts, Grid, Panel, State, room } from "../ui/parts";
import { EventLine } from "./events";

const percent = (part: number): string => `${Math.round(part * 100)} %`;

export function Hosts() {
  const found = [...hosts.value.values()].filter((host) => host.state !== "removed");
  return (
    <Panel title={`Hosts (${found.length})`} wide>
      <Grid name="hosts" tall items={found} empty={<>No host yet: <code>supercloud host join-token NAME --cloud CLOUD</code></>} columns={[
        { title: "name", key: (host) => host.name, show: (host) => <a href={`#/hosts/${host.name}`}>{host.name}</a> },
        { title: "cloud", key: (host) => host.cloud_name, show: (host) => host.cloud_name },
        { title: "state", key: (host) => host.state, show: (host) => <State of={host.state} /> },
        { title: "vCPU", key: (host) => host.used.vcpus, show: (host) => `${host.used.vcpus} / ${host.capacity.vcpus}` },
        { title: "memory", key: (host) => host.used.memory_bytes, show: (host) => `${bytes(host.used.memory_bytes)} / ${bytes(host.capacity.memory_bytes)}` },
        { title: "runs", key: (host) => host.compat_classes[0]?.accelerator ?? "", show: (host) => host.compat_classes.map((one) => `${one.back_end}/${one.accelerator}`).join(", "), wide: true },
        { title: "heard of", key: (host) => host.last_seen_ms, show: (host) => ago(host.last_seen_ms, now.value), wide: true },
      ]} />
    </Panel>
  );
}

export function HostPage(props: { id: string }) {
  const [problem, setProblem] = useState("");
  const host = [...hosts.value.values()].find((one) => one.name === props.id || one.id === props.id);
  if (!host) return <Panel title="No such host" wide><Empty>There is no host {props.id}.</Empty></Panel>;
  const own = [...guests.value.values()].filter((guest) => guest.host === host.id);
  const told = events.value.filter((event) => event.host === host.id).slice(-30).reverse();
  const isCordoned = host.state === "cordoned";
  const cordon = async () => {
    try {
      await change("PATCH", `/v1/hosts/${host.id}`, { cordoned: !isCordoned });
      setProblem("");
    } catch (error) {
      setProblem(error instanceof Refused ? error.problem.detail : String(error));
    }
  };
  return (
    <div class="tiles">
      <Panel title={host.name} wide aside={<span class="line"><State of={host.state} />{may(who.value, "system") && host.state !== "removed" && <button onClick={() => void cordon()}>{isCordoned ? "Take guests again" : "Take no new guests"}</button>}</span>}>
        {problem && <p class="bad" role="alert">{problem}</p>}
        <Facts rows={[
          ["cloud", host.cloud_name],
          ...room(host).map(([name, part]): [string, string] => [name, percent(part)]),
          ["capacity", `${host.capacity.vcpus} vCPU, ${bytes(host.capacity.memory_bytes)}, disk ${bytes(host.capacity.disk_bytes)}`],
          ["agents dial it at", host.data_address ?? "nowhere: it dials"],
          ["overlay", host.overlay_address ?? "–"],
          ["heard of", ago(host.last_seen_ms, now.value)],
          ["agent", host.agent_version],
          ["joined", moment(host.created_at_ms)],
        ]} />
      </Panel>
      <Panel title="What its substrate gives, as measured">
        <pre>{JSON.stringify(host.probe, null, 1)}</pre>
      </Panel>
      <Panel title={`Guests here (${own.length})`}>
        {own.length === 0 ? <Empty>none</Empty> : <ul class="plain">{own.map((guest) => <li key={guest.id}><a href={`#/guests/${guest.id}`}>{guest.name}</a> <State of={guest.state} /></li>)}</ul>}
      </Panel>
      <Panel title="What happened here" wide>{told.length === 0 ? <Empty>nothing among the events that this page has</Empty> : told.map((event) => <EventLine key={event.seq} event={event} />)}</Panel>
    </div>
  );
}
