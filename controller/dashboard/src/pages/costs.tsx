// What was paid, for what, and what the same would have cost on demand: the ledger's own figures.
import type { LedgerLine } from "../api/types";
import { ledger, ledgerProblem } from "../store/store";
import { bytes, duration, feedTime, money } from "../ui/format";
import { Empty, Grid, Panel } from "../ui/parts";

/** The sums of the last 30 days. */
function CostFigures() {
  const totals = ledger.value?.totals;
  if (!totals) return null;
  const saved = totals.on_demand_nanousd - totals.comparable_paid_nanousd;
  return (
    <>
      <div class="figures">
        <div><b>{money(totals.paid_nanousd)}</b><span>paid</span></div>
        {totals.on_demand_nanousd > 0 && <div class={saved < 0 ? "bad" : ""}><b>{money(Math.abs(saved))}</b><span>{saved < 0 ? "more than on demand" : "saved beside on demand"}</span></div>}
        <div><b>{money(totals.runs_nanousd)}</b><span>guests</span></div>
        <div><b>{money(totals.incoming_nanousd)}</b><span>kept free for moves</span></div>
        <div><b>{money(totals.idle_nanousd)}</b><span>idle</span></div>
        <div><b>{money(totals.egress_nanousd)}</b><span>left clouds</span></div>
      </div>
      {totals.unpriced_ms > 0 && <p class="warn">Not counted, because no price is known: {duration(totals.unpriced_ms)} of hosts.</p>}
      {totals.unpriced_bytes > 0 && <p class="warn">Not counted, because no price is known: {bytes(totals.unpriced_bytes)} that left clouds.</p>}
    </>
  );
}

const KINDS: Record<string, string> = { runs: "running", incoming: "kept free for a move", idle: "idle", egress: "bytes that left" };

const amount = (nanousd: number | null | undefined): string => (nanousd === null || nanousd === undefined ? "not known" : money(nanousd));

export function Costs() {
  const found = ledger.value;
  if (!found) return <Panel title="Costs" wide><Empty>{ledgerProblem.value || "This token does not see the ledger."}</Empty></Panel>;
  const lines = found.items.map((line: LedgerLine, at) => ({ ...line, id: String(at) }));
  return (
    <div class="tiles">
      <Panel title="The last 30 days" wide aside={found.clock === "feed" ? <span class="soft">by the clock of the price feed</span> : undefined}><CostFigures /></Panel>
      <Panel title="Line by line" wide>
        <Grid name="lines of the ledger" tall items={lines} empty="Nothing was paid for yet." columns={[
          { title: "from", key: (line) => line.from_ms, show: (line) => feedTime(line.from_ms) },
          { title: "for", key: (line) => line.kind, show: (line) => KINDS[line.kind] ?? line.kind },
          { title: "guest", key: (line) => line.guest_name ?? "", show: (line) => line.guest_name ?? "–" },
          { title: "paid", key: (line) => line.paid_nanousd ?? -1, show: (line) => amount(line.paid_nanousd) },
          { title: "on demand", key: (line) => line.on_demand_nanousd ?? -1, show: (line) => amount(line.on_demand_nanousd) },
          { title: "host", key: (line) => line.host_name, show: (line) => line.host_name, wide: true },
          { title: "cloud", key: (line) => line.cloud_name, show: (line) => (line.to_cloud_name ? `${line.cloud_name} → ${line.to_cloud_name}` : line.cloud_name), wide: true },
          { title: "market", key: (line) => line.market ?? "", show: (line) => line.market ?? "–", wide: true },
        ]} />
        {found.next_page && <p class="small soft">The first {lines.length} lines; <code>supercloud api GET /v1/ledger --all</code> has every one.</p>}
      </Panel>
    </div>
  );
}
