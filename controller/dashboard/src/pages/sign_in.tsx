import { useState } from "preact/hooks";
import { Refused, signIn } from "../api/http";
import type { WhoAmI } from "../api/types";
import { begin, who } from "../store/store";

export function SignIn() {
  const [problem, setProblem] = useState("");
  const [isWorking, setWorking] = useState(false);
  const enter = async (form: HTMLFormElement) => {
    setWorking(true);
    setProblem("");
    const field = form.elements.namedItem("token") as HTMLInputElement;
    try {
      who.value = await signIn<WhoAmI>(field.value.trim());
      await begin();
    } catch (error) {
      setProblem(error instanceof Refused ? error.problem.detail : String(error));
    }
    setWorking(false);
  };
  return (
    <main class="sign-in">
      <form onSubmit={(event) => { event.preventDefault(); void enter(event.currentTarget); }}>
        <h1><img src="./favicon.svg" alt="" /> Supercloud</h1>
        <label>Token
          <input name="token" type="password" autocomplete="current-password" required autofocus spellcheck={false} />
        </label>
        <button class="main" disabled={isWorking}>Sign in</button>
        {problem && <p class="bad" role="alert">{problem}</p>}
        <p class="small soft">The first one is in <code>admin.token</code> in the controller's folder; <code>supercloud token create</code> makes more. A session lasts 12 hours.</p>
      </form>
    </main>
  );
}
