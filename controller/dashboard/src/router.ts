// Deep links are in the hash: the server has one page, and a reload stays where it was.
import { signal } from "@preact/signals";

const read = (): string[] => location.hash.replace(/^#\/?/, "").split("?")[0]!.split("/").filter(Boolean).map(decodeURIComponent);

export const route = signal(read());
addEventListener("hashchange", () => {
  route.value = read();
  scrollTo(0, 0);
});

export function go(path: string): void {
  location.hash = path;
}
