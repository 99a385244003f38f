// Images and volumes, networks, tokens.
import { useState } from "preact/hooks";
import { change, Refused } from "../api/http";
import type { Token, TokenSecret } from "../api/types";
import { freezes, guests, images, networks, now, ports, projects, tokens, volumes, who } from "../store/store";
import { ago, bytes, moment } from "../ui/format";
import { Empty, Grid, GuestLink, HostLink, Panel, State } from "../ui/parts";

export function Images() {
  const rows = [...images.value.values()];
  const disks = [...volumes.value.values()];
  const users = new Map<string, string>();
  for (const guest of guests.value.values()) for (const volume of guest.volumes) users.set(volume, guest.id);
  return (
    <div class="tiles">
      <Panel title={`Images (${rows.length})`} wide>
        <Grid name="images" items={rows} empty={<>No image yet: <code>supercloud image import disk.qcow2 --name NAME</code></>} columns={[
          { title: "name", key: (image) => image.name, show: (image) => image.name },
          { title: "state", key: (image) => image.state, show: (image) => <State of={image.state} /> },
          { title: "parts", show: (image) => image.parts.map((part) => part.part).join(", ") || "–" },
          { title: "size", key: (image) => image.parts.reduce((sum, part) => sum + part.size_bytes, 0), show: (image) => bytes(image.parts.reduce((sum, part) => sum + part.size_bytes, 0)) },
          { title: "stored", key: (image) => image.parts.reduce((sum, part) => sum + part.stored_bytes, 0), show: (image) => bytes(image.parts.reduce((sum, part) => sum + part.stored_bytes, 0)), wide: true },
          { title: "made", key: (image) => image.created_at_ms, show: (image) => ago(image.created_at_ms, now.value), wide: true },
        ]} />
      </Panel>
      <Panel title={`Volumes (${disks.length})`} wide>
        <Grid name="volumes" items={disks} empty="No volume yet: each guest brings its own." columns={[
          { title: "name", key: (volume) => volume.name, show: (volume) => volume.name },
          { title: "guest", show: (volume) => <GuestLink id={users.get(volume.id)} /> },
          { title: "size", key: (volume) => volume.size_bytes, show: (volume) => bytes(volume.size_bytes) },
          { title: "at", show: (volume) => <HostLink id={volume.host} />, wide: true },
          { title: "blocks follow", key: (volume) => volume.propagation, show: (volume) => volume.propagation, wide: true },
          { title: "blocks still come from", show: (volume) => <HostLink id={volume.needed_source} />, wide: true },
          { title: "stands on", show: (volume) => (volume.image ? (images.value.get(volume.image)?.name ?? "an image that is gone") : "–"), wide: true },
          { title: "map", key: (volume) => volume.map_version, show: (volume) => `version ${volume.map_version}, epoch ${volume.epoch}`, wide: true },
        ]} />
      </Panel>
      <Panel title={`Freezes (${freezes.value.size})`} wide>
        <Grid name="freezes" items={[...freezes.value.values()]} empty="No guest was frozen yet." columns={[
          { title: "guest", show: (freeze) => <GuestLink id={freeze.guest} /> },
          { title: "memory", key: (freeze) => freeze.memory_bytes, show: (freeze) => bytes(freeze.memory_bytes) },
          { title: "made", key: (freeze) => freeze.created_at_ms, show: (freeze) => moment(freeze.created_at_ms) },
          { title: "thawed", show: (freeze) => (freeze.is_consumed ? "yes" : "not yet") },
        ]} />
      </Panel>
    </div>
  );
}

export function Networks() {
  const rows = [...networks.value.values()];
  return (
    <div class="tiles">
      {rows.length === 0 && <Panel title="Networks" wide><Empty>No network yet: <code>supercloud network create NAME --cidr 10.20.0.0/24</code></Empty></Panel>}
      {rows.map((network) => {
        const own = [...ports.value.values()].filter((port) => port.network === network.id);
        return (
          <Panel key={network.id} title={network.name} wide aside={<span class="soft">{network.cidr}, gateway {network.gateway}, MTU {network.mtu}, VNI {network.vni}</span>}>
            <Grid name={`ports of ${network.name}`} items={own} empty="no port" columns={[
              { title: "guest", show: (port) => <GuestLink id={port.guest} /> },
              { title: "address", key: (port) => port.ipv4, show: (port) => port.ipv4 },
              { title: "MAC", key: (port) => port.mac, show: (port) => <code>{port.mac}</code> },
              { title: "at", show: (port) => <HostLink id={port.host} /> },
              { title: "being prepared at", show: (port) => <HostLink id={port.prepared_at} />, wide: true },
            ]} />
          </Panel>
        );
      })}
    </div>
  );
}

export function Tokens() {
  const [name, setName] = useState("");
  const [role, setRole] = useState("viewer");
  const [project, setProject] = useState(who.value?.token.project ?? "*");
  const [made, setMade] = useState<TokenSecret>();
  const [problem, setProblem] = useState("");
  const attempt = async (work: () => Promise<void>) => {
    try {
      await work();
      setProblem("");
    } catch (error) {
      setProblem(error instanceof Refused ? error.problem.detail : String(error));
    }
  };
  const create = () => attempt(async () => {
    setMade(await change<TokenSecret>("POST", "/v1/tokens", { name, role, project }));
    setName("");
  });
  const remove = (token: Token) => attempt(async () => {
    if (confirm(`Delete the token ${token.name}? What uses it stops working at once.`)) await change("DELETE", `/v1/tokens/${token.id}`);
  });
  const projectName = (id: string | null | undefined) => (id ? (projects.value.get(id)?.name ?? id) : "all");
  return (
    <div class="tiles">
      <Panel title="New token" wide>
        <form class="line wrap" onSubmit={(event) => { event.preventDefault(); void create(); }}>
          <label>Name <input required value={name} maxLength={63} onInput={(event) => setName(event.currentTarget.value)} /></label>
          <label>Role <select value={role} onChange={(event) => setRole(event.currentTarget.value)}>{["viewer", "policy", "operator", "admin"].map((one) => <option key={one}>{one}</option>)}</select></label>
          <label>Project <select value={project} onChange={(event) => setProject(event.currentTarget.value)}>
            {!who.value?.token.project && <option value="*">all</option>}
            {[...projects.value.values()].map((one) => <option key={one.id} value={one.id}>{one.name}</option>)}
          </select></label>
          <button class="main">Make</button>
        </form>
        {problem && <p class="bad" role="alert">{problem}</p>}
        {made && <p role="status">The secret of <b>{made.token.name}</b>, shown this once: <code class="secret">{made.secret}</code> <button onClick={() => setMade(undefined)}>I have it</button></p>}
      </Panel>
      <Panel title={`Tokens (${tokens.value.size})`} wide>
        <Grid name="tokens" items={[...tokens.value.values()]} empty="none" columns={[
          { title: "name", key: (token) => token.name, show: (token) => token.name },
          { title: "role", key: (token) => token.role, show: (token) => token.role },
          { title: "project", key: (token) => projectName(token.project), show: (token) => projectName(token.project) },
          { title: "guest", show: (token) => <GuestLink id={token.guest} />, wide: true },
          { title: "ends", key: (token) => token.expires_at_ms ?? Infinity, show: (token) => (token.expires_at_ms ? moment(token.expires_at_ms) : "never"), wide: true },
          { title: "", show: (token) => token.id === who.value?.token.id ? <small>yours</small> : <button onClick={() => void remove(token)} aria-label={`delete the token ${token.name}`}>Delete</button> },
        ]} />
      </Panel>
    </div>
  );
}
