import "uplot/dist/uPlot.min.css";
import "./style.css";
import { effect, signal } from "@preact/signals";
import { render } from "preact";
import { Refused, get, signOut } from "./api/http";
import type { WhoAmI } from "./api/types";
import { Costs } from "./pages/costs";
import { Events } from "./pages/events";
import { GuestPage, Guests } from "./pages/guests";
import { HostPage, Hosts } from "./pages/hosts";
import { Markets } from "./pages/markets";
import { NetworkPage, Networks, PortPage } from "./pages/networks";
import { OperationPage, Operations } from "./pages/operations";
import { PlanPage, Plans } from "./pages/plans";
import { Overview, Wall } from "./pages/overview";
import { ImagePage, Images, VolumePage } from "./pages/storage";
import { SignIn } from "./pages/sign_in";
import { Simulator } from "./pages/simulator";
import { Tokens } from "./pages/tokens";
import { route } from "./router";
import { may } from "./store/derive";
import { begin, brokenSince, end, isLoaded, link, loadProblem, now, refusal, seesAll, who } from "./store/store";
import { moment } from "./ui/format";
import { Empty, Panel } from "./ui/parts";
import { Search } from "./ui/search";
import { apply, theme, turn } from "./ui/theme";

const PAGES: [string, string][] = [
  ["", "Overview"], ["guests", "Guests"], ["hosts", "Hosts"], ["operations", "Operations"], ["plans", "Plans"], ["markets", "Markets"], ["costs", "Costs"],
  ["images", "Images"], ["networks", "Networks"], ["events", "Audit"], ["tokens", "Tokens"],
];

/** Pages of things that another page lists. */
const LISTED_ON: Record<string, string> = { volumes: "images", ports: "networks" };

const isAway = signal(false);

function Page() {
  const [page = "", id, part] = route.value;
  switch (page) {
    case "guests": return id ? <GuestPage id={id} part={part} /> : <Guests />;
    case "hosts": return id ? <HostPage id={id} /> : <Hosts />;
    case "operations": return id ? <OperationPage id={id} /> : <Operations />;
    case "plans": return id ? <PlanPage id={id} /> : <Plans />;
    case "markets": return id === "simulator" ? <Simulator /> : <Markets />;
    case "costs": return <Costs />;
    case "images": return id ? <ImagePage id={id} /> : <Images />;
    case "volumes": return id ? <VolumePage id={id} /> : <Images />;
    case "networks": return id ? <NetworkPage id={id} /> : <Networks />;
    case "ports": return id ? <PortPage id={id} /> : <Networks />;
    case "events": return <Events />;
    case "tokens": return may(who.value, "administer") ? <Tokens /> : <Panel title="Tokens" wide><Empty>Only admins see tokens, and make or delete them.</Empty></Panel>;
    default: return <Overview />;
  }
}

/** Before all is told nothing is said of it: an empty page would look like an empty fleet. */
function Loading() {
  if (!loadProblem.value) return <p class="loading" role="status">Asking the controller…</p>;
  return <p class="banner" role="alert">The controller does not tell what there is: {loadProblem.value.replace(/\.?$/, ".")} Trying again by itself.</p>;
}

function Broken() {
  if (link.value !== "broken") return null;
  const since = brokenSince.value ?? now.value;
  if (refusal.value !== undefined && refusal.value !== 200) return <p class="banner" role="alert">The controller answers, but tells no events (status {refusal.value}): what is shown is as it was at {moment(since)}. Trying again by itself.</p>;
  return <p class="banner" role="alert">The controller does not answer (since {moment(since)}). Guests run on without it; what is shown is as it was. Trying again by itself.</p>;
}

const leaveProblem = signal("");

/** Signed out is who cannot come back without a token: as long as the controller has not said so, nobody is. */
async function leave(): Promise<void> {
  try {
    await signOut();
  } catch (error) {
    if (!(error instanceof Refused)) {
      leaveProblem.value = "You are still signed in: the controller does not answer. Try again, or close the browser.";
      return;
    }
  }
  leaveProblem.value = "";
  end();
  who.value = null;
}

function App() {
  if (who.value === undefined) return <main class="sign-in" aria-busy="true"><p role="status">{isAway.value ? "The controller does not answer. Trying again by itself…" : "…"}</p></main>;
  if (who.value === null) return <SignIn />;
  const [page = ""] = route.value;
  if (page === "wall") return <main class="wall"><Broken />{isLoaded.value ? <Wall /> : <Loading />}</main>;
  const shown = PAGES.filter(([path]) => (path !== "tokens" || who.value?.token.role === "admin") && (path !== "plans" || seesAll()));
  return (
    <>
      <header class="top">
        <a class="brand" href="#/"><img src="./favicon.svg" alt="" /> Supercloud</a>
        <nav aria-label="pages">
          {shown.map(([path, title]) => <a key={path} href={`#/${path}`} aria-current={path === (LISTED_ON[page] ?? page) ? "page" : undefined}>{title}</a>)}
        </nav>
        <span class="grow" />
        <Search />
        <button class="plain" onClick={turn} aria-label={`colours: ${theme.value}`} title={`colours: ${theme.value}`}>◐</button>
        <span class="soft who" title={`role ${who.value.token.role}`}>{who.value.token.name}{who.value.project_name ? ` @ ${who.value.project_name}` : ""}</span>
        <button class="plain" onClick={() => void leave()}>Sign out</button>
      </header>
      <Broken />
      {leaveProblem.value && <p class="banner" role="alert">{leaveProblem.value}</p>}
      <main aria-busy={!isLoaded.value}>{isLoaded.value ? <Page /> : <Loading />}</main>
    </>
  );
}

async function start(): Promise<void> {
  apply();
  effect(() => {
    const [page = "", id] = route.value;
    const title = PAGES.find(([path]) => path === (LISTED_ON[page] ?? page))?.[1] ?? (page === "wall" ? "Wall" : "");
    document.title = [id && !/^[a-z]{3}-[0-9a-f-]{36}$/.test(id) ? id : "", title, "Supercloud"].filter(Boolean).join(" · ");
  });
  render(<App />, document.getElementById("app")!);
  while (who.value === undefined) {
    try {
      who.value = await get<WhoAmI>("/v1/whoami");
    } catch (error) {
      if (error instanceof Refused) {
        who.value = null;
        return;
      }
      // A session is not lost because the controller is away for a moment.
      isAway.value = true;
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
  await begin();
}

void start();
