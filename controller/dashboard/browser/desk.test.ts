import type { Browser, Page } from "playwright-core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { Controller, Rest, emptyImage } from "./controller";
import { VIEWS, barriers, desk, open, shot, sideways, visit } from "./look";

let browser: Browser;
let controller: Controller;
let rest: Rest;

beforeAll(async () => {
  [browser, controller] = await Promise.all([open(), Controller.start()]);
  rest = controller.rest();
});
afterAll(async () => {
  await browser?.close();
  await controller?.remove();
});

const MIB = 1 << 20;
const guest = (name: string, more: object = {}) => ({ name, image: "blank", network: "office", shape: { vcpus: 1, memory_bytes: 64 * MIB }, start: false, ...more });

const PAGES = ["", "guests", "hosts", "operations", "plans", "markets", "markets/simulator", "costs", "images", "networks", "events", "tokens", "wall"];

async function everyPage(name: string, pages: string[]): Promise<void> {
  const found: string[] = [];
  for (const view of VIEWS) {
    const { context, page, problems } = await desk(browser, controller.url, controller.token, view);
    for (const path of pages) {
      await visit(page, path);
      const at = `${name}-${path.replaceAll("/", "-").slice(0, 24) || "overview"}-${view.width}-${view.dark ? "dark" : "light"}`;
      const far = await sideways(page);
      if (far > 0) found.push(`${at}: scrolls sideways by ${far} px`);
      if ((await page.locator(".banner").count()) > 0) found.push(`${at}: ${await page.locator(".banner").innerText()}`);
      // The other width tells the same of the other colours.
      if ((view.width === 360) !== view.dark || path === "") found.push(...(await barriers(page)).map((one) => `${at}: ${one}`));
      await shot(page, at);
    }
    found.push(...problems);
    await context.close();
  }
  expect(found).toEqual([]);
}

describe("signing in", () => {
  it("needs a token that is good, and keeps it out of the page", async () => {
    const { context, page, problems } = await desk(browser, controller.url);
    await page.goto("/");
    await page.getByLabel("Token").fill("sct_this-is-not-a-token");
    await page.getByRole("button", { name: "Sign in" }).click();
    await page.getByRole("alert").waitFor();
    expect(await barriers(page)).toEqual([]);
    expect(await sideways(page)).toBe(0);
    await shot(page, "sign-in-refused");
    await page.getByLabel("Token").fill(controller.token);
    await page.getByRole("button", { name: "Sign in" }).click();
    await page.getByRole("heading", { name: "Nothing is wrong" }).waitFor();
    const cookies = await context.cookies();
    expect(cookies).toHaveLength(1);
    expect(cookies[0]).toMatchObject({ httpOnly: true, secure: true, sameSite: "Strict" });
    const kept = await page.evaluate(() => JSON.stringify([{ ...localStorage }, { ...sessionStorage }, document.cookie]));
    expect(kept).not.toContain(controller.token.slice(-12));
    expect(cookies[0]!.value).not.toContain(controller.token.slice(-12));
    // A reload stays signed in and where it was; signing out forgets.
    await visit(page, "hosts");
    await page.reload();
    await page.getByRole("heading", { name: /^Hosts/ }).waitFor();
    await page.getByRole("button", { name: "Sign out" }).click();
    await page.getByLabel("Token").waitFor();
    await page.reload();
    await page.getByLabel("Token").waitFor();
    expect(problems).toEqual([]);
    await context.close();
  });

  it("does not let a page of somebody else change anything", async () => {
    const { context } = await desk(browser, controller.url, controller.token);
    const plain = await context.request.post("/v1/clouds", { data: { name: "forged" } });
    expect(plain.status()).toBe(403);
    expect((await rest.must("GET", "/v1/clouds")).items).toEqual([]);
    await context.close();
  });
});

describe("an empty controller", () => {
  it("is told on every page, at every width, in both colours, without barriers", () => everyPage("empty", PAGES));
});

describe("a controller with guests", () => {
  beforeAll(async () => {
    await emptyImage(rest, "blank");
    await rest.must("POST", "/v1/clouds", { name: "home" });
    await rest.must("POST", "/v1/networks", { name: "office", cidr: "10.20.0.0/24" });
    await rest.must("POST", "/v1/guests", guest("web"));
    await rest.must("POST", "/v1/guests", guest("data-base-with-a-long-name-that-fills-its-column"));
  });

  it("has pages without barriers, at every width, in both colours", async () => {
    const { items } = await rest.must("GET", "/v1/guests");
    const operations = (await rest.must("GET", "/v1/operations")).items;
    await everyPage("few", [...PAGES, `guests/${items[0].id}`, `operations/${operations[0].id}`]);
  });

  it("shows each role the buttons for what it may do, and refuses the rest by REST", async () => {
    const { items } = await rest.must("GET", "/v1/guests");
    const web = items.find((one: { name: string }) => one.name === "web");
    const project = web.project;
    for (const [role, buttons] of [["viewer", 0], ["policy", 0], ["operator", 1], ["admin", 1]] as const) {
      const { secret } = await rest.must("POST", "/v1/tokens", { name: `t-${role}`, role, project });
      const { context, page } = await desk(browser, controller.url, secret);
      await visit(page, `guests/${web.id}`);
      await page.getByRole("heading", { name: "web", exact: true }).waitFor();
      expect(await page.locator("main").getByRole("button", { name: /Start|Migrate|Freeze|Stop|Thaw/ }).count(), role).toBe(buttons);
      expect(await page.locator("main").getByRole("checkbox").count(), role).toBe(buttons);
      expect(await page.locator("main").getByLabel("when it is lost").count(), role).toBe(buttons);
      expect(await page.getByRole("link", { name: "Tokens" }).count(), role).toBe(role === "admin" ? 1 : 0);
      if (buttons === 0) {
        const { status } = await rest.as(secret).send("POST", `/v1/guests/${web.id}/start`, {});
        expect(status, role).toBe(403);
      }
      if (role !== "admin") {
        await visit(page, "tokens");
        await page.getByText("Only admins see tokens").waitFor();
        expect(await page.locator("main").getByRole("button").count(), role).toBe(0);
        await visit(page, `guests/${web.id}`);
        await page.getByRole("heading", { name: "web", exact: true }).waitFor();
      }
      if (role === "viewer") {
        expect(await page.locator("main").getByRole("button").count()).toBe(0);
        await shot(page, "viewer-guest");
      }
      await context.close();
    }
  });

  it("asks first and says why it cannot be: no host to start at", async () => {
    const { context, page } = await desk(browser, controller.url, controller.token);
    await visit(page, "guests/web");
    await page.getByRole("button", { name: "Start…" }).click();
    await page.getByRole("button", { name: "Check first" }).click();
    const dialog = page.getByRole("dialog");
    await dialog.locator(".bad").first().waitFor();
    expect(await dialog.getByRole("button", { name: "Start now" }).count()).toBe(0);
    expect(await barriers(page)).toEqual([]);
    await shot(page, "start-refused");
    await context.close();
  });

  it("shows where its disks, ports and events belong, and that nobody changed an event", async () => {
    const { context, page } = await desk(browser, controller.url, controller.token);
    await visit(page, "events");
    const { items } = await rest.must("GET", "/v1/events?limit=1000");
    await page.getByText(`✓ ${items.length} events, number 1 to ${items.length}: each has the hash of its own text and names that of the one before.`).waitFor();
    await page.getByLabel("filter events").fill(items[0].request_id);
    expect(await page.locator(".event").count()).toBeGreaterThan(0);
    await expect.poll(() => page.locator(".event", { hasText: items[0].request_id }).count()).toBe(await page.locator(".event").count());
    // An event that was changed on the way is named.
    await page.route("**/v1/events/stream*", async (route) => {
      const changed = { ...items[2], actor: "token:somebody-else" };
      const told = [items[0], items[1], changed, items[3]].map((event) => `id: ${event.seq}\nevent: ${event.kind}\ndata: ${JSON.stringify(event)}\n\n`);
      await route.fulfill({ contentType: "text/event-stream", body: told.join("") });
    });
    await page.reload();
    await page.getByRole("alert").filter({ hasText: "The chain is broken: event 3 " }).waitFor();
    await shot(page, "chain-broken");
    await context.close();
  });

  it("tells what was paid, and what is not known", async () => {
    const { context, page, problems } = await desk(browser, controller.url, controller.token);
    // Nothing runs here that would cost anything: the ledger's answer is set.
    const id = (noun: string) => `${noun}-01a1fea9-e622-75ca-b41b-c7d245b5cc2f`;
    const line = {
      kind: "runs", from_ms: 3_600_000, to_ms: 7_200_000, host: id("hst"), host_name: "h1", cloud: id("cld"), cloud_name: "home", guest: id("gst"), guest_name: "web",
      market: "home/big/spot", price_nanousd: 40_000_000, paid_nanousd: 12_300_000, on_demand_nanousd: 50_000_000,
    };
    const unknown = { ...line, guest_name: "dark", market: null, price_nanousd: null, paid_nanousd: null, on_demand_nanousd: null };
    const totals = {
      paid_nanousd: 12_300_000, runs_nanousd: 12_300_000, incoming_nanousd: 0, idle_nanousd: 0, egress_nanousd: 0,
      comparable_paid_nanousd: 12_300_000, on_demand_nanousd: 50_000_000, unpriced_ms: 3_600_000, unpriced_bytes: 0,
    };
    await page.route("**/v1/ledger?*", (route) => route.fulfill({ json: { clock: "feed", from_ms: 0, to_ms: 7_200_000, totals, items: [line, unknown], next_page: null } }));
    await visit(page, "");
    await page.getByText("$0.0377").first().waitFor();
    await visit(page, "costs");
    await page.getByText("no price is known: 1 h 0 min of hosts").waitFor();
    expect(await page.locator("tbody tr", { hasText: "web" }).innerText()).toContain("$0.0123");
    expect(await page.locator("tbody tr", { hasText: "dark" }).innerText()).toContain("not known");
    expect(await barriers(page)).toEqual([]);
    await shot(page, "costs");
    expect(problems).toEqual([]);
    await context.close();
  });

  it("has a wall screen with nothing to press", async () => {
    const { context, page } = await desk(browser, controller.url, controller.token);
    await visit(page, "wall");
    expect(await page.getByRole("button").count()).toBe(0);
    expect(await page.getByRole("navigation").count()).toBe(0);
    await context.close();
  });

  it("is walked by the keyboard alone", async () => {
    const { context, page } = await desk(browser, controller.url, controller.token);
    await visit(page, "");
    // What is searched has come.
    await page.getByText("guests are where they should be").waitFor();
    await page.keyboard.press("/");
    await page.getByRole("dialog", { name: "search" }).waitFor();
    await page.keyboard.type("web");
    await page.keyboard.press("Enter");
    await page.getByRole("heading", { name: "web", exact: true }).waitFor();
    await page.getByRole("button", { name: "Start…" }).focus();
    await page.keyboard.press("Enter");
    await page.getByRole("dialog", { name: /Start web/ }).waitFor();
    await page.keyboard.press("Escape");
    await page.getByRole("dialog", { name: /Start web/ }).waitFor({ state: "hidden" });
    await context.close();
  });

  it("does not ask to sign in again because the controller is away for a moment", async () => {
    const { context, page } = await desk(browser, controller.url, controller.token);
    await page.route("**/v1/whoami", (route) => route.abort("connectionrefused"));
    await page.goto("/#/networks");
    await page.getByText("The controller does not answer").waitFor();
    expect(await page.getByLabel("Token").count()).toBe(0);
    await page.unroute("**/v1/whoami");
    // Nor does a page stay half filled where one of its questions failed.
    let failures = 2;
    await page.route("**/v1/networks?*", (route) => (failures-- > 0 ? route.abort("connectionreset") : route.fallback()));
    await page.getByRole("link", { name: "office" }).waitFor();
    await context.close();
  });

  it("does not say that nothing is wrong before it knows, and tells why it does not know", async () => {
    const { context, page } = await desk(browser, controller.url, controller.token);
    const problem = { type: "about:blank", title: "store_unavailable", status: 503, code: "store_unavailable", detail: "the store does not answer", retryable: true, request_id: "req-01a1fea9-e622-75ca-b41b-c7d245b5cc2f" };
    await page.route("**/v1/guests?*", (route) => route.fulfill({ status: 503, contentType: "application/problem+json", json: problem }));
    await page.goto("/#/");
    await page.getByText("The controller does not tell what there is: the store does not answer").waitFor();
    expect(await page.getByText("Nothing is wrong").count()).toBe(0);
    expect(await barriers(page)).toEqual([]);
    await shot(page, "not-known");
    await page.unroute("**/v1/guests?*");
    await page.getByText("guests are where they should be").waitFor();
    // What one token saw is not there for the next in the same window.
    await visit(page, "tokens");
    await page.getByText("bootstrap-admin").first().waitFor();
    await page.getByRole("button", { name: "Sign out" }).click();
    const { secret } = await rest.must("POST", "/v1/tokens", { name: "next", role: "viewer", project: "default" });
    await page.getByLabel("Token", { exact: true }).fill(secret);
    await page.getByRole("button", { name: "Sign in" }).click();
    await page.getByText("Only admins see tokens").waitFor();
    expect(await page.getByText("bootstrap-admin").count()).toBe(0);
    await context.close();
  });

  it("asks the controller whether a token can be deleted, before it is", async () => {
    const { token } = await rest.must("POST", "/v1/tokens", { name: "short-lived", role: "viewer", project: "*" });
    const { context, page } = await desk(browser, controller.url, controller.token);
    await visit(page, "tokens");
    const [look] = await Promise.all([page.waitForRequest("**/v1/tokens/*?dry_run=true"), page.getByRole("button", { name: "delete the token short-lived" }).click()]);
    expect(look.method()).toBe("DELETE");
    await page.getByText("it can be done now").waitFor();
    expect(await barriers(page)).toEqual([]);
    expect((await rest.must("GET", "/v1/tokens?limit=1000")).items.map((one: { id: string }) => one.id)).toContain(token.id);
    await page.getByRole("button", { name: "Delete it" }).click();
    await page.getByRole("cell", { name: "short-lived", exact: true }).waitFor({ state: "detached" });
    await context.close();
  });

  it("says that the controller is gone, and goes on where it was when it is back", async () => {
    const { context, page, problems } = await desk(browser, controller.url, controller.token);
    await visit(page, "networks");
    await page.getByRole("link", { name: "office" }).waitFor();
    const before = await page.evaluate(() => performance.timeOrigin);
    await controller.kill();
    await page.getByText("The controller does not answer").waitFor();
    // What was known stays in sight.
    expect(await page.getByRole("link", { name: "office" }).count()).toBe(1);
    expect(await barriers(page)).toEqual([]);
    await shot(page, "broken");
    await controller.boot();
    await rest.must("POST", "/v1/networks", { name: "made-meanwhile", cidr: "10.21.0.0/24" });
    await page.getByText("The controller does not answer").waitFor({ state: "hidden" });
    await page.getByRole("link", { name: "made-meanwhile" }).waitFor();
    await rest.must("POST", "/v1/networks", { name: "made-after", cidr: "10.22.0.0/24" });
    await page.getByRole("link", { name: "made-after" }).waitFor();
    expect(await page.evaluate(() => performance.timeOrigin)).toBe(before);
    // That requests failed meanwhile is what this is about.
    problems.length = 0;
    // No event is told twice, none is missing, and the chain holds across the end of the controller.
    await visit(page, "events");
    await page.getByRole("status").filter({ hasText: "names that of the one before." }).waitFor();
    await page.getByLabel("filter events").fill("network.created");
    const told = (await rest.must("GET", "/v1/events?limit=1000")).items.filter((one: { kind: string }) => one.kind === "network.created").length;
    await expect.poll(() => page.locator(".event").count(), { timeout: 30_000 }).toBe(told);
    expect(problems).toEqual([]);
    await context.close();
  });
});

describe("ten thousand guests", () => {
  const MANY = Number(process.env.DESK_GUESTS ?? 10_000);
  const number = (at: number) => String(at).padStart(5, "0");

  beforeAll(async () => {
    await rest.must("POST", "/v1/projects", {
      name: "huge", quota: { guests: MANY + 1, vcpus: MANY, memory_bytes: MANY * 64 * MIB, volume_bytes: (MANY + 1) * 2 * MIB },
    });
    await rest.must("POST", "/v1/networks", { name: "wide", cidr: "10.64.0.0/14", project: "huge" });
    let next = 0;
    const work = async () => {
      for (let at = next++; at < MANY; at = next++) await rest.must("POST", "/v1/guests", guest(`n-${number(at)}`, { project: "huge", network: "wide", image: "seed" }));
    };
    const { secret } = await rest.must("POST", "/v1/tokens", { name: "huge", role: "admin", project: "huge" });
    await emptyImage(rest.as(secret), "seed");
    await Promise.all(Array.from({ length: 8 }, work));
    await rest.must("POST", "/v1/guests", guest("zz-the-last", { project: "huge", network: "wide", image: "seed" }));
  });

  const filled = async (page: Page) => {
    const before = (await rest.must("GET", "/v1/guests?project=default&limit=1000")).items.length;
    await page.getByRole("heading", { name: `Guests (${MANY + 1 + before})` }).waitFor({ timeout: 120_000 });
  };

  it("are in the table, of which only what is in sight is in the page", async () => {
    const { context, page, problems } = await desk(browser, controller.url, controller.token);
    await visit(page, "guests");
    await filled(page);
    expect(await page.locator("tbody tr").count()).toBeLessThan(100);
    const last = page.getByRole("link", { name: `n-${number(MANY - 1)}` });
    expect(await last.count()).toBe(0);
    await page.locator(".grid").evaluate((box) => { box.scrollTop = box.scrollHeight; });
    await page.locator("tbody a").last().waitFor();
    await page.getByRole("link", { name: "zz-the-last" }).waitFor();
    expect(await page.locator("tbody tr").count()).toBeLessThan(100);
    await shot(page, "huge-end");
    await page.getByLabel("filter guests").fill(`n-${number(MANY - 1)}`);
    await last.waitFor();
    expect(await page.locator("tbody a[href^='#/guests/']").count()).toBe(1);
    // From the far end to a single row at the other: it is in sight at once.
    await page.getByLabel("filter guests").fill("");
    await page.locator(".grid").evaluate((box) => { box.scrollTop = box.scrollHeight; });
    await page.getByRole("link", { name: "zz-the-last" }).waitFor();
    await page.getByLabel("filter guests").fill(`n-${number(7)}`);
    await page.getByRole("link", { name: `n-${number(7)}` }).waitFor({ timeout: 2000 });
    await page.getByLabel("filter guests").fill("");
    await shot(page, "huge-guests");
    // How long the page stood still while it was scrolled from end to end: told, not judged.
    const slowest = await page.locator(".grid").evaluate(async (box) => {
      let worst = 0;
      for (let step = 0; step <= 100; step += 1) {
        const begun = performance.now();
        box.scrollTop = (box.scrollHeight * step) / 100;
        await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
        worst = Math.max(worst, performance.now() - begun);
      }
      return worst;
    });
    console.log(`the slowest of 100 steps through ${MANY} guests took ${slowest.toFixed(0)} ms`);
    // In a field `/` is a sign like others.
    await page.getByLabel("filter guests").blur();
    await page.keyboard.press("/");
    await page.getByRole("dialog", { name: "search" }).getByRole("searchbox").fill(`n-${number(MANY - 2)}`);
    await page.keyboard.press("Enter");
    await page.getByRole("heading", { name: `n-${number(MANY - 2)}` }).waitFor();
    expect(problems).toEqual([]);
    await context.close();
  });

  it("have operations, of which the newest are loaded and older ones on demand", async () => {
    const { context, page, problems } = await desk(browser, controller.url, controller.token);
    const asked: string[] = [];
    page.on("request", (request) => { if (request.url().includes("/v1/operations")) asked.push(request.url()); });
    await visit(page, "operations");
    await page.getByRole("heading", { name: "Operations (200 newest)" }).waitFor({ timeout: 120_000 });
    expect(asked.length).toBeLessThan(10);
    await page.getByRole("button", { name: "Older" }).click();
    // Where there are no more, all of them.
    await page.getByRole("heading", { name: /^Operations \((400 newest|[23]\d\d)\)$/ }).waitFor();
    // One that is far older is found by its address.
    const first = (await rest.must("GET", "/v1/operations?limit=1")).items[0];
    await visit(page, `operations/${first.id}`);
    await page.getByText(first.request_id).first().waitFor();
    expect(problems).toEqual([]);
    await context.close();
  });

  it("fit a small screen, too", async () => {
    const { context, page } = await desk(browser, controller.url, controller.token, { width: 360, dark: true });
    await visit(page, "guests");
    await filled(page);
    expect(await sideways(page)).toBe(0);
    expect(await barriers(page)).toEqual([]);
    await shot(page, "huge-guests-360");
    await visit(page, "");
    expect(await sideways(page)).toBe(0);
    await shot(page, "huge-overview-360");
    await context.close();
  });
});
