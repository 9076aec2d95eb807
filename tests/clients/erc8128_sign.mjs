// Signs requests with @slicekit/erc8128. Line protocol (lines.mjs):
//   in   {key, chain_id, method, url, headers: [[name, value]…], body_base64 | null,
//         created, expires, nonce, label?, components?}
//   out  {url, method, headers: [[name, value]…]} with everything the Request then carries
import { createSignerClient } from "@slicekit/erc8128";
import { privateKeyToAccount } from "viem/accounts";
import { requestOf, serve } from "./lines.mjs";

await serve(async (job) => {
  const account = privateKeyToAccount(job.key);
  const client = createSignerClient({
    chainId: job.chain_id,
    address: account.address,
    signMessage: (message) => account.signMessage({ message: { raw: message } }),
  });
  const options = { created: job.created, expires: job.expires, nonce: job.nonce };
  if (job.label) options.label = job.label;
  if (job.components) options.components = job.components;
  const signed = await client.signRequest(requestOf(job), undefined, options);
  return { url: signed.url, method: signed.method, headers: [...signed.headers] };
});
