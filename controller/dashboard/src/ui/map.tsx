// Where everything is: clouds, in them hosts, in them guests; arcs for what moves.
import { useLayoutEffect, useRef, useState } from "preact/hooks";
import type { HostLink, Market, Operation } from "../api/types";
import { type Place, type Sums, isEnded, shownOf } from "../store/derive";
import { type Way, wayText, ways } from "../store/ways";
import { room } from "./parts";

interface Arc { id: string; from: [number, number]; to: [number, number] }

/** Ways that are drawn; more would be a knot. They are all in the list of each cloud. */
const MOST_DRAWN = 10;
const MOST_LISTED = 6;

/** A cloud of many hosts in few figures. */
function Many(props: { sums: Sums; shown: number }) {
  const { sums } = props;
  const bars: [string, number][] = [["vCPU", sums.vcpus], ["memory", sums.memory]];
  return (
    <div class="many">
      <p><a href="#/hosts"><b>{sums.hosts}</b> hosts</a>{sums.up < sums.hosts && <span class="bad">, {sums.hosts - sums.up} not up</span>} · <b>{sums.guests}</b> guests{sums.alarms > 0 && <span class="bad">, {sums.alarms} with an alarm</span>}{sums.busy > 0 && `, ${sums.busy} busy`}</p>
      <span class="rooms">
        {bars.map(([name, part]) => {
          const text = `${name} ${Math.round(part * 100)} %`;
          return <svg key={name} viewBox="0 0 100 4" preserveAspectRatio="none" role="img" aria-label={text}><title>{text}</title><rect width={Math.min(1, part) * 100} height="4" /></svg>;
        })}
      </span>
      {props.shown > 0 && <p class="small soft">Those to look at, or from or to which something moves:</p>}
    </div>
  );
}

/** The ways from a cloud to the others, and within it. */
function Ways(props: { cloud: string; ways: Way[] }) {
  const own = props.ways.filter((way) => way.from === props.cloud || way.to === props.cloud);
  if (own.length === 0) return null;
  const other = (way: Way) => (way.from === way.to ? "within it" : `to ${way.from === props.cloud ? way.toName : way.fromName}`);
  return (
    <ul class="ways">
      {own.slice(0, MOST_LISTED).map((way) => <li key={way.id} class={way.state}>{other(way)}: {wayText(way)}</li>)}
      {own.length > MOST_LISTED && <li><a href="#/hosts">and {own.length - MOST_LISTED} more</a></li>}
    </ul>
  );
}

export function Map_(props: { places: Place[]; operations: Operation[]; links: HostLink[]; tenures: ReadonlyMap<string, Market["tenure"]> }) {
  const box = useRef<HTMLDivElement>(null);
  const [arcs, setArcs] = useState<Arc[]>([]);
  const [lines, setLines] = useState<(Arc & { state: Way["state"] })[]>([]);
  const known = ways(props.links);
  const drawn = known.filter((way) => way.from !== way.to).slice(0, MOST_DRAWN);
  const moves = props.operations.filter((operation) => !isEnded(operation.phase) && operation.source && operation.destination && operation.source !== operation.destination);
  const busy = new Set(moves.flatMap((operation) => [operation.source!, operation.destination!]));
  const shown = props.places.map((place) => ({ ...place, ...shownOf(place, busy) }));
  const mark = moves.map((operation) => operation.id).join() + shown.map((place) => place.hosts.length).join() + known.map((way) => way.id + way.state).join();
  useLayoutEffect(() => {
    const draw = () => {
      const frame = box.current?.getBoundingClientRect();
      if (!frame) return;
      const centre = (id: string): [number, number] | undefined => {
        const found = box.current?.querySelector(`[data-host="${CSS.escape(id)}"]`)?.getBoundingClientRect();
        return found && [found.left - frame.left + found.width / 2, found.top - frame.top + 14];
      };
      setArcs(moves.flatMap((operation) => {
        const [from, to] = [centre(operation.source!), centre(operation.destination!)];
        return from && to ? [{ id: operation.id, from, to }] : [];
      }));
      const top = (id: string): [number, number] | undefined => {
        const found = box.current?.querySelector(`[data-cloud="${CSS.escape(id)}"]`)?.getBoundingClientRect();
        return found && [found.left - frame.left + found.width / 2, found.top - frame.top];
      };
      setLines(drawn.flatMap((way) => {
        const [from, to] = [top(way.from), top(way.to)];
        // Between clouds in different rows it would go through what is written in others; it is in their lists.
        return from && to && Math.abs(from[1] - to[1]) < 8 ? [{ id: way.id, from, to, state: way.state }] : [];
      }));
    };
    draw();
    const observer = new ResizeObserver(draw);
    if (box.current) observer.observe(box.current);
    return () => observer.disconnect();
  }, [mark]);
  return (
    <div class="map" ref={box}>
      {shown.map((place) => (
        <div class="cloud" key={place.cloud.id} data-cloud={place.cloud.id}>
          <h3>{place.cloud.name}</h3>
          <Ways cloud={place.cloud.id} ways={known} />
          {place.sums && <Many sums={place.sums} shown={place.hosts.length} />}
          {!place.sums && place.hosts.length === 0 && <p class="empty">no host</p>}
          {place.hosts.map(({ host, guests }) => (
            <a class={`host ${host.state} ${props.tenures.get(host.id) ?? ""}`} key={host.id} data-host={host.id} href={`#/hosts/${host.name}`}>
              <span class="line"><b>{host.name}</b>{props.tenures.has(host.id) && <small class="tenure">{props.tenures.get(host.id)!.replaceAll("_", " ")}</small>}<span class="grow" />{host.state !== "up" && <em>{host.state}</em>}</span>
              <span class="rooms" aria-hidden="true">
                {room(host).map(([name, part]) => (
                  <svg key={name} viewBox="0 0 100 4" preserveAspectRatio="none"><title>{`${name} ${Math.round(part * 100)} %`}</title><rect width={part * 100} height="4" /></svg>
                ))}
              </span>
              <span class="guests">
                {guests.slice(0, 60).map((guest) => (
                  <i key={guest.id} class={guest.alarm ? "bad" : guest.operation ? "busy" : ""} title={guest.name}>{guests.length <= 12 ? guest.name : guest.alarm ? "!" : guest.operation ? "→" : ""}</i>
                ))}
                {guests.length > 60 && <small>+{guests.length - 60}</small>}
              </span>
            </a>
          ))}
        </div>
      ))}
      <svg class="arcs" aria-hidden="true">
        {lines.map(({ id, from, to, state }) => (
          <path key={id} class={`way ${state}`} d={`M${from[0]} ${from[1]} C${from[0]} ${from[1] - 26} ${to[0]} ${to[1] - 26} ${to[0]} ${to[1]}`} />
        ))}
        {arcs.map(({ id, from, to }) => (
          <path key={id} d={`M${from[0]} ${from[1]} Q${(from[0] + to[0]) / 2} ${Math.min(from[1], to[1]) - 40} ${to[0]} ${to[1]}`} />
        ))}
      </svg>
    </div>
  );
}
