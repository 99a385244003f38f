// The first screen's figures, and a guest's life: the controller's own where no agent is needed for them, else set as it would tell them.
import type { Browser, Page } from "playwright-core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { Controller, Rest, emptyImage, silentHost } from "./controller";
import { VIEWS, barriers, desk, open, shot, sideways, visit } from "./look";

let browser: Browser;
let controller: Controller;
let rest: Rest;
let web: { id: string; project: string; volumes: string[] };
let policy: Rest;
const hosts: string[] = [];

beforeAll(async () => {
  [browser, controller] = await Promise.all([open(), Controller.start()]);
  rest = controller.rest();
  await emptyImage(rest, "blank");
  for (const name of ["home", "west"]) await rest.must("POST", "/v1/clouds", { name });
  await rest.must("POST", "/v1/networks", { name: "office", cidr: "10.20.0.0/24" });
  await rest.must("POST", "/v1/guests", { name: "web", image: "blank", network: "office", shape: { vcpus: 1, memory_bytes: 64 << 20 }, follow_prices: true, start: false });
  web = (await rest.must("GET", "/v1/guests?limit=10")).items[0];
  hosts.push(await silentHost(rest, "h1", "home"), await silentHost(rest, "h2", "west"));
  policy = rest.as((await rest.must("POST", "/v1/tokens", { name: "spot", role: "policy", project: "*" })).secret);
});
afterAll(async () => {
  await browser?.close();
  await controller?.remove();
});

const HOUR = 3_600_000;
const totals = (paid: number, on_demand: number) => ({
  paid_nanousd: paid, runs_nanousd: paid, incoming_nanousd: 0, idle_nanousd: 0, egress_nanousd: 0,
  comparable_paid_nanousd: paid, on_demand_nanousd: on_demand, unpriced_ms: 0, unpriced_bytes: 0,
});
const market = (cloud: string, price: number) => ({ name: `${cloud}/big/spot`, cloud: "cld-01a1fea9-e622-75ca-b41b-c7d245b5cc2f", cloud_name: cloud, instance_type: "big", tenure: "spot", price_nanousd_per_hour: price, on_demand_nanousd_per_hour: 90_000_000, feed_time_ms: 0, feed_now_ms: 5 * HOUR });

async function money(page: Page): Promise<void> {
  await page.route("**/v1/ledger?*", (route) => {
    const asked = new URL(route.request().url()).searchParams;
    const isDay = asked.get("limit") === "1";
    return route.fulfill({ json: { clock: "wall", from_ms: 0, to_ms: Date.now(), totals: isDay ? totals(1e9, 3e9) : totals(40e9, 100e9), rate: { paid_nanousd_per_hour: 80_000_000, comparable_nanousd_per_hour: 50_000_000, on_demand_nanousd_per_hour: 150_000_000, unpriced_hosts: 1 }, items: [] } });
  });
  await page.route("**/v1/markets?*", (route) => route.fulfill({ json: { items: [market("home", 30_000_000), market("west", 40_000_000), market("far", 10_000_000)] } }));
  await page.route("**/v1/prices?*", (route) => {
    const name = new URL(route.request().url()).searchParams.get("market")!;
    return route.fulfill({ json: { market: name, feed_now_ms: 5 * HOUR, points: [{ feed_time_ms: 0, price_nanousd_per_hour: 20_000_000 }, { feed_time_ms: 3 * HOUR, price_nanousd_per_hour: 30_000_000 }] } });
  });
}

describe("the first screen", () => {
  it("tells what it costs, what policies chose, and how good it was, at every width, in both colours", async () => {
    // Nobody guesses what was chosen.
    const before = await desk(browser, controller.url, controller.token);
    await money(before.page);
    await visit(before.page, "");
    await before.page.getByText("No policy has told in the last five minutes what it chooses.").waitFor();
    await before.context.close();
    const told = { guest: web.id, market: "west/big/spot", chosen: "home/big/spot", runner_up: "west/big/spot", is_move: true, reason: "home/big/spot is $0.01/h cheaper" };
    expect(await policy.must("POST", "/v1/verdicts", { policy: "cheapest", items: [told] })).toEqual({ taken: 1 });
    for (const view of VIEWS) {
      const { context, page, problems } = await desk(browser, controller.url, controller.token, view);
      await money(page);
      await page.route("**/v1/reliability", (route) => route.fulfill({ json: { from_ms: 0, to_ms: 1, guests: 3, wanted_ms: 9e9, lost_ms: 4e6, paused_ms: 1000, availability_ppm: 999_543, moves: 17, rolled_back: 1, failed: 0, downtime_p50_ms: 210, downtime_p99_ms: 640, missed_by_moves: 1, missed_by_notices: 2 } }));
      await visit(page, "");
      const costs = page.getByRole("region", { name: "What it costs" });
      await costs.getByText("$60.00").waitFor();
      expect(await costs.innerText()).toMatch(/\$0\.0800\/h\s+now\s+\$0\.1500\/h\s+the same on demand, of \$0\.0500\/h\s+\$2\.00\s+saved today\s+\$60\.00\s+saved in 30 days\s+\$40\.00\s+paid in 30 days/);
      const good = page.getByRole("region", { name: "How good it was (30 days)" });
      expect(await good.innerText()).toMatch(/99\.954 %\s+available\s+17\s+moves\s+210 ms\s+pause, median\s+640 ms\s+pause, p99\s+3\s+deadlines missed/);
      const next = page.getByRole("region", { name: "What comes next" });
      expect(await next.innerText()).toMatch(/Chosen: home\/big\/spot at \$0\.0300\/h, for 1 of 1 guest; runner-up west\/big\/spot at \$0\.0400\/h/);
      await next.getByText("home/big/spot (chosen)").waitFor();
      await next.getByText("west/big/spot (runner-up)").waitFor();
      expect(await sideways(page)).toBe(0);
      expect(await barriers(page)).toEqual([]);
      await shot(page, `scripted-first-${view.width}-${view.dark ? "dark" : "light"}`);
      expect(problems).toEqual([]);
      await context.close();
    }
  });

  it("has a veto for who may, and none for others", async () => {
    const { secret } = await rest.must("POST", "/v1/tokens", { name: "looks", role: "viewer", project: "*" });
    const viewer = await desk(browser, controller.url, secret);
    await money(viewer.page);
    await visit(viewer.page, "");
    await viewer.page.getByText("is to move").waitFor();
    expect(await viewer.page.getByRole("button", { name: "Veto…" }).count()).toBe(0);
    await viewer.context.close();
    const { context, page } = await desk(browser, controller.url, controller.token);
    await money(page);
    await visit(page, "");
    await page.getByRole("button", { name: "Veto…" }).click();
    expect(await barriers(page)).toEqual([]);
    await shot(page, "first-veto");
    await page.getByRole("button", { name: "Keep it where it is" }).click();
    await expect.poll(async () => (await rest.must("GET", `/v1/guests/${web.id}`)).follow_prices).toBe(false);
    await context.close();
  });
});

describe("a guest's life", () => {
  it("has what each stay cost, and the pauses", async () => {
    const now = Date.now();
    const at = (hours: number) => now - hours * HOUR;
    const operation = "opn-01a1fea9-e622-75ca-b41b-c7d245b5cc2f";
    const life = {
      from_ms: at(9), to_ms: now, guests: 1, wanted_ms: 8 * HOUR, lost_ms: HOUR, paused_ms: 321, availability_ppm: 874_988, moves: 1, rolled_back: 0, failed: 0, downtime_p50_ms: 321, downtime_p99_ms: 321, missed_by_moves: 0, missed_by_notices: 0,
      stays: [
        { from_ms: at(8), until_ms: at(5), host: hosts[0], is_lost: false, operation: null, downtime_ms: null },
        { from_ms: at(5), until_ms: at(3), host: hosts[1], is_lost: false, operation, downtime_ms: 321 },
        { from_ms: at(3), until_ms: at(2), host: null, is_lost: true, operation: null, downtime_ms: null },
        { from_ms: at(2), until_ms: now, host: hosts[0], is_lost: false, operation: null, downtime_ms: null },
      ],
    };
    const line = (host: number, from: number, until: number, paid: number) => ({ kind: "runs", from_ms: at(from), to_ms: at(until), host: hosts[host], host_name: `h${host + 1}`, cloud: hosts[0], cloud_name: "home", paid_nanousd: paid });
    for (const view of VIEWS) {
      const { context, page, problems } = await desk(browser, controller.url, controller.token, view);
      await page.route("**/v1/reliability?*", (route) => route.fulfill({ json: life }));
      await page.route("**/v1/ledger?guest=*", (route) => route.fulfill({ json: { clock: "wall", from_ms: 0, to_ms: now, totals: totals(0, 0), items: [line(0, 8, 7, 1e9), line(0, 7, 5, 2e9), line(0, 2, 0, 5e9), line(1, 5, 3, 9e9)] } }));
      await visit(page, `guests/${web.id}`);
      const panel = page.getByRole("region", { name: "Where it lived" });
      await panel.getByText("came with a pause of 321 ms").waitFor();
      expect(await panel.getByRole("listitem").allInnerTexts()).toEqual([
        expect.stringMatching(/h1 from .*, 2 h 0 min · \$5\.00$/), expect.stringMatching(/lost from .*, 1 h 0 min$/),
        expect.stringMatching(/h2 from .*, 2 h 0 min · \$9\.00 · came with/), expect.stringMatching(/h1 from .*, 3 h 0 min · \$3\.00$/),
      ]);
      expect(await panel.locator("rect.pause").count()).toBe(2);
      await panel.getByText("Available 87.498 % of the 8 h 0 min").waitFor();
      expect(await sideways(page)).toBe(0);
      expect(await barriers(page)).toEqual([]);
      await shot(page, `scripted-life-${view.width}-${view.dark ? "dark" : "light"}`);
      expect(problems).toEqual([]);
      await context.close();
    }
    // In truth it was never started, and nothing is made up.
    const { context, page } = await desk(browser, controller.url, controller.token);
    await visit(page, `guests/${web.id}`);
    await page.getByText("It was never started.").waitFor();
    await context.close();
  });

  it("goes back to a checkpoint after a look, when it is lost", async () => {
    const point = (number: number, minutes: number) => ({ number, at_ms: Date.now() - minutes * 60_000, tick: 0, epoch: 1, version: number, root: "ab".repeat(32), cloud: "cld-01a1fea9-e622-75ca-b41b-c7d245b5cc2f", stored_bytes: 5, hash: "00", memory: { root: "cd", bytes: 64 << 20, format: "f", is_kept: true } });
    const history = { volume: web.volumes[0], project: web.project, policy: { every_s: 300, keep: [{ for_s: 3600, every_s: 300 }], memory: 2 }, points: [point(3, 20), point(4, 7)], thinned: [], next: 5, head: "00", created_at_ms: 0 };
    for (const view of [VIEWS[0]!, VIEWS[3]!]) {
      const { context, page } = await desk(browser, controller.url, controller.token, view);
      await page.route("**/v1/volumes/*/history", (route) => route.fulfill({ json: history }));
      await page.route("**/v1/guests?*", async (route) => {
        const json = await (await route.fetch()).json();
        for (const one of json.items) Object.assign(one, { state: "lost", operation: null });
        await route.fulfill({ json });
      });
      await visit(page, `guests/${web.id}`);
      const panel = page.getByRole("region", { name: "Checkpoints" });
      expect(await panel.innerText()).toMatch(/newest\s+point 4[\s\S]*would lose at most\s+7 min[\s\S]*64 MiB[\s\S]*2 of the newest 2/);
      await panel.getByRole("button", { name: "Go back to the newest…" }).click();
      const [look] = await Promise.all([page.waitForRequest("**/thaw?dry_run=true"), page.getByRole("button", { name: "Check first" }).click()]);
      expect(look.postDataJSON()).toEqual({ checkpoint: true, point: 4 });
      // It is not lost in truth, and the controller says so.
      await page.getByRole("dialog").getByRole("alert").waitFor();
      expect(await page.getByRole("button", { name: "Go back now" }).count()).toBe(0);
      expect(await barriers(page)).toEqual([]);
      expect(await sideways(page)).toBe(0);
      await shot(page, `scripted-checkpoint-${view.width}`);
      await context.close();
    }
    const { context, page } = await desk(browser, controller.url, controller.token);
    await visit(page, `guests/${web.id}`);
    await page.getByLabel("when it is lost").selectOption("thaw_checkpoint");
    await expect.poll(async () => (await rest.must("GET", `/v1/guests/${web.id}`)).on_loss).toBe("thaw_checkpoint");
    await context.close();
  });
});

describe("a cloud of many hosts", () => {
  it("is on the map by its sums, and by those of its hosts that are to be looked at", async () => {
    const all = (await rest.must("GET", "/v1/hosts?limit=1000")).items;
    const many = Array.from({ length: 400 }, (_, at) => ({ ...all[0], id: `${all[0].id.slice(0, -3)}${String(at).padStart(3, "0")}`, name: `m${at}`, state: at % 97 === 0 ? "unreachable" : "up" }));
    for (const view of VIEWS) {
      const { context, page } = await desk(browser, controller.url, controller.token, view);
      await page.route("**/v1/hosts?*", (route) => route.fulfill({ json: { items: many } }));
      await visit(page, "");
      await page.getByText("5 not up").waitFor();
      expect(await page.locator(".map .host").count()).toBe(5);
      expect(await sideways(page)).toBe(0);
      expect(await barriers(page)).toEqual([]);
      await shot(page, `scripted-many-${view.width}-${view.dark ? "dark" : "light"}`);
      await context.close();
    }
  });
});
