// A page as a person meets it: signed in, at a width, in a colour scheme; what is seen is kept as PNG for people to look at.
import axe from "axe-core";
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { type Browser, type BrowserContext, type Page, chromium } from "playwright-core";

export const SHOTS = process.env.DESK_SHOTS ?? join(import.meta.dirname, "..", "node_modules", ".cache", "desk");
/** Pages that were just built, to be tried on a program that was built before them. */
const DIST = process.env.DESK_DIST;
mkdirSync(SHOTS, { recursive: true });

export function open(): Promise<Browser> {
  return chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    // Tests run as root in a container, where Chromium's own sandbox cannot be made.
    args: ["--no-sandbox", "--disable-dev-shm-usage"],
  });
}

export interface View { width: number; dark: boolean }
export const VIEWS: View[] = [
  { width: 1280, dark: false }, { width: 1280, dark: true }, { width: 360, dark: false }, { width: 360, dark: true },
];

export interface Desk { context: BrowserContext; page: Page; problems: string[] }

/** A browser's own window, signed in with the token unless it is absent. What its console complains of is kept. */
export async function desk(browser: Browser, url: string, token?: string, view: View = VIEWS[0]!): Promise<Desk> {
  const context = await browser.newContext({
    baseURL: url,
    // The browser does not know the controller's own CA; that REST is checked against it is tested elsewhere.
    ignoreHTTPSErrors: true,
    viewport: { width: view.width, height: 800 },
    colorScheme: view.dark ? "dark" : "light",
    reducedMotion: "reduce",
    // Nothing but the controller may be asked for anything: it works in a network without a way out.
    bypassCSP: false,
  });
  if (token) {
    const answer = await context.request.post("/v1/session", { headers: { authorization: `Bearer ${token}` } });
    if (!answer.ok()) throw new Error(`signing in: ${answer.status()} ${await answer.text()}`);
  }
  if (DIST) {
    const sent = (await context.request.get("/")).headers()["content-security-policy"] ?? "";
    for (const path of ["/", "/favicon.svg", "/assets/*"]) {
      await context.route(`${url}${path}`, (route) => {
        const asked = new URL(route.request().url()).pathname;
        return route.fulfill({ path: join(DIST, asked === "/" ? "index.html" : asked), headers: { "content-security-policy": sent } });
      });
    }
  }
  const page = await context.newPage();
  const problems: string[] = [];
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("request", (request) => {
    if (!request.url().startsWith(url) && !request.url().startsWith("data:")) problems.push(`asks for ${request.url()}`);
  });
  page.on("requestfailed", (request) => {
    // A window that is closed ends what it asked for; machines that test labs make and remove network cards.
    const usual = ["net::ERR_ABORTED", "net::ERR_NETWORK_CHANGED"];
    if (request.url().includes("/v1/") && !usual.includes(request.failure()?.errorText ?? "")) problems.push(`${request.url()}: ${request.failure()?.errorText}`);
  });
  page.on("response", (response) => {
    // Whether points of a volume are kept is asked by asking for them.
    const isNone = [404, 409].includes(response.status()) && response.url().endsWith("/history");
    if (response.status() >= 400 && response.status() !== 401 && !isNone) problems.push(`${response.url()}: ${response.status()}`);
  });
  page.on("console", (message) => {
    if (message.type() === "error" && /Content Security Policy|Refused to/.test(message.text())) problems.push(message.text());
  });
  return { context, page, problems };
}

/** Goes to a page of the dashboard and waits until it shows something. */
export async function visit(page: Page, path: string): Promise<void> {
  if (page.url() === "about:blank") await page.goto(`/#/${path}`);
  else await page.evaluate((hash) => { location.hash = hash; }, `#/${path}`);
  await page.locator("main .panel").first().waitFor();
}

export async function shot(page: Page, name: string): Promise<void> {
  await page.screenshot({ path: join(SHOTS, `${name}.png`), fullPage: true });
}

/** How far the page can be scrolled sideways, in pixels: 0 where it fits. */
export function sideways(page: Page): Promise<number> {
  return page.evaluate(() => {
    scrollTo(10_000, 0);
    const far = scrollX;
    scrollTo(0, 0);
    return Math.max(far, document.documentElement.scrollWidth - document.documentElement.clientWidth);
  });
}

/** What axe finds against WCAG 2 A and AA, one line for each. */
export async function barriers(page: Page): Promise<string[]> {
  // By the debugger, not as a script element: the page's policy refuses what is not its own, and stays as it is.
  await page.evaluate(axe.source);
  const found = await page.evaluate(async () => {
    const { axe: checker } = window as unknown as { axe: typeof axe };
    return (await checker.run(document, { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"] })).violations;
  });
  return found.flatMap((one) => one.nodes.map((node) => `${one.id}: ${node.target.join(" ")}: ${node.failureSummary?.replaceAll("\n", " ") ?? ""}`));
}
