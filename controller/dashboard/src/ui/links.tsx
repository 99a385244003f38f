// Ways between hosts, as their agents measure them.
import { useEffect, useState } from "preact/hooks";
import { list } from "../api/http";
import type { HostLink } from "../api/types";
import { lossText, roundTrip } from "../store/ways";
import { areAllWays, now, ways } from "../store/store";
import { ago } from "./format";
import { Grid, HostLink as Host, State } from "./parts";

const EVERY_MS = 10_000;

/** The ways from and to these hosts: those that the page has, or, where it has not all, asked for. */
export function useLinksOf(ids: string[]): HostLink[] {
  const [found, setFound] = useState<HostLink[]>([]);
  const hasAll = areAllWays.value;
  const key = ids.join();
  useEffect(() => {
    if (hasAll || key === "") return;
    let isHere = true;
    const ask = async () => {
      try {
        const told = await Promise.all(key.split(",").map((id) => list<HostLink>(`/v1/links?host=${id}`)));
        if (isHere) setFound(told.flat());
      } catch {
        // That the controller is away is told elsewhere; what was shown stays.
      }
    };
    void ask();
    const timer = setInterval(() => void ask(), EVERY_MS);
    return () => {
      isHere = false;
      clearInterval(timer);
    };
  }, [key, hasAll]);
  return hasAll ? ways.value.filter((link) => ids.includes(link.from) || ids.includes(link.to)) : found;
}

const ORDER: Record<HostLink["state"], number> = { silent: 0, answers: 1, not_measured: 2 };

export function LinkGrid(props: { name: string; links: HostLink[] }) {
  const rows = props.links.map((link) => ({ ...link, id: `${link.from}.${link.to}` }));
  return (
    <Grid name={props.name} items={rows} empty="No two hosts of which one can dial the other." columns={[
      { title: "from", key: (link) => `${link.from_name} ${link.to_name}`, show: (link) => <><Host id={link.from} /> <small>{link.from_cloud_name}</small></> },
      { title: "to", key: (link) => link.to_name, show: (link) => <><Host id={link.to} /> <small>{link.to_cloud_name}</small></> },
      { title: "round trip", key: (link) => link.rtt_us ?? Infinity, show: (link) => link.state === "answers" ? (typeof link.rtt_us === "number" ? roundTrip(link.rtt_us) : "–") : <span title={link.why ?? undefined}><State of={link.state} /></span> },
      { title: "loss", key: (link) => link.loss ?? -1, show: (link) => link.state === "answers" ? lossText(link.loss) : "–" },
      { title: "least", key: (link) => link.rtt_least_us ?? Infinity, show: (link) => typeof link.rtt_least_us === "number" ? roundTrip(link.rtt_least_us) : "–", wide: true },
      { title: "probes answered", key: (link) => ORDER[link.state], show: (link) => link.probes > 0 ? `${link.answered} of ${link.probes}` : "–", wide: true },
      { title: "answered last", key: (link) => link.answered_at_ms ?? 0, show: (link) => link.answered_at_ms ? ago(link.answered_at_ms, now.value) : "–", wide: true },
      { title: "why", show: (link) => link.why ?? "", wide: true },
    ]} />
  );
}
