// Small parts that all pages share.
import type { ComponentChildren } from "preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import type { Guest, Host, Operation } from "../api/types";
import { guests, hosts } from "../store/store";
import { PHASES, fraction, isEnded, label } from "../store/derive";
import { bytes, duration, eta, rate } from "./format";

export function Panel(props: { title: string; aside?: ComponentChildren; children: ComponentChildren; wide?: boolean }) {
  return (
    <section class={`panel${props.wide ? " wide" : ""}`} aria-label={props.title}>
      <header>
        <h2>{props.title}</h2>
        {props.aside}
      </header>
      {props.children}
    </section>
  );
}

export function Empty(props: { children: ComponentChildren }) {
  return <p class="empty">{props.children}</p>;
}

const MARKS: Record<string, [string, string]> = {
  running: ["good", "running"], up: ["good", "up"], done: ["good", "done"], ready: ["good", "ready"],
  created: ["idle", "created"], stopped: ["idle", "stopped"], frozen: ["cold", "frozen"], cordoned: ["warn", "cordoned"],
  rolled_back: ["warn", "rolled back"], unreachable: ["bad", "unreachable"], lost: ["bad", "lost"], failed: ["bad", "failed"],
  silent: ["bad", "no answer"], not_measured: ["idle", "not measured"], answers: ["good", "answers"],
  removed: ["idle", "removed"], proposed: ["idle", "proposed"], pending: ["idle", "pending"], skipped: ["idle", "not needed any more"],
  cancelled: ["warn", "cancelled"], undone: ["warn", "taken back"], not_undone: ["bad", "not taken back"], undoing: ["busy", "being taken back"],
};

/** A state as colour, sign and word: colour alone tells nothing to some. */
export function State(props: { of: string }) {
  const [tone, text] = MARKS[props.of] ?? ["busy", props.of.replaceAll("_", " ")];
  return <span class={`state ${tone}`}>{text}</span>;
}

export function hostName(id: string | null | undefined): string {
  return id ? (hosts.value.get(id)?.name ?? id.slice(0, 13)) : "–";
}

export function GuestLink(props: { id: string | null | undefined }) {
  if (!props.id) return <>–</>;
  return <a href={`#/guests/${props.id}`}>{guests.value.get(props.id)?.name ?? props.id.slice(0, 14)}</a>;
}

export function HostLink(props: { id: string | null | undefined }) {
  const name = hostName(props.id);
  return props.id ? <a href={`#/hosts/${name}`}>{name}</a> : <>–</>;
}

export function Bar(props: { operation: Operation }) {
  const { operation } = props;
  const part = fraction(operation);
  const tone = operation.phase === "failed" ? "bad" : operation.phase === "rolled_back" ? "warn" : isEnded(operation.phase) ? "good" : "busy";
  return (
    <div class={`bar ${tone}`} role="progressbar" aria-valuemin={0} aria-valuemax={100} aria-valuenow={Math.round(part * 100)}
      aria-label={`${label(operation)}: ${operation.phase}`}>
      <svg viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">
        <rect width={part * 100} height="4" />
      </svg>
    </div>
  );
}

/** What moves now, in one row: from, to, phase, bar, rates, time left, pause. */
export function Moving(props: { operation: Operation; children?: ComponentChildren }) {
  const { operation } = props;
  const { progress } = operation;
  const facts: string[] = [];
  if (progress.memory_sent_bytes > 0) facts.push(`${bytes(progress.memory_sent_bytes)} sent`);
  if ((progress.memory_missing_bytes ?? 0) > 0) facts.push(`fetching memory: ${bytes(progress.memory_missing_bytes!)} missing`);
  if (progress.bandwidth_bytes_per_s > 0) facts.push(rate(progress.bandwidth_bytes_per_s));
  if (progress.dirty_bytes_per_s > 0) facts.push(`writes ${rate(progress.dirty_bytes_per_s)}`);
  const disk = (progress.disk_bytes_before_resume ?? 0) + (progress.disk_bytes_after_resume ?? 0);
  if (disk > 0) facts.push(`disk ${bytes(disk)}`);
  const left = eta(progress.eta_min_ms, progress.eta_max_ms);
  if (left && !isEnded(operation.phase)) facts.push(`${left} left`);
  if (progress.downtime_ms !== null && progress.downtime_ms !== undefined) facts.push(`paused ${duration(progress.downtime_ms)}`);
  return (
    <div class="moving">
      <div class="line">
        <a href={`#/operations/${operation.id}`}>{label(operation)}</a>
        {operation.guest && <b><GuestLink id={operation.guest} /></b>}
        {(operation.source || operation.destination) && (
          <span class="way">{hostName(operation.source)} → {hostName(operation.destination)}</span>
        )}
        <State of={operation.phase} />
        <span class="grow" />
        {props.children}
      </div>
      <Bar operation={operation} />
      <div class="line small">
        <span>{facts.join(" · ")}</span>
        <span class="grow" />
        <span>{progress.message}</span>
      </div>
    </div>
  );
}

/** The phases as steps with their times. */
export function Steps(props: { operation: Operation }) {
  const times = new Map((props.operation.phase_times ?? []).map((time) => [time.phase, time.at_ms]));
  const at = PHASES.indexOf(props.operation.phase);
  const ended = isEnded(props.operation.phase);
  const begun = props.operation.created_at_ms;
  return (
    <ol class="steps">
      {PHASES.map((phase, index) => {
        const entered = times.get(phase);
        const tone = ended ? (entered !== undefined ? "past" : "never") : index < at ? "past" : index === at ? "here" : "ahead";
        return (
          <li key={phase} class={tone} aria-current={tone === "here" ? "step" : undefined}>
            {phase}
            <small>{entered !== undefined ? `+${duration(Math.max(0, entered - begun))}` : " "}</small>
          </li>
        );
      })}
    </ol>
  );
}

export interface Column<T> {
  title: string;
  show: (item: T) => ComponentChildren;
  /** What it is ordered by. */
  key?: (item: T) => string | number;
  /** Of use on wide screens only. */
  wide?: boolean;
}

const ROW = 36;

const words = new Intl.Collator();

function inOrder<T>(items: T[], key: ((item: T) => string | number) | undefined, up: boolean): T[] {
  if (!key) return items;
  const sign = up ? 1 : -1;
  const keyed = items.map((item) => ({ item, key: key(item) }));
  keyed.sort((a, b) => sign * (typeof a.key === "number" && typeof b.key === "number" ? a.key - b.key : words.compare(String(a.key), String(b.key))));
  return keyed.map((one) => one.item);
}

/** A table that holds only the rows in sight: ten thousand of them scroll as ten do. */
export function Grid<T extends { id: string }>(props: { name: string; items: T[]; columns: Column<T>[]; empty: ComponentChildren; tall?: boolean }) {
  const [order, setOrder] = useState<{ at: number; up: boolean }>({ at: 0, up: true });
  const [top, setTop] = useState(0);
  const [height, setHeight] = useState(600);
  const box = useRef<HTMLDivElement>(null);
  useEffect(() => {
    const element = box.current;
    if (!element) return;
    const observer = new ResizeObserver(() => setHeight(element.clientHeight));
    observer.observe(element);
    return () => observer.disconnect();
  }, []);
  // Put in order when the items change, not when they are scrolled.
  const items = useMemo(() => inOrder(props.items, props.columns[order.at]?.key, order.up), [props.items, order.at, order.up]);
  if (props.items.length === 0) return <Empty>{props.empty}</Empty>;
  // A table that got shorter is at its end: what was scrolled to is not there any more.
  const from = Math.max(0, Math.min(Math.floor(top / ROW), items.length - Math.ceil(height / ROW)));
  const first = Math.max(0, from - 10);
  const last = Math.min(items.length, from + Math.ceil(height / ROW) + 11);
  return (
    <div class={`grid${props.tall ? " tall" : ""}`} ref={box} tabIndex={0} role="region" aria-label={props.name}
      onScroll={(event) => setTop(event.currentTarget.scrollTop)}>
      <table aria-rowcount={items.length + 1}>
        <thead>
          <tr>
            {props.columns.map((column, at) => (
              <th key={column.title} class={column.wide ? "on-wide" : ""} aria-sort={order.at !== at || !column.key ? undefined : order.up ? "ascending" : "descending"}>
                {column.key ? (
                  <button class="plain" onClick={() => setOrder({ at, up: order.at === at ? !order.up : true })}>
                    {column.title}{order.at === at ? (order.up ? " ↑" : " ↓") : ""}
                  </button>
                ) : column.title}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {first > 0 && <tr aria-hidden="true" style={{ height: `${first * ROW}px` }} />}
          {items.slice(first, last).map((item, index) => (
            <tr key={item.id} aria-rowindex={first + index + 2}>
              {props.columns.map((column) => <td key={column.title} class={column.wide ? "on-wide" : ""}>{column.show(item)}</td>)}
            </tr>
          ))}
          {last < items.length && <tr aria-hidden="true" style={{ height: `${(items.length - last) * ROW}px` }} />}
        </tbody>
      </table>
    </div>
  );
}

/** Asks for what is older than what is shown, where there is more. */
export function Older(props: { isMore: boolean; load: () => Promise<unknown> }) {
  const [state, setState] = useState<"" | "asked" | "failed">("");
  if (!props.isMore) return null;
  const ask = () => {
    setState("asked");
    props.load().then(() => setState(""), () => setState("failed"));
  };
  return (
    <span class="line">
      {state === "failed" && <span class="bad" role="alert">no answer</span>}
      <button onClick={ask} disabled={state === "asked"}>{state === "asked" ? "…" : "Older"}</button>
    </span>
  );
}

export function Facts(props: { rows: [string, ComponentChildren][] }) {
  return (
    <dl class="facts">
      {props.rows.map(([name, value]) => (
        <div key={name}><dt>{name}</dt><dd>{value}</dd></div>
      ))}
    </dl>
  );
}

export function room(host: Host): [string, number][] {
  const part = (used: number, all: number) => (all > 0 ? Math.min(1, used / all) : 0);
  return [
    ["vCPU", part(host.used.vcpus, host.capacity.vcpus)],
    ["memory", part(host.used.memory_bytes, host.capacity.memory_bytes)],
    ["disk", part(host.used.disk_bytes, host.capacity.disk_bytes)],
  ];
}

export const shapeText = (guest: Guest): string => `${guest.shape.vcpus} vCPU, ${bytes(guest.shape.memory_bytes)}`;
