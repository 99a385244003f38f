import type { ComponentChildren } from "preact";
import { useEffect, useState } from "preact/hooks";
import { change, get, Refused } from "../api/http";
import type { Evacuation, Guest, Operation } from "../api/types";
import { isEnded, may } from "../store/derive";
import { newestFirst } from "../store/done";
import { events, guests, images, loadOperationsOf, networks, now, operations, ports, verdicts, volumes, who } from "../store/store";
import { Cpus } from "../ui/cpus";
import { ConsolePanel } from "../terminal/console";
import { GuestActions } from "../ui/actions";
import { ago, bytes, duration, moment } from "../ui/format";
import { Checkpoints } from "../ui/checkpoints";
import { Veto } from "../ui/choices";
import { Sure } from "../ui/dialog";
import { Lives } from "../ui/lives";
import { MirrorPanel } from "../ui/mirror";
import { Empty, Facts, Grid, HostLink, Moving, Older, Panel, State, shapeText } from "../ui/parts";
import { EventLine } from "./events";

/** Operations of a guest that are shown at first, and more of at a time. */
const SHOWN = 10;

export function Guests() {
  const [filter, setFilter] = useState("");
  const low = filter.toLowerCase();
  const found = [...guests.value.values()].filter((guest) =>
    [guest.name, guest.state, guest.host_name, guest.cloud_name, guest.ipv4].some((text) => text?.toLowerCase().includes(low)),
  );
  return (
    <Panel title={`Guests (${guests.value.size})`} wide aside={<input type="search" placeholder="filter" aria-label="filter guests" value={filter} onInput={(event) => setFilter(event.currentTarget.value)} />}>
      <Grid name="guests" tall items={found} empty={filter ? "No guest matches." : <>No guest yet: <code>supercloud guest create NAME --image I --network N</code></>} columns={[
        { title: "name", key: (guest) => guest.name, show: (guest) => <a href={`#/guests/${guest.id}`}>{guest.name}</a> },
        { title: "state", key: (guest) => guest.state, show: (guest) => <State of={guest.alarm ? "lost" : guest.state} /> },
        { title: "cloud", key: (guest) => guest.cloud_name ?? "", show: (guest) => guest.cloud_name ?? "–" },
        { title: "host", key: (guest) => guest.host_name ?? "", show: (guest) => <HostLink id={guest.host} />, wide: true },
        { title: "address", key: (guest) => guest.ipv4 ?? "", show: (guest) => guest.ipv4 ?? "–" },
        { title: "shape", key: (guest) => guest.shape.memory_bytes, show: shapeText, wide: true },
        { title: "follows prices", key: (guest) => Number(guest.follow_prices), show: (guest) => (guest.follow_prices ? "yes" : "no"), wide: true },
      ]} />
    </Panel>
  );
}

/** A setting of a guest that is on or off. */
function Setting(props: { guest: Guest; isOn: boolean; text: string; turned: Partial<Pick<Guest, "follow_prices">> }) {
  const [problem, setProblem] = useState("");
  if (!may(who.value, "change")) return <>{props.isOn ? "yes" : "no"}</>;
  const turn = async () => {
    try {
      await change("PATCH", `/v1/guests/${props.guest.id}`, props.turned);
      setProblem("");
    } catch (error) {
      setProblem(error instanceof Refused ? error.problem.detail : String(error));
    }
  };
  return (
    <label class="inline"><input type="checkbox" checked={props.isOn} onChange={() => void turn()} /> {props.text} {problem && <span class="bad" role="alert">{problem}</span>}</label>
  );
}

const ON_LOSS: Record<NonNullable<Guest["on_loss"]>, string> = {
  nothing: "nothing: it stays lost until somebody starts it",
  restart_from_volume: "start it again by itself, from its disk",
  thaw_checkpoint: "let it go on from its newest checkpoint by itself",
};

function OnLossSetting(props: { guest: Guest }) {
  const [problem, setProblem] = useState("");
  const is = props.guest.on_loss ?? "nothing";
  if (!may(who.value, "change")) return <>{ON_LOSS[is]}</>;
  const turn = async (on_loss: Guest["on_loss"]) => {
    try {
      await change("PATCH", `/v1/guests/${props.guest.id}`, { on_loss });
      setProblem("");
    } catch (error) {
      setProblem(error instanceof Refused ? error.problem.detail : String(error));
    }
  };
  return (
    <>
      <select aria-label="when it is lost" value={is} onChange={(event) => void turn(event.currentTarget.value as Guest["on_loss"])}>
        {Object.entries(ON_LOSS).map(([value, text]) => <option key={value} value={value}>{text}</option>)}
      </select>
      {problem && <span class="bad" role="alert">{problem}</span>}
    </>
  );
}

/** The mirror that is begun again whenever there is none. */
function KeptMirror(props: { guest: Guest }) {
  const [isOpen, setOpen] = useState(false);
  const { guest } = props;
  const kept = guest.kept_mirror;
  if (!kept) return <>no</>;
  return (
    <>
      yes, first at {kept.to}, every {duration(kept.interval_ms)}, {kept.mode}{kept.lease_ms ? `, fenced by a lease of ${duration(kept.lease_ms)}` : ""}{" "}
      {may(who.value, "change") && <button onClick={() => setOpen(true)}>End…</button>}
      {isOpen && (
        <Sure title={`End the mirror of ${guest.name}`} verb="End it" close={() => setOpen(false)} ask={{ method: "DELETE", path: `/v1/guests/${guest.id}/mirrors` }}>
          <p>The guest runs on where it is. Nothing of it is kept elsewhere any more, and no mirror is begun again.</p>
        </Sure>
      )}
    </>
  );
}

const LEAVES: Record<Evacuation["state"], [string, string]> = {
  in_time: ["good", "in time"], late: ["bad", "not in time"], covered: ["warn", "no: its standby goes on"], unknown: ["warn", "not known"], not_needed: ["idle", "its host is not taken back"],
};
const AGAIN_MS = 10_000;

/** Whether it could leave its host within the notice, as reckoned now. */
function Leaving(props: { guest: Guest }) {
  const { guest } = props;
  const [found, setFound] = useState<Evacuation>();
  useEffect(() => {
    let isHere = true;
    const ask = async () => {
      try {
        const told = await get<Evacuation>(`/v1/guests/${guest.id}/evacuation`);
        if (isHere) setFound(told);
      } catch (error) {
        // It runs no more; that the controller is away is told elsewhere.
        if (isHere && error instanceof Refused) setFound(undefined);
      }
    };
    void ask();
    const timer = setInterval(() => void ask(), AGAIN_MS);
    return () => {
      isHere = false;
      clearInterval(timer);
    };
  }, [guest.id, guest.host]);
  if (!found) return null;
  const [tone, text] = LEAVES[found.state];
  const time = (ms: number | null | undefined) => (ms === null || ms === undefined ? "not known" : duration(ms));
  const isAsked = found.state !== "not_needed";
  return (
    <Panel title="Could it leave in time?" aside={<span class={`state ${tone}`}>{text}</span>}>
      <Facts rows={[
        ...(isAsked ? [["notice", duration(found.notice_ms)] as [string, string]] : []),
        ["leaves in", time(found.leave_ms)],
        ...(isAsked ? [["with all of its host's guests", time(found.leave_with_all_ms)] as [string, string]] : []),
        ["would go to", found.destination ? <HostLink id={found.destination} /> : "no host takes it"],
        ["pause", time(found.downtime_ms)],
      ]} />
      <p class="small soft">{found.detail}</p>
    </Panel>
  );
}

/** Until all of it is in the guest's own cloud, the cloud that it left is needed. */
const baseText = (missing: number | null | undefined): string => {
  if (missing === null || missing === undefined) return "–";
  return missing === 0 ? "its cloud has all" : `its cloud lacks ${bytes(missing)}`;
};

/** What was done with a guest, newest first; what is older than the page has is asked for. */
function Done(props: { id: string; past: Operation[] }) {
  const [next, setNext] = useState<string | null>(null);
  const [shown, setShown] = useState(SHOWN);
  useEffect(() => {
    // That the controller is away is told elsewhere.
    void loadOperationsOf(props.id, null).then(setNext, () => undefined);
  }, [props.id]);
  const older = async () => {
    if (shown >= props.past.length && next !== null) setNext(await loadOperationsOf(props.id, next));
    setShown(shown + SHOWN);
  };
  return (
    <>
      {props.past.slice(0, shown).map((one) => <Moving key={one.id} operation={one} />)}
      <Older isMore={shown < props.past.length || next !== null} load={older} />
    </>
  );
}

export function GuestPage(props: { id: string; part?: string }) {
  const guest = guests.value.get(props.id) ?? [...guests.value.values()].find((one) => one.name === props.id);
  if (!guest) return <Panel title="No such guest" wide><Empty>There is no guest {props.id}, or this token does not see it.</Empty></Panel>;
  const own = events.value.filter((event) => event.guest === guest.id);
  const operation = guest.operation ? operations.value.get(guest.operation) : undefined;
  const verdict = guest.follow_prices ? verdicts.value.find((one) => one.guest === guest.id) : undefined;
  const attached = guest.ports.map((id) => ports.value.get(id)).filter((port) => port !== undefined);
  const past = newestFirst([...operations.value.values()].filter((one) => one.guest === guest.id));
  return (
    <div class="tiles">
      <Panel title={guest.name} wide aside={<span class="line"><State of={guest.state} /><GuestActions guest={guest} /></span>}>
        {guest.alarm && <p class="bad" role="alert">{guest.alarm}</p>}
        {operation && <Moving operation={operation} />}
        <Facts rows={[
          ["where", guest.host ? <><HostLink id={guest.host} /> in {guest.cloud_name}</> : "nowhere"],
          ["shape", shapeText(guest)],
          ["address", guest.ipv4 ?? "–"],
          ["epoch", String(guest.epoch)],
          ["cold starts", guest.starts],
          ["of what its disks stand on", baseText(guest.base_missing_bytes)],
          ["image", images.value.get(guest.image)?.name ?? guest.image],
          ["compat class", guest.compat_class ? `${guest.compat_class.back_end}/${guest.compat_class.accelerator}/${guest.compat_class.machine_version}` : "fixed at its first start"],
          ["follows prices", <Setting guest={guest} isOn={guest.follow_prices} text="policies may move it" turned={{ follow_prices: !guest.follow_prices }} />],
          ...(verdict ? [["policy", <span class="line"><span>{verdict.policy}: {verdict.is_move ? "is to move" : "stays"}{verdict.chosen ? <> in <b>{verdict.chosen}</b></> : null}, {ago(verdict.told_at_ms, now.value)}: {verdict.reason}</span><Veto verdict={verdict} /></span>] as [string, ComponentChildren]] : []),
          ["when it is lost", <OnLossSetting guest={guest} />],
          ["a mirror is kept", <KeptMirror guest={guest} />],
          ["made", moment(guest.created_at_ms)],
        ]} />
      </Panel>
      {operation?.kind === "guest_mirror" && !isEnded(operation.phase) && <MirrorPanel key={operation.id} guest={guest.id} name={guest.name} operation={operation} />}
      <ConsolePanel key={guest.id} guest={guest} begin={props.part === "console"} />
      <Panel title="Where it lived" wide><Lives key={guest.id} guest={guest} /></Panel>
      {guest.state === "running" && <Leaving guest={guest} />}
      <Cpus key={guest.id} guest={guest} />
      <Checkpoints key={guest.id} guest={guest} told={own.filter((event) => event.kind.startsWith("volume.")).length} />
      <Panel title="Network">
        {attached.length === 0 ? <Empty>no port</Empty> : attached.map((port) => (
          <Facts key={port.id} rows={[
            ["network", <a href={`#/networks/${port.network}`}>{networks.value.get(port.network)?.name ?? port.network}</a>],
            ["address", <a href={`#/ports/${port.id}`}>{port.ipv4}</a>],
            ["MAC", <code>{port.mac}</code>],
            ["at", <HostLink id={port.host} />],
            ...(port.moved_from ? [["still forwarded from", <HostLink id={port.moved_from} />] as [string, ComponentChildren]] : []),
          ]} />
        ))}
      </Panel>
      <Panel title="Disks">
        {guest.volumes.map((id) => volumes.value.get(id)).filter((volume) => volume !== undefined).map((volume) => (
          <Facts key={volume.id} rows={[
            ["volume", <a href={`#/volumes/${volume.id}`}>{volume.name}</a>], ["size", bytes(volume.size_bytes)], ["blocks follow", volume.propagation],
            ["at", <HostLink id={volume.host} />],
            ...(volume.needed_source ? [["blocks still come from", <HostLink id={volume.needed_source} />] as [string, ComponentChildren]] : []),
          ]} />
        ))}
      </Panel>
      <Panel title="What was done with it" wide>
        <Done key={guest.id} id={guest.id} past={past} />
        {own.slice(-30).reverse().map((event) => <EventLine key={event.seq} event={event} />)}
        {own.length === 0 && past.length === 0 && <Empty>nothing yet ({ago(guest.created_at_ms, now.value)} made)</Empty>}
      </Panel>
    </div>
  );
}
