// What the controller told, by kind and id. One place; pages read it, only this file writes it.
import { batch, computed, signal, type Signal } from "@preact/signals";
import { Away, Refused, get, list } from "../api/http";
import { follow } from "../api/stream";
import type {
  Cloud, Evacuation, Event, FleetPlan, Freeze, Guest, GuestVerdict, Host, HostLink, Image, Ledger, Market, Network, Operation, Port, PriceSeries, Project, Reliability, Renting, Token, Volume, WhoAmI,
} from "../api/types";
import { isEnded } from "./derive";
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

interface Entity { id: string }
export type Table<T> = Signal<ReadonlyMap<string, T>>;
const table = <T,>(): Table<T> => signal<ReadonlyMap<string, T>>(new Map());

export const clouds = table<Cloud>();
export const hosts = table<Host>();
export const guests = table<Guest>();
export const operations = table<Operation>();
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
/** Guests on hosts that a provider takes back, and whether they could leave in time. */
export const evacuations: Signal<Evacuation[]> = signal([]);
/** Ways between hosts, as their agents measure them. */
export const ways: Signal<HostLink[]> = signal([]);
/** Whether these are all: of a big fleet the first page is enough for the map, and pages of hosts ask for theirs. */
export const areAllWays = signal(true);
/** Newest last. */
export const events: Signal<Event[]> = signal([]);
const EVENTS_KEPT = 2000;

export const underWay = computed(() => [...operations.value.values()].filter((operation) => !isEnded(operation.phase)));
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
    today.value = of_day;
    ledger.value = month;
    ledgerProblem.value = said;
  });
}

async function loadReliability(): Promise<void> {
  reliability.value = await unless<Reliability>("/v1/reliability");
}

/** Rentings and plans belong to no project: only who sees all projects may ask. */
export const seesAll = (): boolean => !who.peek()?.token.project && !who.peek()?.token.guest;

const loaders: Record<string, () => Promise<void>> = {
  clouds: () => all(clouds, "/v1/clouds"),
  hosts: () => all(hosts, "/v1/hosts"),
  guests: () => all(guests, "/v1/guests"),
  operations: () => all(operations, "/v1/operations"),
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

async function loadAll(): Promise<void> {
  const kinds = Object.keys(loaders).filter((kind) => kind !== "tokens" || who.peek()?.token.role === "admin");
  await Promise.all([refresh(...kinds), loadPrices().then(loadLedger), loadReliability()]);
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
  if (event.kind === "guest.created" || event.kind === "guest.deleted" || event.kind === "guest.switched") {
    found.push("ports", "volumes", "hosts");
  }
  if (family === "cloud") found.push("clouds");
  if (family === "network") found.push("networks");
  if (family === "image") found.push("images");
  if (family === "project") found.push("projects");
  if (family === "token") found.push("tokens");
  if (family === "host") found.push("hosts", "rentings");
  if (family === "renting") found.push("rentings");
  if (event.kind === "guest.not_evacuable" || event.kind === "guest.evacuable") found.push("evacuations");
  if (family === "plan") found.push("plans");
  if (family === "operation") found.push("freezes", "images", "volumes", "rentings");
  return found;
}

const tables: Record<string, Table<Entity>> = {
  guests: guests as unknown as Table<Entity>,
  hosts: hosts as unknown as Table<Entity>,
  operations: operations as unknown as Table<Entity>,
};

async function flush(): Promise<void> {
  timer = undefined;
  const asked = [...dirty];
  dirty.clear();
  const kinds = new Set(asked.filter((mark) => !mark.includes("/")));
  if (kinds.has("tokens") && who.peek()?.token.role !== "admin") kinds.delete("tokens");
  const singles = asked.filter((mark) => mark.includes("/") && !kinds.has(mark.split("/")[0]!));
  const work: Promise<void>[] = [refresh(...kinds)];
  if (singles.length > 50) work.push(refresh("guests", "hosts", "operations"));
  else {
    for (const mark of singles) {
      const [kind, id] = mark.split("/") as [string, string];
      work.push(one(tables[kind]!, `/v1/${kind}`, id));
    }
  }
  try {
    await Promise.all(work);
  } catch (error) {
    if (error instanceof Refused && error.problem.status === 401) who.value = null;
    else if (error instanceof Away) for (const mark of asked) dirty.add(mark);
    else console.warn(error);
  }
}

function mark(event: Event): void {
  for (const what of touched(event)) dirty.add(what);
  timer ??= setTimeout(() => void flush(), 150);
}

let stopAll: AbortController | undefined;

/** Begins to follow the controller as who is signed in; ends what was followed before. */
export async function begin(): Promise<void> {
  stopAll?.abort();
  const stop = new AbortController();
  stopAll = stop;
  batch(() => {
    events.value = [];
    samples.value = new Map();
  });
  let isLoaded = false;
  const listener = {
    onOpen() {
      batch(() => {
        link.value = "live";
        brokenSince.value = null;
      });
      // What happened while the stream was away is told by it; what is not an event is asked for anew.
      if (isLoaded) void loadAll().catch(() => undefined);
    },
    onEvents(fresh: Event[]) {
      events.value = [...events.peek(), ...fresh].slice(-EVENTS_KEPT);
      if (isLoaded) for (const event of fresh) mark(event);
    },
    onBroken(status: number | undefined) {
      batch(() => {
        if (status === 401) who.value = null;
        link.value = "broken";
        refusal.value = status;
        brokenSince.value ??= Date.now();
      });
    },
  };
  const following = follow(500, listener, stop.signal);
  void following;
  while (!stop.signal.aborted && !isLoaded) {
    try {
      await loadAll();
      isLoaded = true;
    } catch (error) {
      if (!(error instanceof Away)) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000));
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
  const found = await Promise.all(
    underWay.peek().slice(0, 20).map((operation) => get<Operation>(`/v1/operations/${operation.id}`)),
  );
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
      .catch(() => undefined)
      .finally(() => {
        isRunning = false;
      });
  }, ms);
  signal.addEventListener("abort", () => clearInterval(handle));
}

export function end(): void {
  stopAll?.abort();
  link.value = "starting";
}

export function learnPlan(plan: FleetPlan): void {
  put(plans, [plan]);
}

/** A change that this page made is shown at once. */
export function learn(operation: Operation): void {
  put(operations, [operation]);
}
