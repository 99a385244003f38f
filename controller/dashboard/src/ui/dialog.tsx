// Dialogs that ask before something is done.
import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { Refused, change } from "../api/http";

/** A dialog with a title; `Escape` closes it. */
export function Dialog(props: { title: string; close: () => void; submit: () => void; wide?: boolean; children: ComponentChildren }) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => dialog.current?.showModal(), []);
  return (
    <dialog ref={dialog} class={props.wide ? "wide" : ""} onClose={props.close} aria-label={props.title}>
      <form method="dialog" onSubmit={(event) => { event.preventDefault(); props.submit(); }}>
        <h2>{props.title}</h2>
        {props.children}
      </form>
    </dialog>
  );
}

/** Carries requests out one at a time: whether one is under way, and what went wrong with the last. */
export function useAttempt(): { isWorking: boolean; problem: string; attempt: (work: () => Promise<void>) => Promise<void> } {
  const [isWorking, setWorking] = useState(false);
  const [problem, setProblem] = useState("");
  const attempt = async (work: () => Promise<void>) => {
    setWorking(true);
    setProblem("");
    try {
      await work();
    } catch (error) {
      setProblem(error instanceof Refused ? error.problem.detail : String(error));
    }
    setWorking(false);
  };
  return { isWorking, problem, attempt };
}

/** A change: what is sent where. */
export interface Asked { method: "POST" | "PATCH" | "DELETE"; path: string; body?: unknown }

/** Asks whether it shall be. Whether it can be is asked of the controller before: a dry run, whose refusal is shown. */
export function Sure<T>(props: { title: string; verb: string; ask: Asked; isReady?: boolean; close: () => void; done?: (told: T | undefined) => void; children: ComponentChildren }) {
  const { ask } = props;
  const { isWorking, problem, attempt } = useAttempt();
  const [tried, setTried] = useState("");
  const what = JSON.stringify([ask.method, ask.path, ask.body ?? null]);
  const isReady = props.isReady !== false;
  useEffect(() => {
    if (!isReady) return;
    void attempt(async () => {
      await change(ask.method, `${ask.path}?dry_run=true`, ask.body);
      setTried(what);
    });
  }, [what, isReady]);
  const isFit = isReady && tried === what;
  const act = () => attempt(async () => {
    const told = await change<T>(ask.method, ask.path, ask.body);
    props.done?.(told);
    props.close();
  });
  return (
    <Dialog title={props.title} close={props.close} submit={() => { if (isFit) void act(); }}>
      {props.children}
      {isFit && !problem && <p class="good" role="status">✓ it can be done now</p>}
      {problem && <p class="bad" role="alert">{problem}</p>}
      <div class="line">
        <button type="button" onClick={props.close}>Close</button>
        <span class="grow" />
        <button class="main" disabled={isWorking || !isFit}>{props.verb}</button>
      </div>
    </Dialog>
  );
}
