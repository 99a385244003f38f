// Tokens.
import { useState } from "preact/hooks";
import { change, Refused } from "../api/http";
import type { Token, TokenSecret } from "../api/types";
import { projects, tokens, who } from "../store/store";
import { moment } from "../ui/format";
import { Sure } from "../ui/dialog";
import { Grid, GuestLink, Panel } from "../ui/parts";

export function Tokens() {
  const [name, setName] = useState("");
  const [role, setRole] = useState("viewer");
  const [project, setProject] = useState(who.value?.token.project ?? "*");
  const [made, setMade] = useState<TokenSecret>();
  const [problem, setProblem] = useState("");
  const [asked, setAsked] = useState<Token>();
  const attempt = async (work: () => Promise<void>) => {
    try {
      await work();
      setProblem("");
    } catch (error) {
      setProblem(error instanceof Refused ? error.problem.detail : String(error));
    }
  };
  const create = () => attempt(async () => {
    setMade(await change<TokenSecret>("POST", "/v1/tokens", { name, role, project }));
    setName("");
  });
  const projectName = (id: string | null | undefined) => (id ? (projects.value.get(id)?.name ?? id) : "all");
  return (
    <div class="tiles">
      <Panel title="New token" wide>
        <form class="line wrap" onSubmit={(event) => { event.preventDefault(); void create(); }}>
          <label>Name <input required value={name} maxLength={63} onInput={(event) => setName(event.currentTarget.value)} /></label>
          <label>Role <select value={role} onChange={(event) => setRole(event.currentTarget.value)}>{["viewer", "policy", "operator", "admin"].map((one) => <option key={one}>{one}</option>)}</select></label>
          <label>Project <select value={project} onChange={(event) => setProject(event.currentTarget.value)}>
            {!who.value?.token.project && <option value="*">all</option>}
            {[...projects.value.values()].map((one) => <option key={one.id} value={one.id}>{one.name}</option>)}
          </select></label>
          <button class="main">Make</button>
        </form>
        {problem && <p class="bad" role="alert">{problem}</p>}
        {made && <p role="status">The secret of <b>{made.token.name}</b>, shown this once: <code class="secret">{made.secret}</code> <button onClick={() => setMade(undefined)}>I have it</button></p>}
      </Panel>
      <Panel title={`Tokens (${tokens.value.size})`} wide>
        <Grid name="tokens" items={[...tokens.value.values()]} empty="none" columns={[
          { title: "name", key: (token) => token.name, show: (token) => token.name },
          { title: "role", key: (token) => token.role, show: (token) => token.role },
          { title: "project", key: (token) => projectName(token.project), show: (token) => projectName(token.project) },
          { title: "guest", show: (token) => <GuestLink id={token.guest} />, wide: true },
          { title: "ends", key: (token) => token.expires_at_ms ?? Infinity, show: (token) => (token.expires_at_ms ? moment(token.expires_at_ms) : "never"), wide: true },
          { title: "", show: (token) => token.id === who.value?.token.id ? <small>yours</small> : <button onClick={() => setAsked(token)} aria-label={`delete the token ${token.name}`}>Delete…</button> },
        ]} />
        {asked && (
          <Sure title={`Delete the token ${asked.name}`} verb="Delete it" close={() => setAsked(undefined)} ask={{ method: "DELETE", path: `/v1/tokens/${asked.id}` }}>
            <p>What uses it stops working at once.</p>
          </Sure>
        )}
      </Panel>
    </div>
  );
}
