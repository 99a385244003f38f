import preact from "@preact/preset-vite";
import { defineConfig } from "vite";

// `npm run dev` with a controller that serves plain HTTP on loopback: SUPERCLOUD_URL=http://127.0.0.1:8080.
const controller = process.env.SUPERCLOUD_URL ?? "http://127.0.0.1:8080";

export default defineConfig({
  plugins: [preact()],
  base: "./",
  build: { target: "es2022", assetsInlineLimit: 0, modulePreload: false, reportCompressedSize: true, cssCodeSplit: false },
  server: { proxy: { "/v1": controller } },
});
