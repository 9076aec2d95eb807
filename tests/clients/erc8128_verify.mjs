// Verifies requests with @slicekit/erc8128 and viem. Line protocol (lines.mjs):
//   in   {method, url, headers: [[name, value]…], body_base64 | null, now}
//   out  what verifyRequest returns: {ok: true, address, …} or {ok: false, reason}
import { createVerifierClient } from "@slicekit/erc8128";
import { verifyMessage } from "viem";
import { requestOf, serve } from "./lines.mjs";

await serve(async (job) => {
  const seen = new Set();
  const verifier = createVerifierClient({
    verifyMessage,
    nonceStore: {
      consume: async (key) => !seen.has(key) && Boolean(seen.add(key)),
    },
    defaults: { now: () => job.now, clockSkewSec: 30 },
  });
  return verifier.verifyRequest({ request: requestOf(job) });
});
