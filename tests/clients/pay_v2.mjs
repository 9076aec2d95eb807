// The official x402 v2 client, wrapped as its README says, with nothing but a key.
//   node pay_v2.mjs URL PRIVATE_KEY [METHOD] [BODY] [COUNT]
import { ExactEvmScheme } from "@x402/evm";
import { wrapFetchWithPaymentFromConfig } from "@x402/fetch";
import { privateKeyToAccount } from "viem/accounts";
import { argumentsOf, report } from "./answer.mjs";

const { url, key, init, count } = argumentsOf("pay_v2.mjs");
const fetchWithPayment = wrapFetchWithPaymentFromConfig(fetch, {
  schemes: [{ network: "eip155:*", client: new ExactEvmScheme(privateKeyToAccount(key)) }],
});
for (let n = 0; n < count; n += 1) await report(() => fetchWithPayment(url, init));
