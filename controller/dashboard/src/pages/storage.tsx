// Images and volumes: what there is, where it lies, and what a volume was.
import { useState } from "preact/hooks";
import { change, Refused } from "../api/http";
import type { Image, Site, Volume, VolumeHistory } from "../api/types";
import { may } from "../store/derive";
import { clouds, events, freezes, guests, images, now, projects, volumes, who } from "../store/store";
import { useAnswer } from "../ui/answer";
import { ago, bytes, moment } from "../ui/format";
import { Empty, Facts, Grid, GuestLink, HostLink, Panel, State } from "../ui/parts";
import { Travel, guestOf } from "../ui/travel";
import { EventLine } from "./events";

const sum = (image: Image, size: (part: Image["parts"][number]) => number): number => image.parts.reduce((all, part) => all + size(part), 0);

export function Images() {
  const rows = [...images.value.values()];
  const disks = [...volumes.value.values()];
  return (
    <div class="tiles">
      <Panel title={`Images (${rows.length})`} wide>
        <Grid name="images" items={rows} empty={<>No image yet: <code>supercloud image import disk.qcow2 --name NAME</code></>} columns={[
          { title: "name", key: (image) => image.name, show: (image) => <a href={`#/images/${image.id}`}>{image.name}</a> },
          { title: "state", key: (image) => image.state, show: (image) => <State of={image.state} /> },
          { title: "parts", show: (image) => image.parts.map((part) => part.part).join(", ") || "–" },
          { title: "size", key: (image) => sum(image, (part) => part.size_bytes), show: (image) => bytes(sum(image, (part) => part.size_bytes)) },
          { title: "stored", key: (image) => sum(image, (part) => part.stored_bytes), show: (image) => bytes(sum(image, (part) => part.stored_bytes)), wide: true },
          { title: "made", key: (image) => image.created_at_ms, show: (image) => ago(image.created_at_ms, now.value), wide: true },
        ]} />
      </Panel>
      <Panel title={`Volumes (${disks.length})`} wide>
        <Grid name="volumes" items={disks} empty="No volume yet: each guest brings its own." columns={[
          { title: "name", key: (volume) => volume.name, show: (volume) => <a href={`#/volumes/${volume.id}`}>{volume.name}</a> },
          { title: "guest", show: (volume) => <GuestLink id={volume.guest} /> },
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
          { title: "in", key: (freeze) => freeze.cloud, show: (freeze) => clouds.value.get(freeze.cloud)?.name ?? freeze.cloud },
          { title: "made", key: (freeze) => freeze.created_at_ms, show: (freeze) => moment(freeze.created_at_ms), wide: true },
          { title: "thawed", show: (freeze) => (freeze.is_consumed ? "yes" : "not yet") },
        ]} />
      </Panel>
    </div>
  );
}

const KINDS: Record<Site["kind"], string> = {
  image: "the image", newest: "its newest blocks", standby: "a standby copy", older_blocks: "older blocks", base: "what it stands on",
  points: "points of its history", freeze: "the frozen guest",
};
const HOLDS: Record<Site["holds"], [string, string]> = { whole: ["good", "all"], part: ["warn", "a part"], not_known: ["idle", "not known"] };

/** Where it lies, asked for while the page is shown. */
function Sites(props: { path: string; mark: string }) {
  const EVERY_MS = 10_000;
  const { value, problem } = useAnswer<{ items: Site[] }>(props.path, props.mark, EVERY_MS);
  const rows = (value?.items ?? []).map((site, at) => ({ ...site, id: String(at) }));
  const places = new Set(rows.filter((site) => site.holds !== "not_known").map((site) => site.host ?? site.cloud ?? "controller"));
  return (
    <Panel title={rows.length > 0 ? `Where it lies (${places.size} ${places.size === 1 ? "place" : "places"})` : "Where it lies"} wide>
      {problem && <p class="bad" role="alert">{problem}</p>}
      {value && (
        <Grid name="where it lies" items={rows} empty="Nowhere yet." columns={[
          { title: "what", key: (site) => site.kind, show: (site) => KINDS[site.kind] },
          { title: "where", key: (site) => site.name, show: (site) => (site.host ? <HostLink id={site.host} /> : site.cloud ? `store of ${site.name}` : "the controller's store") },
          { title: "has", key: (site) => site.holds, show: (site) => <span class={`state ${HOLDS[site.holds][0]}`}>{HOLDS[site.holds][1]}</span> },
          { title: "lacks", key: (site) => site.missing_bytes ?? -1, show: (site) => (site.missing_bytes ? bytes(site.missing_bytes) : "–") },
          { title: "bytes there", key: (site) => site.bytes ?? -1, show: (site) => (typeof site.bytes === "number" ? bytes(site.bytes) : "–"), wide: true },
          { title: "known by", show: (site) => site.detail, wide: true },
        ]} />
      )}
      <p class="small soft">As far as the controller knows: by its records, and by what hosts tell of their clouds' stores while guests run there.</p>
    </Panel>
  );
}

export function ImagePage(props: { id: string }) {
  const image = [...images.value.values()].find((one) => one.id === props.id || one.name === props.id);
  if (!image) return <Panel title="No such image" wide><Empty>There is no image {props.id}, or this token does not see it.</Empty></Panel>;
  const users = [...guests.value.values()].filter((guest) => guest.image === image.id);
  return (
    <div class="tiles">
      <Panel title={image.name} wide aside={<State of={image.state} />}>
        <Facts rows={[
          ["project", projects.value.get(image.project)?.name ?? image.project],
          ...image.parts.map((part): [string, string] => [part.part, `${bytes(part.size_bytes)}, ${bytes(part.stored_bytes)} stored`]),
          ...(image.cmdline ? [["kernel command line", image.cmdline] as [string, string]] : []),
          ["guests made from it", String(users.length)],
          ["made", moment(image.created_at_ms)],
        ]} />
      </Panel>
      <Sites path={`/v1/images/${image.id}/sites`} mark={image.state} />
      <Panel title={`Guests made from it (${users.length})`} wide>
        {users.length === 0 ? <Empty>none</Empty> : <ul class="plain">{users.slice(0, 50).map((guest) => <li key={guest.id}><GuestLink id={guest.id} /> <State of={guest.state} /></li>)}</ul>}
        {users.length > 50 && <p>and {users.length - 50} more</p>}
      </Panel>
    </div>
  );
}

/** Has all read that it stands on; an event tells what was found. */
function CheckButton(props: { volume: Volume }) {
  const [said, setSaid] = useState<{ text: string; tone: string }>();
  if (!may(who.value, "change")) return null;
  const check = async () => {
    try {
      await change("POST", `/v1/volumes/${props.volume.id}/check`);
      setSaid({ text: "It is being checked; an event below tells what was found.", tone: "small" });
    } catch (error) {
      setSaid({ text: error instanceof Refused ? error.problem.detail : String(error), tone: "bad" });
    }
  };
  return <>{said && <span class={said.tone} role="status">{said.text}</span>}<button onClick={() => void check()}>Check what it stands on</button></>;
}

export function VolumePage(props: { id: string }) {
  const volume = [...volumes.value.values()].find((one) => one.id === props.id || one.name === props.id);
  // Asked before anything else is decided: the number of questions of a page does not change.
  const told = events.value.filter((event) => event.kind.startsWith("volume.") && volume && (event.data as { volume?: string }).volume === volume.name && event.guest === volume.guest);
  const history = useAnswer<VolumeHistory>(`/v1/volumes/${volume?.id ?? props.id}/history`, String(told.length));
  if (!volume) return <Panel title="No such volume" wide><Empty>There is no volume {props.id}, or this token does not see it.</Empty></Panel>;
  return (
    <div class="tiles">
      <Panel title={volume.name} wide aside={<span class="line"><CheckButton volume={volume} /></span>}>
        <Facts rows={[
          ["guest", <GuestLink id={volume.guest} />],
          ["size", bytes(volume.size_bytes)],
          ["at", <HostLink id={volume.host} />],
          ["stands on", volume.image ? <a href={`#/images/${volume.image}`}>{images.value.get(volume.image)?.name ?? "an image that is gone"}</a> : "–"],
          ["blocks follow", volume.propagation],
          ...(volume.needed_source ? [["blocks still come from", <HostLink id={volume.needed_source} />] as [string, preact.ComponentChildren]] : []),
          ["map", `version ${volume.map_version}, epoch ${volume.epoch}`],
          ["made", moment(volume.created_at_ms)],
        ]} />
      </Panel>
      <Travel key={volume.id} volume={volume} guest={guestOf(volume)} history={history} />
      <Sites path={`/v1/volumes/${volume.id}/sites`} mark={`${volume.host}${volume.epoch}${told.length}`} />
      <Panel title="What happened to it" wide>{told.length === 0 ? <Empty>nothing among the events that this page has</Empty> : told.slice(-20).reverse().map((event) => <EventLine key={event.seq} event={event} />)}</Panel>
    </div>
  );
}
