// The official x402 v2 client with its sign-in-with-x extension, wrapped as its README says.
//   node siwx_v2.mjs URL PRIVATE_KEY [METHOD] [BODY] [COUNT]
import { ExactEvmScheme } from "@x402/evm";
import { createSIWxClientExtension } from "@x402/extensions/sign-in-with-x";
import { wrapFetchWithPayment, x402Client } from "@x402/fetch";
import { privateKeyToAccount } from "viem/accounts";
import { argumentsOf, report } from "./answer.mjs";

const { url, key, init, count } = argumentsOf("siwx_v2.mjs");
const signer = privateKeyToAccount(key);
const client = new x402Client()
  .register("eip155:*", new ExactEvmScheme(signer))
  .registerExtension(createSIWxClientExtension({ signers: [signer] }));
const fetchWithPayment = wrapFetchWithPayment(fetch, client);
for (let n = 0; n < count; n += 1) await report(() => fetchWithPayment(url, init));
