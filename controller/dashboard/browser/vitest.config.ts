// The dashboard in a real browser against a real controller: ./deploy/test-desk says what it needs and runs it.
import { defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    root: import.meta.dirname,
    include: ["*.test.ts"],
    // One controller and one browser at a time: machines that test are small.
    fileParallelism: false,
    testTimeout: 600_000,
    // Ten thousand guests take a busy machine a while.
    hookTimeout: 3_600_000,
    // What follows a failed step looks at the same controller and would fail for the same reason.
    bail: 1,
  },
});
