// Two policies on one generated market, side by side; the controller reckons.
import { useEffect, useRef, useState } from "preact/hooks";
import { once } from "../api/http";
import type { SimulatedKind, SimulatedOutcome, SimulatedPolicy, Simulation, SimulationCreate } from "../api/types";
import { may } from "../store/derive";
import { who } from "../store/store";
import { Chart } from "../ui/chart";
import { useAttempt } from "../ui/dialog";
import { money } from "../ui/format";
import { Empty, Grid, Panel } from "../ui/parts";

const KINDS: [SimulatedKind, string][] = [
  ["smart-spot", "smart spot: price, risk and downtime are weighed"], ["smart-spot-spares", "smart spot, spread thinly, with spare hosts"],
  ["cheapest", "cheapest, with hysteresis"], ["greedy", "cheapest at every moment"],
];

type Setting = Exclude<keyof SimulatedPolicy, "kind">;
/** What people set, in their units, and what the API takes. */
const SETTINGS: { key: Setting; text: string; unit: number; kinds: SimulatedKind[]; least: number; most?: number }[] = [
  { key: "min_saving_permille", text: "moves for a saving of, %", unit: 10, kinds: ["smart-spot", "smart-spot-spares", "cheapest"], least: 0.1, most: 99.9 },
  { key: "horizon_ms", text: "which must pay for the move in, hours", unit: 3_600_000, kinds: ["smart-spot", "smart-spot-spares", "cheapest"], least: 0.1 },
  { key: "cool_down_ms", text: "moves again after, minutes", unit: 60_000, kinds: ["smart-spot", "smart-spot-spares", "cheapest"], least: 0 },
  { key: "settle_ms", text: "a price must have held for, minutes", unit: 60_000, kinds: ["smart-spot", "smart-spot-spares", "cheapest"], least: 0 },
  { key: "max_pool_permille", text: "of the fleet in one pool at most, %", unit: 10, kinds: ["smart-spot", "smart-spot-spares"], least: 0.1, most: 100 },
  { key: "guests_per_spare", text: "guests for each spare host (0: none)", unit: 1, kinds: ["smart-spot", "smart-spot-spares"], least: 0 },
];

interface Chosen { kind: SimulatedKind; settings: Partial<Record<Setting, string>> }

/** The policy as the API takes it; what its kind does not have is left out. */
export function asked(chosen: Chosen): SimulatedPolicy {
  const policy: SimulatedPolicy = { kind: chosen.kind };
  for (const { key, unit, kinds } of SETTINGS) {
    const text = chosen.settings[key]?.trim();
    if (text && kinds.includes(chosen.kind)) policy[key] = Math.round(Number(text) * unit);
  }
  return policy;
}

function PolicyForm(props: { name: string; chosen: Chosen; choose: (chosen: Chosen) => void }) {
  const { chosen, choose, name } = props;
  return (
    <fieldset class="panel">
      <legend>Policy {name}</legend>
      <label>Kind
        <select value={chosen.kind} onChange={(event) => choose({ ...chosen, kind: event.currentTarget.value as SimulatedKind })}>{KINDS.map(([kind, text]) => <option key={kind} value={kind}>{text}</option>)}</select>
      </label>
      {SETTINGS.filter((setting) => setting.kinds.includes(chosen.kind)).map(({ key, text, least, most }) => (
        <label key={key}>{text}
          <input type="number" step="any" min={least} max={most} placeholder="as it ships" value={chosen.settings[key] ?? ""} onInput={(event) => choose({ ...chosen, settings: { ...chosen.settings, [key]: event.currentTarget.value } })} />
        </label>
      ))}
    </fieldset>
  );
}

const percent = (part: number, places: number): string => `${(part * 100).toFixed(places)} %`;

function Results(props: { found: Simulation }) {
  const { found } = props;
  const columns: [string, SimulatedOutcome][] = [...found.outcomes.map((one, at): [string, SimulatedOutcome] => [found.outcomes.length > 1 ? `${"AB"[at]}: ${one.policy}` : one.policy, one]), ["on demand", found.on_demand]];
  const days = found.on_demand.paid_by_day_nanousd.length;
  const rows: { id: string; show: (one: SimulatedOutcome) => string }[] = [
    { id: "paid", show: (one) => money(one.paid_nanousd) },
    { id: "of on demand", show: (one) => percent(one.paid_nanousd / Math.max(1, found.on_demand.paid_nanousd), 1) },
    { id: "served", show: (one) => (one.availability === null || one.availability === undefined ? "not modelled" : percent(one.availability, 4)) },
    { id: "hosts taken", show: (one) => String(one.interruptions) },
    { id: "not left in time", show: (one) => String(one.missed) },
    { id: "moves of its own", show: (one) => String(one.moves) },
  ];
  const reasons = [...new Set(columns.flatMap(([, one]) => Object.keys(one.changes_by_reason)))].sort();
  for (const reason of reasons) rows.push({ id: `changed hosts: ${reason}`, show: (one) => String(one.changes_by_reason[reason] ?? 0) });
  return (
    <Panel title={`${found.guests} guests, ${found.spot_markets} spot markets, ${Math.round(found.hours / 24)} days`} wide>
      <Grid name="what came of it" items={rows} empty="" columns={[
        { title: "", show: (row) => row.id },
        ...columns.map(([name, one]) => ({ title: name, show: (row: (typeof rows)[number]) => row.show(one) })),
      ]} />
      <Chart label="what was paid by the end of each day" x={Array.from({ length: days + 1 }, (_, day) => day)} y={money} xText={(day) => (Number.isInteger(day) ? `day ${day}` : "")}
        series={columns.map(([name, one], at) => ({ name, values: [0, ...one.paid_by_day_nanousd], strong: at === 0, dashed: at === columns.length - 1 }))} />
      {found.notes.map((note) => <p key={note} class="small soft">{note}</p>)}
    </Panel>
  );
}

export function Simulator() {
  const [first, setFirst] = useState<Chosen>({ kind: "smart-spot", settings: {} });
  const [second, setSecond] = useState<Chosen>({ kind: "cheapest", settings: {} });
  const [days, setDays] = useState("28");
  const [seed, setSeed] = useState("12");
  const [taken, setTaken] = useState("24");
  const [notice, setNotice] = useState("120");
  const [found, setFound] = useState<Simulation>();
  const { isWorking, problem, attempt } = useAttempt();
  const stop = useRef<AbortController>();
  useEffect(() => () => stop.current?.abort(), []);
  if (!may(who.value, "move")) return <Panel title="Simulator" wide><Empty>To try policies takes a role that may move guests.</Empty></Panel>;
  const run = () => attempt(async () => {
    const ending = new AbortController();
    stop.current = ending;
    const wanted: SimulationCreate = {
      policies: [asked(first), asked(second)], days: Number(days), seed: Number(seed), notice_s: Number(notice), ...(taken.trim() ? { interruption_hours: Number(taken) } : {}),
    };
    try {
      setFound((await (await once("POST", "/v1/simulations", wanted, ending.signal)).json()) as Simulation);
    } catch (error) {
      // Given up by who looks: nothing went wrong.
      if (!ending.signal.aborted) throw error;
    }
  });
  return (
    <div class="tiles">
      <Panel title="Simulator" wide>
        <p>Two policies on one generated market, for the fleet that ships with the product. Recorded markets: <code>supercloud simulate --trace FILE</code>.</p>
        <form onSubmit={(event) => { event.preventDefault(); void run(); }}>
          <div class="tiles">
            <PolicyForm name="A" chosen={first} choose={setFirst} />
            <PolicyForm name="B" chosen={second} choose={setSecond} />
          </div>
          <div class="fields">
            <label>Days <input type="number" min={1} max={58} required value={days} onInput={(event) => setDays(event.currentTarget.value)} /></label>
            <label>Seed <input type="number" min={0} max={1_000_000_000} required value={seed} onInput={(event) => setSeed(event.currentTarget.value)} /></label>
            <label>A pool is taken once in, hours <input type="number" min={1} max={1000} placeholder="never" value={taken} onInput={(event) => setTaken(event.currentTarget.value)} /></label>
            <label>Notice, seconds <input type="number" min={0} max={3600} required value={notice} onInput={(event) => setNotice(event.currentTarget.value)} /></label>
          </div>
          <div class="line">
            <button class="main" disabled={isWorking}>Run both</button>
            {isWorking && <><span role="status">the controller reckons…</span><button type="button" onClick={() => stop.current?.abort()}>Stop</button></>}
            {problem && <span class="bad" role="alert">{problem}</span>}
          </div>
        </form>
      </Panel>
      {found && <Results found={found} />}
    </div>
  );
}
