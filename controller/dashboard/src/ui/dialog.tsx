// Dialogs that ask before something is done.
import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { Refused } from "../api/http";

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

/** Asks whether it shall be. */
export function Sure(props: { title: string; verb: string; isReady?: boolean; close: () => void; act: () => Promise<void>; children: ComponentChildren }) {
  const { isWorking, problem, attempt } = useAttempt();
  const act = () => attempt(async () => {
    await props.act();
    props.close();
  });
  return (
    <Dialog title={props.title} close={props.close} submit={() => void act()}>
      {props.children}
      {problem && <p class="bad" role="alert">{problem}</p>}
      <div class="line">
        <button type="button" onClick={props.close}>Close</button>
        <span class="grow" />
        <button class="main" disabled={isWorking || props.isReady === false}>{props.verb}</button>
      </div>
    </Dialog>
  );
}
