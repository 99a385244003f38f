import { signal } from "@preact/signals";

type Theme = "auto" | "light" | "dark";
const kept = localStorage.getItem("theme");
export const theme = signal<Theme>(kept === "light" || kept === "dark" ? kept : "auto");

export function apply(): void {
  if (theme.value === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme.value;
}

export function turn(): void {
  const next: Record<Theme, Theme> = { auto: "dark", dark: "light", light: "auto" };
  theme.value = next[theme.value];
  localStorage.setItem("theme", theme.value);
  apply();
}
