// What the controller told, by kind and id. One place; pages read it, only this file writes it.
import { batch, computed, signal, type Signal } from "@preact/signals";
import { Refused, get, list } from "../api/http";
import { follow } from "../api/stream";
import type {
  Cloud, Evacuation, Event, FleetPlan, Freeze, Guest, GuestVerdict, Host, HostLink, Image, Ledger, Market, Network, Operation, Port, PriceSeries, Project, Reliability, Renting, Token, Volume, WhoAmI,
} from "../api/types";
import { isEnded, isStanding } from "./derive";
import { NONE, type Page, type Reach, further, reached } from "./done";
import { dayBegan } from "./good";
import { isAtRest } from "./plans";

export type Link = "starting" | "live" | "broken";

export const who: Signal<WhoAmI | null | undefined> = signal(undefined);
export const link: Signal<Link> = signal("starting");
/** When the stream broke, for the page's banner. */
export const brokenSince: Signal<number | null> = signal(null);
/** The status with which the stream was refused; absent where no answer came. */
export const refusal: Signal<number | undefined> = signal(undefined);
export const now = signal(Date.now());
/** Whether all was told once: before that nothing is known, least of all that nothing is wrong. */
export const isLoaded = signal(false);
/** Why it is not, in the controller's words. */
export const loadProblem = signal("");

interface Entity { id: string }
export type Table<T> = Signal<ReadonlyMap<string, T>>;
const table = <T,>(): Table<T> => signal<ReadonlyMap<string, T>>(new Map());

export const clouds = table<Cloud>();
export const hosts = table<Host>();
export const guests = table<Guest>();
export const operations = table<Operation>();
/** How far back of the newest operations all are known. */
export const operationsReach: Signal<Reach> = signal(NONE);
export const networks = table<Network>();
export const ports = table<Port>();
export const images = table<Image>();
export const volumes = table<Volume>();
export const freezes = table<Freeze>();
export const projects = table<Project>();
export const tokens = table<Token>();
export const rentings = table<Renting>();
export const plans = table<FleetPlan>();
export const markets: Signal<Market[]> = signal([]);
export const prices: Signal<ReadonlyMap<string, PriceSeries>> = signal(new Map());
/** The last 30 days: sums of all, and the first thousand lines. Absent until asked for, and for tokens that do not see it. */
export const ledger: Signal<Ledger | null> = signal(null);
/** The day that is: its sums, and what all costs now. */
export const today: Signal<Ledger | null> = signal(null);
/** Why the ledger is not told. */
export const ledgerProblem = signal("");
/** The last 30 days: availability, moves, deadlines. */
export const reliability: Signal<Reliability | null> = signal(null);
/** What policies decided for guests. */
export const verdicts: Signal<GuestVerdict[]> = signal([]);
/** Of these, those that count: of guests that follow prices still. */
export const decided = computed(() => verdicts.value.filter((one) => guests.value.get(one.guest)?.follow_prices));
/** Guests on hosts that a provider takes back, and whether they could leave in time. */
export const evacuations: Signal<Evacuation[]> = signal([]);
/** Ways between hosts, as their agents measure them. */
export const ways: Signal<HostLink[]> = signal([]);
/** Whether these are all: of a big fleet the first page is enough for the map, and pages of hosts ask for theirs. */
export const areAllWays = signal(true);
/** Newest last. */
export const events: Signal<Event[]> = signal([]);
const EVENTS_KEPT = 2000;
const SAMPLES_KEPT_MS = 3_600_000;
/** Records that are asked for one by one; of more, whole kinds are. */
const MOST_SINGLES = 50;

/** What comes to an end first, mirrors that stand last: there may be many, and they stay. */
export const underWay = computed(() => {
  const open = [...operations.value.values()].filter((operation) => !isEnded(operation.phase));
  return [...open.filter((operation) => !isStanding(operation)), ...open.filter(isStanding)];
});
export const isBusy = computed(() => underWay.value.length > 0);

/** Samples of operations that this page has watched: their rounds, for the operation's page. */
export interface Sample { at: number; remaining: number; dirty: number; bandwidth: number; sent: number; round: number; mirrorAge: number | null }
export const samples: Signal<ReadonlyMap<string, Sample[]>> = signal(new Map());

function put<T extends Entity>(into: Table<T>, items: T[]): void {
  if (items.length === 0) return;
  const next = new Map(into.peek());
  for (const item of items) next.set(item.id, item);
  into.value = next;
}

function replace<T extends Entity>(into: Table<T>, items: T[]): void {
  into.value = new Map(items.map((item) => [item.id, item]));
}

function drop<T>(from: Table<T>, id: string): void {
  if (!from.peek().has(id)) return;
  const next = new Map(from.peek());
  next.delete(id);
  from.value = next;
}

async function one<T extends Entity>(into: Table<T>, path: string, id: string): Promise<void> {
  try {
    put(into, [await get<T>(`${path}/${id}`)]);
  } catch (error) {
    if (error instanceof Refused && error.problem.status === 404) drop(into, id);
    else throw error;
  }
}

async function all<T extends Entity>(into: Table<T>, path: string): Promise<void> {
  try {
    replace(into, await list<T>(path));
  } catch (error) {
    // What this token may not see is not shown.
    if (error instanceof Refused && error.problem.status === 403) replace(into, []);
    else throw error;
  }
}

async function loadPrices(): Promise<void> {
  const found = await list<Market>("/v1/markets");
  const series = await Promise.all(
    found.map((market) => get<PriceSeries>(`/v1/prices?market=${encodeURIComponent(market.name)}`)),
  );
  batch(() => {
    markets.value = found;
    prices.value = new Map(series.map((one) => [one.market, one]));
  });
}

/** What an endpoint tells; null where it refuses. */
async function unless<T>(path: string, refused?: (error: Refused) => void): Promise<T | null> {
  try {
    return await get<T>(path);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    refused?.(error);
    return null;
  }
}

async function loadLedger(): Promise<void> {
  const MONTH_MS = 30 * 86_400_000;
  // By which clock it is kept the controller knows; of no time at all that costs nothing to ask.
  const clock = today.peek()?.clock ?? (await unless<Ledger>("/v1/ledger?limit=1&from_ms=0&to_ms=0"))?.clock;
  let said = "";
  const ask = (from: number, limit: number) => unless<Ledger>(`/v1/ledger?limit=${limit}&from_ms=${Math.max(0, from)}`, (error) => { said = error.message; });
  const until = clock === "wall" ? Date.now() : Math.max(0, ...markets.peek().map((market) => market.feed_now_ms));
  const of_day = clock ? await ask(dayBegan(clock, until), 1) : null;
  const month = clock ? await ask(until - MONTH_MS, 1000) : null;
  batch(() => {
    // What was told stays while it cannot be told anew; the page says why.
    today.value = of_day ?? today.peek();
    ledger.value = month ?? ledger.peek();
    ledgerProblem.value = said;
  });
}

async function loadReliability(): Promise<void> {
  reliability.value = await unless<Reliability>("/v1/reliability");
}

const NEWEST = 200;
/** What failed shortly before somebody looks is an alarm, however much was done since. */
const FAILED_MS = 2 * 86_400_000;

/** Those under way, the newest, and what lately failed. */
async function loadOperations(): Promise<void> {
  const since = Date.now() - FAILED_MS;
  const failed = (phase: Operation["phase"]) => list<Operation>(`/v1/operations?newest=true&phase=${phase}&from_ms=${since}`);
  const [newest, open, ...others] = await Promise.all([
    get<Page<Operation>>(`/v1/operations?newest=true&limit=${NEWEST}`), list<Operation>("/v1/operations?active=true"), failed("failed"), failed("rolled_back"),
  ]);
  const fresh = new Set([...open, ...newest.items].map((one) => one.id));
  const over = underWay.peek().filter((one) => !fresh.has(one.id));
  batch(() => {
    operationsReach.value = reached(operations.peek(), operationsReach.peek(), newest);
    // What ended a while ago in between is asked for one by one: else it would be under way for ever.
    for (const one of over.slice(MOST_SINGLES)) drop(operations, one.id);
    put(operations, [...others.flat(), ...open, ...newest.items]);
  });
  await Promise.all(over.slice(0, MOST_SINGLES).map((gone) => one(operations, "/v1/operations", gone.id)));
}

/** The next page of older ones. */
export async function loadOlder(): Promise<void> {
  const { next } = operationsReach.peek();
  if (next === null) return;
  const page = await get<Page<Operation>>(`/v1/operations?newest=true&limit=${NEWEST}&page=${encodeURIComponent(next)}`);
  batch(() => {
    put(operations, page.items);
    operationsReach.value = further(operationsReach.peek(), page);
  });
}

/** One that is older than those that are known. */
export const findOperation = (id: string): Promise<void> => one(operations, "/v1/operations", id);

/** Of one guest, the newest first: where the next older ones are. */
export async function loadOperationsOf(guest: string, from: string | null): Promise<string | null> {
  let next = from;
  // A page on which all was somebody else's says nothing; but nobody waits for a whole history.
  for (let left = 10; left > 0; left -= 1) {
    const page = await get<Page<Operation>>(`/v1/operations?newest=true&limit=20&guest=${guest}${next ? `&page=${encodeURIComponent(next)}` : ""}`);
    put(operations, page.items);
    next = page.next_page ?? null;
    if (next === null || page.items.length > 0) break;
  }
  return next;
}

/** Rentings and plans belong to no project: only who sees all projects may ask. */
export const seesAll = (): boolean => !who.peek()?.token.project && !who.peek()?.token.guest;

const loaders: Record<string, () => Promise<void>> = {
  clouds: () => all(clouds, "/v1/clouds"),
  hosts: () => all(hosts, "/v1/hosts"),
  guests: () => all(guests, "/v1/guests"),
  operations: loadOperations,
  networks: () => all(networks, "/v1/networks"),
  ports: () => all(ports, "/v1/ports"),
  images: () => all(images, "/v1/images"),
  volumes: () => all(volumes, "/v1/volumes"),
  freezes: () => all(freezes, "/v1/freezes"),
  projects: () => all(projects, "/v1/projects"),
  tokens: () => all(tokens, "/v1/tokens"),
  rentings: () => (seesAll() ? all(rentings, "/v1/rentings") : Promise.resolve()),
  evacuations: async () => {
    try {
      evacuations.value = await list<Evacuation>("/v1/evacuations");
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      evacuations.value = [];
    }
  },
  verdicts: async () => {
    try {
      verdicts.value = await list<GuestVerdict>("/v1/verdicts");
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      verdicts.value = [];
    }
  },
  ways: async () => {
    try {
      const page = await get<{ items: HostLink[]; next_page?: string | null }>("/v1/links?limit=1000");
      batch(() => {
        ways.value = page.items;
        areAllWays.value = !page.next_page;
      });
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      // Too many ask: what was told before stays until the next time.
      if (error.problem.status === 403 || error.problem.status === 404) ways.value = [];
    }
  },
  plans: () => (seesAll() ? all(plans, "/v1/plans") : Promise.resolve()),
};

/** Asks anew for whole kinds. */
export async function refresh(...kinds: string[]): Promise<void> {
  await Promise.all(kinds.map((kind) => loaders[kind]?.()));
}

const isFailure = (event: Event): boolean => {
  const phase = (event.data as { phase?: string } | null)?.phase;
  return event.kind === "operation.phase" && (phase === "failed" || phase === "rolled_back");
};

async function loadAll(): Promise<void> {
  const kinds = Object.keys(loaders).filter((kind) => kind !== "tokens" || who.peek()?.token.role === "admin");
  await Promise.all([refresh(...kinds), loadPrices().then(loadLedger), loadReliability()]);
  // What an event of before tells has failed is an alarm, too, however long ago it was begun.
  const told = events.peek().filter((event) => event.operation && isFailure(event) && !operations.peek().has(event.operation));
  const ids = [...new Set(told.map((event) => event.operation!))].slice(-MOST_SINGLES);
  await Promise.all(ids.map((id) => one(operations, "/v1/operations", id)));
}

// What events say has changed is asked for once per short while, however many events say it.
const dirty = new Set<string>();
let timer: ReturnType<typeof setTimeout> | undefined;

/** The records that an event makes old: `kind` or `kind/id`. */
export function touched(event: Event): string[] {
  const found: string[] = [];
  if (event.guest) found.push(`guests/${event.guest}`);
  if (event.host) found.push(`hosts/${event.host}`);
  if (event.operation) found.push(`operations/${event.operation}`);
  const family = event.kind.split(".")[0];
  const guest = event.guest ? guests.peek().get(event.guest) : undefined;
  // Of a guest that is known its own disks and ports are asked for: in a big fleet something always moves.
  const own = guest ? [...guest.volumes.map((id) => `volumes/${id}`), ...guest.ports.map((id) => `ports/${id}`)] : ["ports", "volumes"];
  if (event.kind === "guest.created" || event.kind === "guest.deleted") found.push("ports", "volumes", "hosts");
  if (event.kind === "guest.switched") found.push("hosts", ...own);
  if (family === "cloud") found.push("clouds");
  if (family === "network") found.push("networks");
  if (family === "image") found.push("images");
  if (family === "project") found.push("projects");
  if (family === "token") found.push("tokens");
  if (family === "host") found.push("hosts", "rentings");
  if (family === "renting") found.push("rentings");
  if (event.kind === "guest.not_evacuable" || event.kind === "guest.evacuable") found.push("evacuations");
  if (family === "plan") found.push("plans");
  if (family === "operation") {
    const { kind = "", phase = "" } = (event.data ?? {}) as { kind?: string; phase?: string };
    if (kind === "guest_freeze" || kind === "guest_thaw" || kind === "guest_delete") found.push("freezes");
    if (kind === "image_import") found.push("images");
    if (kind === "host_rent" || kind === "host_return") found.push("rentings");
    if (event.guest && isEnded(phase as Operation["phase"])) found.push(...own);
  }
  return found;
}

const tables: Record<string, Table<Entity>> = {
  guests: guests as unknown as Table<Entity>,
  hosts: hosts as unknown as Table<Entity>,
  operations: operations as unknown as Table<Entity>,
  volumes: volumes as unknown as Table<Entity>,
  ports: ports as unknown as Table<Entity>,
};

let isFlushing = false;

/** The session has ended: nothing of what it saw stays. */
function signedOut(): void {
  end();
  who.value = null;
}

async function flush(): Promise<void> {
  timer = undefined;
  if (isFlushing) {
    timer = setTimeout(() => void flush(), 150);
    return;
  }
  isFlushing = true;
  try {
    await ask();
  } finally {
    isFlushing = false;
  }
}

async function ask(): Promise<void> {
  const asked = [...dirty];
  dirty.clear();
  const kinds = new Set(asked.filter((mark) => !mark.includes("/")));
  if (kinds.has("tokens") && who.peek()?.token.role !== "admin") kinds.delete("tokens");
  const singles = asked.filter((mark) => mark.includes("/") && !kinds.has(mark.split("/")[0]!));
  const work: Promise<void>[] = [refresh(...kinds)];
  if (singles.length > MOST_SINGLES) work.push(refresh(...new Set(singles.map((mark) => mark.split("/")[0]!))));
  else {
    for (const mark of singles) {
      const [kind, id] = mark.split("/") as [string, string];
      work.push(one(tables[kind]!, `/v1/${kind}`, id));
    }
  }
  try {
    await Promise.all(work);
  } catch (error) {
    if (error instanceof Refused && error.problem.status === 401) return signedOut();
    // What could not be asked for is asked for again, after a while: nothing else would say that it is old.
    for (const mark of asked) dirty.add(mark);
    await pause(2000);
    timer ??= setTimeout(() => void flush(), 0);
  }
}

const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

/** What one token saw is nothing to the next. */
function forget(): void {
  batch(() => {
    for (const one of [clouds, hosts, guests, operations, networks, ports, images, volumes, freezes, projects, tokens, rentings, plans]) one.value = new Map();
    for (const one of [markets, verdicts, evacuations, ways, events]) one.value = [];
    for (const one of [prices, samples]) one.value = new Map();
    for (const one of [ledger, today, reliability]) one.value = null;
    for (const one of [ledgerProblem, loadProblem]) one.value = "";
    operationsReach.value = NONE;
    isLoaded.value = false;
  });
  dirty.clear();
  clearTimeout(timer);
  timer = undefined;
}

let stopAll: AbortController | undefined;

/** Begins to follow the controller as who is signed in; ends what was followed before. */
export async function begin(): Promise<void> {
  stopAll?.abort();
  const stop = new AbortController();
  stopAll = stop;
  forget();
  let isAsked = false;
  let opened: () => void = () => undefined;
  const isOpen = new Promise<void>((resolve) => { opened = resolve; });
  const listener = {
    onOpen() {
      batch(() => {
        link.value = "live";
        brokenSince.value = null;
      });
      opened();
      // What happened while the stream was away is told by it; what is not an event is asked for anew.
      if (isLoaded.peek()) void loadAll().catch(() => undefined);
    },
    onEvents(fresh: Event[]) {
      events.value = [...events.peek(), ...fresh].slice(-EVENTS_KEPT);
      // What changes while the listings are on their way may be missing from them.
      if (isAsked) for (const event of fresh) for (const what of touched(event)) dirty.add(what);
      if (isLoaded.peek() && dirty.size > 0) timer ??= setTimeout(() => void flush(), 150);
    },
    onBroken(status: number | undefined) {
      if (status === 401) return signedOut();
      batch(() => {
        link.value = "broken";
        refusal.value = status;
        brokenSince.value ??= Date.now();
      });
    },
  };
  const following = follow(500, listener, stop.signal);
  void following;
  // The events of before come at once with the stream; those after them tell what the listings may lack.
  await Promise.race([isOpen.then(() => pause(100)), pause(1500)]);
  isAsked = true;
  while (!stop.signal.aborted && !isLoaded.peek()) {
    try {
      await loadAll();
      if (!stop.signal.aborted) isLoaded.value = true;
    } catch (error) {
      if (error instanceof Refused && error.problem.status === 401) return signedOut();
      loadProblem.value = error instanceof Refused ? error.problem.detail : "";
      await pause(1000);
    }
  }
  if (stop.signal.aborted) return;
  if (dirty.size > 0) timer ??= setTimeout(() => void flush(), 0);
  every(stop.signal, 1000, async () => {
    now.value = Date.now();
    if (isBusy.peek()) await poll();
    const active = [...plans.peek().values()].filter((plan) => !isAtRest(plan.state)).slice(0, 5);
    if (active.length > 0) put(plans, await Promise.all(active.map((plan) => get<FleetPlan>(`/v1/plans/${plan.id}`))));
  });
  every(stop.signal, 5000, async () => {
    if (link.peek() === "live") await Promise.all([loadPrices(), refresh("hosts")]);
  });
  every(stop.signal, 10_000, async () => {
    if (link.peek() === "live") await refresh("ways", "verdicts");
  });
  every(stop.signal, 30_000, async () => {
    if (link.peek() === "live") await refresh("evacuations");
  });
  every(stop.signal, 60_000, async () => {
    if (link.peek() === "live") await Promise.all([loadLedger(), loadReliability()]);
  });
}

/** Progress is finer than events: operations under way are asked for once a second. */
async function poll(): Promise<void> {
  const told = await Promise.allSettled(
    underWay.peek().slice(0, 20).map((operation) => get<Operation>(`/v1/operations/${operation.id}`)),
  );
  const found = told.flatMap((one) => (one.status === "fulfilled" ? [one.value] : []));
  const next = new Map(samples.peek());
  for (const operation of found) {
    const progress = operation.progress;
    const sample = {
      at: Date.now(),
      remaining: progress.memory_remaining_bytes ?? 0,
      dirty: progress.dirty_bytes_per_s ?? 0,
      bandwidth: progress.bandwidth_bytes_per_s ?? 0,
      sent: progress.memory_sent_bytes ?? 0,
      round: progress.round ?? 0,
      mirrorAge: progress.mirror && progress.mirror.committed > 0 ? progress.mirror.committed_age_ms : null,
    };
    next.set(operation.id, [...(next.get(operation.id) ?? []), sample].slice(-600));
  }
  // Of what ended a while ago nobody looks at the seconds any more.
  const last = Date.now() - SAMPLES_KEPT_MS;
  for (const [id, seen] of next) if ((seen.at(-1)?.at ?? 0) < last) next.delete(id);
  batch(() => {
    put(operations, found);
    samples.value = next;
  });
}

function every(signal: AbortSignal, ms: number, work: () => Promise<void>): void {
  let isRunning = false;
  const handle = setInterval(() => {
    if (isRunning) return;
    isRunning = true;
    work()
      .catch((error: unknown) => {
        if (error instanceof Refused && error.problem.status === 401) signedOut();
      })
      .finally(() => {
        isRunning = false;
      });
  }, ms);
  signal.addEventListener("abort", () => clearInterval(handle));
}

export function end(): void {
  stopAll?.abort();
  forget();
  link.value = "starting";
}

export function learnPlan(plan: FleetPlan): void {
  put(plans, [plan]);
}

/** A change that this page made is shown at once. */
export function learn(operation: Operation): void {
  put(operations, [operation]);
}
