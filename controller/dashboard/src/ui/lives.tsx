// Where a guest lived, what each stay cost, and the pauses between them.
import { useEffect, useState } from "preact/hooks";
import { Refused, get } from "../api/http";
import type { Guest, Ledger, LedgerLine, Reliability } from "../api/types";
import { stays } from "../store/derive";
import { paidStays, priceStays } from "../store/good";
import { duration, money, moment, percent } from "./format";
import { Empty, HostLink, hostName } from "./parts";

const YEAR_MS = 365 * 86_400_000;
const AGAIN_MS = 60_000;
/** Pages of the ledger that are asked for: three months of a guest that seldom moves. */
const MOST_PAGES = 5;
const MOST_SHOWN = 20;

interface Told { life: Reliability; lines: LedgerLine[] | null; isWhole: boolean; clock: Ledger["clock"] }

async function ask(guest: Guest): Promise<Told> {
  const from = Math.max(guest.created_at_ms - 60_000, Date.now() - YEAR_MS);
  const life = await get<Reliability>(`/v1/reliability?guest=${guest.id}&from_ms=${Math.round(from)}`);
  const lines: LedgerLine[] = [];
  let clock: Ledger["clock"] = "wall";
  let page = "";
  try {
    for (let left = MOST_PAGES; left > 0; left -= 1) {
      const part = await get<Ledger>(`/v1/ledger?guest=${guest.id}&limit=1000${page}`);
      lines.push(...part.items);
      clock = part.clock;
      if (!part.next_page) return { life, lines, isWhole: true, clock };
      page = `&page=${encodeURIComponent(part.next_page)}`;
    }
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return { life, lines: null, isWhole: false, clock };
  }
  return { life, lines, isWhole: false, clock };
}

/** The places that a guest lived at, with what was paid and the pauses of its moves. */
export function Lives(props: { guest: Guest }) {
  const { guest } = props;
  const [told, setTold] = useState<Told>();
  useEffect(() => {
    let isHere = true;
    const again = async () => {
      try {
        const found = await ask(guest);
        if (isHere) setTold(found);
      } catch {
        // That the controller is away is told elsewhere; what was shown stays.
      }
    };
    void again();
    const timer = setInterval(() => void again(), AGAIN_MS);
    return () => {
      isHere = false;
      clearInterval(timer);
    };
  }, [guest.id, guest.host, guest.state, guest.epoch]);
  if (!told) return <Empty>…</Empty>;
  const lived = stays(told.life.stays ?? []);
  if (lived.length === 0) return <Empty>It was never started.</Empty>;
  const begun = lived[0]!.from;
  const end = lived[lived.length - 1]!.until;
  const span = Math.max(1, end - begun);
  const x = (at: number) => ((at - begun) / span) * 1000;
  const tones = new Map<string, number>();
  const tone = (host: string | null) => {
    if (!host) return "still";
    if (!tones.has(host)) tones.set(host, tones.size % 6);
    return `s${tones.get(host)! + 1}`;
  };
  // Lines come by host: those of a listing that was broken off would be some hosts' only.
  const paid = told.lines && told.isWhole ? priceStays(lived, paidStays(told.lines), told.clock) : lived.map(() => null);
  const drawn = lived.map((stay, at) => ({ ...stay, tone: tone(stay.host), paid: paid[at] ?? null, text: stay.host ? hostName(stay.host) : stay.still || (at === lived.length - 1 ? guest.state : "stopped or frozen") }));
  const cost = (one: (typeof drawn)[number]): string => (one.paid ? `${money(one.paid.paid)}${one.paid.unpriced > 0 ? ` and ${duration(one.paid.unpriced)} without a known price` : ""}` : "");
  const missed = told.life.lost_ms + told.life.paused_ms;
  return (
    <>
      <svg class="lives" viewBox="0 0 1000 24" preserveAspectRatio="none" role="img" aria-label={`places of ${guest.name}, with ${drawn.filter((stay) => stay.downtime !== null).length} pauses`}>
        {drawn.map((stay) => (
          <rect key={stay.from} class={stay.tone} x={x(stay.from)} width={Math.max(1, x(stay.until) - x(stay.from))} height="24">
            <title>{`${stay.text}: ${duration(stay.until - stay.from)}${stay.paid ? `, ${cost(stay)}` : ""}`}</title>
          </rect>
        ))}
        {drawn.map((stay) => (stay.downtime !== null || stay.still) && (
          <rect key={`p${stay.from}`} class="pause" x={Math.max(0, x(stay.from) - 1.5)} width={Math.max(3, stay.still ? x(stay.until) - x(stay.from) : (stay.downtime! / span) * 1000)} y="0" height="24">
            <title>{stay.still ? `lost for ${duration(stay.until - stay.from)}` : `a pause of ${duration(stay.downtime!)}`}</title>
          </rect>
        ))}
      </svg>
      {typeof told.life.availability_ppm === "number" && <p class="small">Available {percent(told.life.availability_ppm)} of the {duration(told.life.wanted_ms)} that it was to run{missed > 0 ? `: ${[told.life.paused_ms > 0 && `stood still for ${duration(told.life.paused_ms)} in ${told.life.moves} ${told.life.moves === 1 ? "move" : "moves"}`, told.life.lost_ms > 0 && `ran nowhere for ${duration(told.life.lost_ms)}`].filter(Boolean).join(", ")}` : ""}.</p>}
      <ol class="stays">
        {[...drawn].reverse().slice(0, MOST_SHOWN).map((stay) => (
          <li key={stay.from}>
            <i class={stay.tone} /> {stay.host ? <HostLink id={stay.host} /> : stay.text}{" "}
            <span class="soft">from {moment(stay.from)}, {duration(stay.until - stay.from)}</span>
            {stay.paid && <> · <b>{cost(stay)}</b></>}
            {stay.downtime !== null && <> · <a href={`#/operations/${stay.operation}`}>came with a pause of {duration(stay.downtime)}</a></>}
          </li>
        ))}
        {drawn.length > MOST_SHOWN && <li class="small soft">and {drawn.length - MOST_SHOWN} before</li>}
      </ol>
      {told.clock === "feed" && paid.some(Boolean) && <p class="small soft">Prices are by the clock of the price feed, stay by stay in their order.</p>}
      {!told.isWhole && <p class="small soft">{told.lines ? "What its stays cost has more lines than this page asks for" : "This token does not see what its stays cost"}: <code>supercloud ledger --guest {guest.name}</code></p>}
    </>
  );
}
